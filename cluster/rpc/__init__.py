"""gRPC: server, TLS, the page of limits and protoc; services, codec, client and the protocol have rooms. The only
place that imports grpc; no rule about calls lives here.
"""
