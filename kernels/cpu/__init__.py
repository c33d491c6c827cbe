"""Native CPU kernels: one shared library, built from src/ by the package's own build, and its Python side."""
