"""Grammars that an answer must follow: compiled, followed token by token, and which tokens each allows next.
The engine under it is llguidance (extra `guided`); what is drawn among the allowed tokens is sample/'s.
"""
