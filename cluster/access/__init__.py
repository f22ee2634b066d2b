"""Who may call a server: roles, the token file, limits of one caller, and why a call was turned away.
Imports no grpc: the metrics' port asks here too. TLS and the interceptor are cluster/rpc's.
"""
