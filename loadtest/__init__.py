"""Load tests of a running server, over HTTP. Knows no more of it than a client does; soak.py also has its pid."""
