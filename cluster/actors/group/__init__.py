"""A group of ranks on Ray: reservation, start, watching, rebuilding, end; groups that outlive their owner.
What a rank does is programs/'; its machine is host/'s.
"""
