"""The native transfer library as ctypes sees it: the structures and functions of transfer.cpp, nothing else."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int, c_int32, c_int64, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from struct import Struct

_LIBRARY = Path(__file__).parent / "libforegate_io.so"


class Setup(ctypes.Structure):
    """See transfer.cpp."""

    _fields_ = (
        ("data_offset", c_int64),
        ("record_nbytes", c_int64),
        ("checksums", c_void_p),
        ("num_records", c_int64),
        ("link_bandwidth", c_double),
        ("rate_weight", c_double),
        ("rate_sample_nbytes", c_int64),
        ("depths", c_void_p),
        ("trial_nbytes", c_int64),
        ("worth", c_double),
        ("certain", c_double),
        ("num_depths", c_int32),
        ("max_depth", c_int32),
        ("max_uncertain", c_int32),
        ("max_together", c_int32),
        ("fd", c_int32),
        ("is_direct", c_int32),
        ("read_s_bounds", c_void_p),
        ("num_bounds", c_int64),
    )


REQUEST = Struct("=QqQdq")
"""id, position, address, benefit, whether somebody waits; see transfer.cpp."""

ARRIVAL = Struct("=Qii")
"""id, status, detail; see transfer.cpp."""


class Counts(ctypes.Structure):
    """See transfer.cpp."""

    _fields_ = (
        ("num_reads", c_int64),
        ("num_ahead", c_int64),
        ("num_retries", c_int64),
        ("num_errors", c_int64),
        ("num_cancelled", c_int64),
        ("in_flight_nbytes", c_int64),
        ("read_s", c_double),
        ("latency_s", c_double),
        ("bandwidth", c_double),
        ("depth", c_int64),
    )


OK, DISK_ERROR, SHORT_READ, CORRUPT = range(4)  # `Arrival.status`


class Library:
    """Its functions. What returns at once is called with the interpreter's lock held; what waits, without."""

    def __init__(self, path: Path) -> None:
        waits, at_once = ctypes.CDLL(str(path)), ctypes.PyDLL(str(path))
        self.open = waits.foregate_transfer_open
        self.open.argtypes, self.open.restype = (c_void_p,), c_void_p
        self.finish = waits.foregate_transfer_finish
        self.finish.argtypes, self.finish.restype = (c_void_p,), None
        self.close = waits.foregate_transfer_close
        self.close.argtypes, self.close.restype = (c_void_p,), None
        self.wait = waits.foregate_transfer_wait
        self.wait.argtypes, self.wait.restype = (c_void_p, c_void_p, c_int, c_uint64), c_int
        self.take = at_once.foregate_transfer_take
        self.take.argtypes, self.take.restype = (c_void_p, c_void_p, c_int), c_int
        self.submit = at_once.foregate_transfer_submit
        self.submit.argtypes, self.submit.restype = (c_void_p, c_void_p, c_int), None
        self.promote = at_once.foregate_transfer_promote
        self.promote.argtypes, self.promote.restype = (c_void_p, c_uint64), None
        self.cancel = at_once.foregate_transfer_cancel
        self.cancel.argtypes, self.cancel.restype = (c_void_p, c_uint64), c_int
        self.notify = at_once.foregate_transfer_notify
        self.notify.argtypes, self.notify.restype = (c_void_p,), c_uint64
        self.reads = at_once.foregate_transfer_reads
        self.reads.argtypes, self.reads.restype = (c_void_p, c_void_p, c_void_p), None
        self.counts = at_once.foregate_transfer_counts
        self.counts.argtypes, self.counts.restype = (c_void_p, c_void_p), None


def is_built() -> bool:
    """Whether a compiler was there when Foregate was installed."""
    return _LIBRARY.exists()


@cache
def load_library() -> Library:
    """Raises `RuntimeError` if it was not built."""
    if not is_built():
        raise RuntimeError("the native transfer was not built: install a C++17 compiler and install Foregate again")
    return Library(_LIBRARY)
