"""The kernels as one shared library: which instructions, compiled when and kept where, loaded once."""
