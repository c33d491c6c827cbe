"""Applies before any test imports torch."""

import os

from engine.threads import wait_passively

wait_passively()
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported, which transformers may do
