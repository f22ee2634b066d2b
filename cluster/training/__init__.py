"""Training of one sharded model: what a client asks for; steps, checkpoints, the service, jobs, memory and data have
rooms. No ray, no grpc.
"""
