"""Messages to calls and answers to messages: strict parsing, ranges, decoding, encoding, errors as statuses.
No rule about values lives here (cluster/frontend/requests).
"""
