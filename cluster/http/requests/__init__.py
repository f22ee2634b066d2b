"""Bodies of requests, read: JSON, its fields, chat templates, and what a completion asks for. Total functions; what the
values may be is the front-end's to judge.
"""
