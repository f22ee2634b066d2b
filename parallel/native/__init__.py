"""C++ kernels for CPUs and their ctypes wrappers: compiled (built once, loaded), gemm, elementwise, attention, comm.

All sources of src/ become one shared library, compiled with the machine's own compiler on first use. Nothing here knows
a model or a file; without a compiler `library()` raises NativeUnavailable and callers use torch.
"""
