"""The OpenAI-compatible HTTP interface beside gRPC: bodies to calls of the front-end, its answers to JSON and events.

Who may call, limits, the table of errors and TLS are those of gRPC; no rule of a request lives here. The one room that
imports aiohttp.
"""
