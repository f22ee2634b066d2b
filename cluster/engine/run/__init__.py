"""One rank's part of a step: the model's runner, executors, the stream of commands, the canary.
Decides nothing about requests: that is schedule/'s.
"""
