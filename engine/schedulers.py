"""The schedulers by name."""

from __future__ import annotations

from collections.abc import Callable

from engine.block_manager import BlockManager
from engine.config import SchedulerConfig
from engine.expert_aware import ExpertAwareScheduler, ExpertView
from engine.scheduler import FcfsScheduler

Clock = Callable[[], float]


def _fcfs(config: SchedulerConfig, blocks: BlockManager, experts: ExpertView | None, clock: Clock) -> FcfsScheduler:
    return FcfsScheduler(config, blocks)


SCHEDULERS: dict[str, Callable[[SchedulerConfig, BlockManager, ExpertView | None, Clock], FcfsScheduler]] = {
    "expert-aware": ExpertAwareScheduler,
    "fcfs": _fcfs,
}
