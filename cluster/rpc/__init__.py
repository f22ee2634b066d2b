"""gRPC: messages, servicers, the error table, server and client. The only place that imports grpc."""
