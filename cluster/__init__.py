"""How models run: engine, training, front-end, gRPC, Ray actors. At its root what several of them need: errors of
requests, supervision of threads, logs as JSON and text made safe for them. Knows no argument and no environment.
"""
