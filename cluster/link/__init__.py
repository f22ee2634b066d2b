"""Between a front-end and an engine: the seam, its two kinds (a thread, a socket), messages, and the engine's loop.
What calls mean is frontend/'s, what a step does engine/'s.
"""
