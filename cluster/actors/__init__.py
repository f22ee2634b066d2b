"""Ray: groups of ranks, their machines, what a rank runs. The only place that imports ray.
Knows no grpc and reads no environment.
"""
