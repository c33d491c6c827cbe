"""Owns the model and the KV memory; turns a scheduled step into logits."""

from __future__ import annotations

import torch
from torch import Tensor

from cache.device.device import DeviceOutOfMemory
from engine.batch import Batch
from engine.expert_group import ExpertGroup
from engine.kv_cache import KVCache
from engine.models.decoder import Decoder
from engine.prompt_scores import score_prompts
from engine.scheduler import SchedulerOutput


class ModelRunner:
    """`run` is the only call per step; `follow`, where another process leads."""

    def __init__(self, model: Decoder, kv_cache: KVCache, group: ExpertGroup | None = None) -> None:
        """`group`: is told of each step first."""
        self.model = model
        self._kv_cache = kv_cache
        self._group = group

    def run(self, output: SchedulerOutput, *, all_logits: bool = False) -> Tensor:
        """-> float32 logits [n, V] of the sequences that have caught up, in batch order; or of every token.

        Scores the prompt tokens of the requests that want it.

        Raises `engine.layers.moe.ExpertFailure` if an expert cannot be read, `DeviceOutOfMemory` if a device has no
        room for so many tokens; the step may then be run again.
        """
        try:
            batch = Batch.build(output, all_logits=all_logits)
            if self._group is not None:
                self._group.send(batch)
            residual = self.model.residual(batch, self._kv_cache)
            score_prompts(output, residual, self.model.logits)
            return self.model.logits(residual if batch.logit_rows is None else residual[batch.logit_rows])
        except torch.OutOfMemoryError as error:
            raise DeviceOutOfMemory(str(error)) from error

    def follow(self, batch: Batch) -> None:
        """Compute what the leader computes, but for the logits. Raises as `run`."""
        self.model.residual(batch, self._kv_cache)
