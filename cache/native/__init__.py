"""Reading without the interpreter: a small C++ library that `cache.native_transfer` drives."""
