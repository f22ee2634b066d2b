"""The methods of the services and what stands around each: interceptor, spans, limits, answers that wait to be sent.
Messages become calls in codec/; the server itself is rpc/server.
"""
