"""Several processes that share a model's experts: each computes those it has for all tokens, and tells the others."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from cache.lease import Phase
from cache.placement import Placement, in_turn, load_placement
from engine.batch import Batch
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.frames import FrameCodec
from engine.models.spec import MoeSpec
from kernels.backend import Routing, Sequences

_MEETING_S = 120.0  # for all processes to start
_ROOT = Path(__file__).parents[1]
_FOREVER = timedelta(
    days=3650
)  # a rank that waits for the next step may wait long; one that is gone is noticed at once


class Step(msgspec.Struct, frozen=True):
    """What the leader tells the others of a step; lists as in `engine.batch.Batch`."""

    token_ids: list[int]
    positions: list[int]
    slots: list[int]
    row_begin: list[int]
    context: list[int]
    block_begin: list[int]
    blocks: list[int]
    phase: Phase
    requests: list[int]
    ended: list[int]  # requests of which nothing more will come

    def batch(self) -> Batch:
        """Without logits: those are the leader's affair."""
        lists = (self.positions, self.slots, self.row_begin, self.context, self.block_begin, self.blocks)
        sequences = Sequences(*(torch.tensor(values, dtype=torch.int32) for values in lists))
        return Batch(torch.tensor(self.token_ids), sequences, None, self.phase, self.requests)


