"""Owns the model and the KV memory; turns a scheduled step into logits."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from cache.device.device import DeviceOutOfMemory
from engine.batch import Batch
from engine.expert_group import ExpertGroup
from engine.kv_cache import KVCache
from engine.layers.moe import ExpertFailure
from engine.models.decoder import Decoder
from engine.prompt_scores import score_prompts
from engine.scheduler import SchedulerOutput

_log = logging.getLogger(__name__)


class ModelRunner:
    """`run` is the only call per step; `follow` is all, where another process leads."""

    def __init__(self, model: Decoder, kv_cache: KVCache, group: ExpertGroup | None = None) -> None:
        """`group`: is told of each step first."""
        self.model = model
        self._kv_cache = kv_cache
        self._group = group

    def run(self, output: SchedulerOutput, *, all_logits: bool = False) -> Tensor:
        """-> float32 logits [n, V] of the sequences that have caught up, in batch order; or of every token; on the CPU.

        Scores the prompt tokens of the requests that want it.

        Raises `ExpertFailure` if an expert cannot be read, `DeviceOutOfMemory` if a device has no
        room for so many tokens; the step may then be run again.
        """
        try:
            batch = Batch.build(output, all_logits=all_logits, device=self.model.embedding.device)
            if self._group is not None:
                self._group.send(batch)
            residual = self.model.residual(batch, self._kv_cache)
            score_prompts(output, residual, self.model.logits)
            return self.model.logits(residual if batch.logit_rows is None else residual[batch.logit_rows]).cpu()
        except torch.OutOfMemoryError as error:
            raise DeviceOutOfMemory(str(error)) from error

    def run_what_fits(self, output: SchedulerOutput) -> tuple[SchedulerOutput, Tensor]:
        """-> what was computed of it, and logits. What a device has no room for is tried again with half the tokens.

        Raises as `run`, of a single token too.
        """
        while True:
            try:
                return output, self.run(output)
            except DeviceOutOfMemory as error:
                if output.total_num_tokens == 1:
                    raise
                _log.warning("a step of %d tokens is halved: %s", output.total_num_tokens, error)
                output = output.halved()

    def follow(self, ended: Callable[[int], object]) -> None:
        """Compute what the leader computes, but for the logits, until there are no more steps.

        `ended` is told the number of each request of which nothing more will come. Raises `RuntimeError` when the
        leader is gone.
        """
        assert self._group is not None
        while (step := self._group.receive()) is not None:
            for number in step.ended:
                ended(number)
            try:
                self.model.residual(step.batch(), self._kv_cache)
            except ExpertFailure as failure:
                _log.error("%s", failure)
