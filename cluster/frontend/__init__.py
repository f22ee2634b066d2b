"""Between clients and an engine: the journal of requests, text in and out, streams. No ray, no grpc."""
