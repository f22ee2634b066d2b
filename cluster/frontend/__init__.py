"""Between clients and engines: the front-end itself, readiness and traces; calls, answers, the ledger, the
fleet and training have rooms. No ray, no grpc.
"""
