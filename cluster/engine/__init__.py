"""Continuous batching over one model: requests, the engine and how it is built; sequences, blocks, sampling,
beams, planning and running have rooms. No ray, no grpc, no text.
"""
