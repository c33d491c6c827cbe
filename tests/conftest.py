"""Applies before any test imports torch."""

from engine.threads import wait_passively

wait_passively()
