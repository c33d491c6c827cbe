"""Every test that takes `backend` or `native` runs on each of them."""

from __future__ import annotations

import pytest

from kernels.backend import Backend
from tests.kernels.backends import NATIVE, make_backend


@pytest.fixture(params=["reference", *NATIVE])
def backend(request: pytest.FixtureRequest) -> Backend:
    return make_backend(request.param)


@pytest.fixture(params=NATIVE)
def native(request: pytest.FixtureRequest) -> str:
    make_backend(request.param)
    return str(request.param)
