"""What `serve` does after its settings are read: the door that checks them, replicas, healing, rolling restarts,
signals, the state file. Settings are read in commands/serve.
"""
