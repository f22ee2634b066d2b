"""How calls reach the server: channels, retries that resume, hints on what stands in the way. Messages of the protocol
in and out; typed values are made of them in values/.
"""
