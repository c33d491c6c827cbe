"""Programs that these tests run, which the operating system has to have."""

from __future__ import annotations

import shutil

import pytest


def program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.fail(
            f"{name} is not installed; Debian and Ubuntu have it in the package prometheus: apt-get install prometheus"
        )
    return path
