"""What `serve` does after its settings are read: replicas, healing, rolling restarts, signals, the state file.
Settings are read in commands/serve.
"""
