"""One machine under Ray: joining or starting a cluster, cores, output of ranks, dumps after a fault, slow loads.
Places no rank (group/) and runs no model (programs/).
"""
