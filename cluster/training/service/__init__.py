"""Training of the model that serves: what rank 0 decides about calls, what every rank does, sessions, retries.
Arithmetic is step/'s; the front-end's part is cluster/frontend/training.
"""
