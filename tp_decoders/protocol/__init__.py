"""The protocol (package tp_decoders.v1) and its generated Python code; regenerate with `python -m
cluster.rpc.protoc`. Imports nothing of this project.
"""
