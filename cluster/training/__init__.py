"""Training: data, losses, schedules, the optimiser and the trainer over one sharded model. No ray, no grpc."""
