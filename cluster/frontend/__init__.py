"""Between clients and engines: the front-end itself, readiness and traces; calls, answers, the journal, the
fleet and training have rooms. No ray, no grpc.
"""