class ExpertGroup:
    """One rank of it. Rank 0 leads: it schedules, samples and serves; the others compute the steps that it sends.

    All ranks compute everything beside the routed experts, with the same result. Products are exchanged as they are
    and combined by each rank in routing order, so that an output is the same bits as one process's.
    """

    def __init__(self, config: EngineConfig, moe: MoeSpec | None, rank: int = 0) -> None:
        """Raises `ConfigError` for what cannot be shared out so. Nothing is connected yet."""
        self.rank, self.size = rank, config.expert_parallel
        if moe is None:
            raise ConfigError("the model has no experts that could be spread: leave out --expert-parallel")
        if config.device != "cpu":
            raise ConfigError("experts are spread over processes on the CPU only, for now: leave out --device")
        if self.size > moe.num_experts:
            raise ConfigError(f"{moe.num_experts} experts cannot be spread over {self.size} processes")
        try:
            placement = in_turn(len(moe.layers), moe.num_experts, self.size)
            if config.placement is not None:
                placement = load_placement(config.placement)
                placement.check(len(moe.layers), moe.num_experts)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if placement.num_ranks != self.size:
            raise ConfigError(f"the placement is for {placement.num_ranks} processes, not {self.size}")
        self._placement: Placement = placement
        self._config = config
        self._ended: list[int] = []
        self._followers: list[subprocess.Popen[bytes]] = []
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    @property
    def num_owned(self) -> int:
        """Experts of all layers that this rank has."""
        return sum(layer.count(self.rank) for layer in self._placement.ranks)

    def owns(self, index: int, expert: int) -> bool:
        """Whether an expert of the `index`-th layer with experts is this rank's."""
        return self._placement.ranks[index][expert] == self.rank

    def lead(self) -> None:
        """Start the other ranks and wait until they are there. They end when this process does."""
        self._directory = tempfile.TemporaryDirectory(prefix="foregate-ranks-")
        directory = Path(self._directory.name)
        (directory / "config").write_bytes(FrameCodec[EngineConfig](EngineConfig).encode(self._config))
        (directory / "leader").write_text(str(os.getpid()))
        paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        for rank in range(1, self.size):
            command = [sys.executable, "-m", "engine.expert_rank", str(directory), str(rank)]
            env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
            self._followers.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, env=env))
        self.join(directory)

    def join(self, directory: Path) -> None:
        """Meet the others. Raises `ConfigError` if one does not come."""
        store = dist.FileStore(str(directory / "meeting"), self.size)  # type: ignore[attr-defined]  # documented
        store.set(f"here {self.rank}", "")
        deadline, leader = time.monotonic() + _MEETING_S, int((directory / "leader").read_text())
        while not store.check([f"here {rank}" for rank in range(self.size)]):
            is_one_gone = any(follower.poll() is not None for follower in self._followers)
            is_one_gone |= self.rank > 0 and os.getppid() != leader
            if is_one_gone or time.monotonic() > deadline:
                self.close()
                raise ConfigError("a process that was to have some of the experts did not start; its log says why")
            time.sleep(0.05)
        dist.init_process_group("gloo", store=store, timeout=_FOREVER, rank=self.rank, world_size=self.size)

    def loaded(self) -> None:
        """All have loaded the model. Raises `ConfigError` if one has not."""
        try:
            dist.all_reduce(torch.ones(1))
        except RuntimeError as error:
            raise ConfigError("a process that was to have some of the experts ended; its log says why") from error

    def send(self, batch: Batch) -> None:
        """The leader is about to compute a step."""
        s = batch.sequences
        step = Step(
            token_ids=batch.token_ids.tolist(),
            positions=s.positions.tolist(),
            slots=s.slots.tolist(),
            row_begin=s.row_begin.tolist(),
            context=s.context.tolist(),
            block_begin=s.block_begin.tolist(),
            blocks=s.blocks.tolist(),
            phase=batch.phase,
            requests=batch.requests,
            ended=self._ended,
        )
        self._ended = []
        self._broadcast(msgspec.msgpack.encode(step))

    def receive(self) -> Step | None:
        """The next step; None when there will be no more."""
        size = torch.zeros(1, dtype=torch.int64)
        dist.broadcast(size, 0)
        if not size:
            return None
        body = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(body, 0)
        return msgspec.msgpack.decode(body.numpy().tobytes(), type=Step)

    def request_ends(self, number: int) -> None:
        """The others hear of it with the next step."""
        self._ended.append(number)

    def exchange(self, index: int, routing: Routing, outputs: Tensor, failed: int | None) -> int | None:
        """Fill the others' rows of outputs [T * k, H]; `failed`: an expert that this rank could not read.

        -> an expert that some rank could not read, the same for all.
        """
        rows = self._rows(index, routing)
        buffers = [outputs.new_empty(1 + max(map(len, rows)), outputs.shape[1]) for _ in rows]
        mine = torch.zeros_like(buffers[0])
        mine[0, 0] = 0 if failed is None else failed + 1
        mine[1 : 1 + len(rows[self.rank])] = outputs[rows[self.rank]]
        dist.all_gather(buffers, mine)
        for rank, (at, received) in enumerate(zip(rows, buffers, strict=True)):
            if (code := int(received[0, 0])) > 0:
                return code - 1
            if rank != self.rank:
                outputs[at] = received[1 : 1 + len(at)]
        return None

    def close(self) -> None:
        """The leader tells the others that it was the last step, and waits for them to end."""
        if dist.is_initialized():
            try:
                if self.rank == 0:
                    self._broadcast(b"")
            except RuntimeError:  # one is gone already
                self._end_followers()
            dist.destroy_process_group()
        else:
            self._end_followers()
        for follower in self._followers:
            follower.wait()
        self._followers.clear()
        if self._directory is not None:
            self._directory.cleanup()

    def _end_followers(self) -> None:
        for follower in self._followers:
            follower.terminate()

    def _rows(self, index: int, routing: Routing) -> list[Tensor]:
        """Of each rank, the positions (token * k + rank) of the products that it computes."""
        begin: Sequence[int] = routing.row_begin.tolist()
        ranks = self._placement.ranks[index]
        parts: list[list[Tensor]] = [[routing.positions[:0]] for _ in range(self.size)]
        for i, expert in enumerate(routing.experts):
            parts[ranks[expert]].append(routing.positions[begin[i] : begin[i + 1]])
        return [torch.cat(of_rank).long() for of_rank in parts]

    def _broadcast(self, body: bytes) -> None:
        dist.broadcast(torch.tensor([len(body)]), 0)
        if body:
            dist.broadcast(torch.frombuffer(bytearray(body), dtype=torch.uint8), 0)
