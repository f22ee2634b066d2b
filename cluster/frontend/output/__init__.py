"""An answer on its way out: streams, text from tokens, stop strings, the best of several samples.
When a request ends is fleet/request_lifecycle's.
"""
