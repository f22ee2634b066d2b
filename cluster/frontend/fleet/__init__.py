"""Open requests and the replicas that work on them: who gets what, how a request goes on and ends, replay, meters.
Starting and rebuilding replicas is launch/serving's.
"""
