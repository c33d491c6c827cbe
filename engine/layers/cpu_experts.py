"""Missing experts that the CPU computes where they lie, in pinned host memory, while the device has the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from cache.expert_cache import ExpertCache
from cache.expert_key import ExpertKey
from cache.fetch_or_compute import Busy, Missing, choose_cpu
from cache.pinned_tier import PinnedTier
from kernels.backend import Backend, Records, Routing
from kernels.quant.layout import RecordLayout

_WEIGHT = 0.2  # of a new sample in an average
_MEASURED_ROWS = (1, 32)
_FORGET = 256  # calls without a sample until the estimate is trusted half as much as before
_HANDING_S = 50e-6  # to another thread and back


class CpuCosts:
    """Seconds of an expert on the CPU: some for its weights, some for each row, as measured; kept right while used."""

    def __init__(self, expert_s: float, row_s: float) -> None:
        self._expert_s = expert_s
        self._row_s = row_s
        self._factor = 1.0  # measured / expected, averaged
        self._num_unused = 0

    def seconds(self, num_rows: int) -> float:
        return self._factor * self._plain_s(num_rows)

    def took(self, rows: Sequence[int], seconds: float) -> None:
        """These experts were computed in so long."""
        self._num_unused = 0
        ratio = seconds / sum(self._plain_s(num) for num in rows)
        self._factor += _WEIGHT * (ratio - self._factor)

    def unused(self) -> None:
        """The CPU was given nothing: what made it slow once may be over."""
        self._num_unused += 1
        if self._num_unused % _FORGET == 0:
            self._factor = (1.0 + self._factor) / 2

    def _plain_s(self, num_rows: int) -> float:
        return self._expert_s + self._row_s * num_rows


class CpuExperts:
    """Chooses for each layer call, by measured costs, and computes on a thread of its own.

    Its products are rounded as the CPU's kernels round. Where the device's kernels are others, which expert is computed
    where, and so the last bits of the output, depends on how fast the link was: off unless it is asked for.
    """

    def __init__(
        self,
        cache: ExpertCache,
        tier: PinnedTier,
        backend: Backend,
        layout: RecordLayout,
        lock: threading.Lock | None = None,
        costs: CpuCosts | None = None,
    ) -> None:
        """`backend`: the CPU's. `lock`: held while it is used, where the device uses it too. `costs`: not measured."""
        self._cache = cache
        self._tier = tier
        self._backend = backend
        self._layout = layout
        self._lock: AbstractContextManager[object] = lock or nullcontext()
        self._thread = ThreadPoolExecutor(1, "cpu-experts")
        self._costs = costs or _measured(backend, layout)

    def choose(self, routing: Routing, keys: Sequence[ExpertKey]) -> dict[ExpertKey, memoryview]:
        """Which experts of a layer call the CPU computes, and their records, held until `begin`'s work is done."""
        transfer = self._cache.transfer
        missing = self._cache.missing(keys)
        if not missing or transfer.bandwidth is None:  # what the link can do is not known yet
            return {}
        num_rows = dict(zip(routing.experts, routing.row_begin.diff().tolist(), strict=False))
        fetch_s = self._tier.record_nbytes / transfer.bandwidth
        ways = [
            Missing(
                device_s=0.0,  # beside a copy's
                cpu_s=self._costs.seconds(num_rows[key.expert]) if key in self._tier else float("inf"),
                fetch_s=fetch_s,
            )
            for key in missing
        ]
        busy = Busy(link_s=transfer.in_flight_nbytes / transfer.bandwidth, cpu_s=_HANDING_S)
        chosen = {missing[i]: self._tier.hold(missing[i]) for i in sorted(choose_cpu(ways, busy))}
        if not chosen:
            self._costs.unused()
        return {key: record for key, record in chosen.items() if record is not None}

    def begin(self, x: Tensor, routing: Routing, chosen: dict[ExpertKey, memoryview], outputs: Tensor) -> Future[None]:
        """Compute these experts' products into their rows of outputs [T * k, H]; they are there when it is done."""
        return self._thread.submit(self._compute, x.cpu(), routing.on_host(), chosen, outputs)

    def close(self) -> None:
        self._thread.shutdown()

    @torch.inference_mode()
    def _compute(self, x: Tensor, routing: Routing, chosen: dict[ExpertKey, memoryview], outputs: Tensor) -> None:
        try:
            records = Records(self._layout, [torch.frombuffer(r, dtype=torch.uint8) for r in chosen.values()])
            ready = [(key.expert, i) for i, key in enumerate(chosen)]
            on_host = outputs if outputs.device.type == "cpu" else torch.empty(outputs.shape)
            began = time.perf_counter()
            with self._lock:
                self._backend.expert_mlp(x, routing, records, ready, on_host)
            begin = routing.row_begin.tolist()
            at = [routing.experts.index(key.expert) for key in chosen]
            self._costs.took([begin[i + 1] - begin[i] for i in at], time.perf_counter() - began)
            if on_host is not outputs:
                rows = torch.cat([routing.positions[begin[i] : begin[i + 1]] for i in at]).long()
                outputs[rows.to(outputs.device)] = on_host[rows].to(outputs.device)
            self._cache.computed_on_cpu(len(chosen))
        finally:
            for key in chosen:
                self._tier.let_go(key)


def _measured(backend: Backend, layout: RecordLayout) -> CpuCosts:
    """From a few calls with a record of zeros."""
    records = Records(layout, [torch.zeros(layout.nbytes, dtype=torch.uint8)])
    times = []
    for num_rows in _MEASURED_ROWS:
        x = torch.zeros(num_rows, layout.hidden_size)
        routing = Routing.of(torch.zeros(num_rows, 1, dtype=torch.int32), torch.ones(num_rows, 1))
        outputs = torch.empty(num_rows, layout.hidden_size)
        samples = []
        for _ in range(4):
            began = time.perf_counter()
            backend.expert_mlp(x, routing, records, [(0, 0)], outputs)
            samples.append(time.perf_counter() - began)
        times.append(min(samples))
    row_s = max(0.0, times[1] - times[0]) / (_MEASURED_ROWS[1] - _MEASURED_ROWS[0])
    return CpuCosts(max(times[0] - row_s, 1e-7), row_s)
