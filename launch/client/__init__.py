"""The commands that ask a running server: generate, bench, status, drain, restart, and the flags they share.
The gRPC client itself is cluster/rpc/client.
"""
