"""The Triton kernels. Only what imports a module of this package needs triton."""
