"""Files that others wrote, read with care: JSON, tensors, Git LFS pointers; where they lie and a copy on the host's
disk. Which tensor is which parameter is checkpoint/'s; names on the hub are hub/'s.
"""
