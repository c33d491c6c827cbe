"""A packed file of small records whose content names the expert, and caches on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from cache.expert_cache import ExpertCache
from cache.expert_key import ExpertKey
from cache.expert_store import ExpertStore
from cache.native_transfer import NativeTransfer
from cache.packed_file import write_packed_file
from cache.slot_pool import SlotPool

RECORD_NBYTES = 8192
NUM_LAYERS, NUM_EXPERTS = 3, 8
KEYS = [ExpertKey(layer, expert) for layer in range(NUM_LAYERS) for expert in range(NUM_EXPERTS)]


def record_of(key: ExpertKey) -> bytes:
    return bytes([key.layer * 16 + key.expert]) * RECORD_NBYTES


def write_records(path: Path) -> Path:
    write_packed_file(
        path,
        format="int8",
        hidden_size=32,
        intermediate_size=64,
        source="test",
        record_nbytes=RECORD_NBYTES,
        keys=KEYS,
        make_record=record_of,
    )
    return path


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return write_records(tmp_path / "experts.safetensors")


class OpenCache:
    """A cache with the parts that tests look into."""

    def __init__(self, path: Path, num_slots: int, *, is_native: bool = False, **kwargs: object) -> None:
        self.store = ExpertStore(path)
        if is_native:
            depth = kwargs.pop("num_io_threads", 4)
            native = NativeTransfer(self.store, depth, link_bandwidth=kwargs.pop("link_bandwidth", None))  # type: ignore[arg-type]
            kwargs |= {"transfer": native, "arrival": native.arrival}
        self.pool = SlotPool(num_slots, RECORD_NBYTES)
        self.cache = ExpertCache(self.store, self.pool, **kwargs)  # type: ignore[arg-type]

    def use(self, *keys: ExpertKey) -> list[ExpertKey]:
        """Lease the keys, check the bytes of each and return them in the order they came."""
        order = []
        with self.cache.acquire(keys) as lease:
            for ready in lease.batches():
                for key, slot in ready:
                    assert bytes(self.pool.buffer(slot)) == record_of(key)
                    order.append(key)
        return order


@pytest.fixture
def open_cache(packed: Path) -> Iterator[Callable[..., OpenCache]]:
    opened: list[OpenCache] = []

    def open_one(num_slots: int, **kwargs: object) -> OpenCache:
        opened.append(OpenCache(packed, num_slots, **kwargs))
        return opened[-1]

    yield open_one
    for one in opened:
        one.cache.close()
        one.cache.check_integrity()
        one.store.close()


@pytest.fixture(params=[False, True], ids=["python", "native"])
def open_either(request: pytest.FixtureRequest, open_cache: Callable[..., OpenCache]) -> Callable[..., OpenCache]:
    """As `open_cache`, once with each transfer engine."""
    return partial(open_cache, is_native=request.param)
