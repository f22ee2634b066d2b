"""The commands that start something or work on files: one module each, and what two of them share.
Those that ask a running server are in client/.
"""
