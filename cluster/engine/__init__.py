"""Continuous batching over one model: requests, blocks, the scheduler, sampling and the runner. No ray, no grpc."""
