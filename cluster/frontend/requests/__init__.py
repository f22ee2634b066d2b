"""A call on its way in: rules, ranges, costs, tokenization, engine requests, and which content is in quarantine.
Which replica computes it is fleet/'s, what goes out output/'s.
"""
