"""Chooses how a model's coming routing is foretold."""

from __future__ import annotations

from cache.prefetcher import Prefetcher
from engine.errors import ConfigError
from engine.layers.foresight import ExactForesight, RoutingObserver
from engine.layers.moe import ExpertArena
from engine.loader import expert_keys
from engine.models.spec import ModelSpec

PREDICTORS = ("auto", "off")


def make_foresight(predictor: str, spec: ModelSpec, experts: ExpertArena | None) -> RoutingObserver | None:
    """`auto`: exact where the model is pre-gated. Raises `ConfigError` for a name that is not known."""
    if predictor not in PREDICTORS:
        raise ConfigError(f"unknown predictor {predictor!r}; known: {', '.join(PREDICTORS)}")
    if predictor == "off" or experts is None or spec.moe is None or spec.pregate is None:
        return None
    moe = spec.moe
    prefetcher = Prefetcher(experts.cache, len(moe.layers))
    return ExactForesight(prefetcher, [expert_keys(moe, layer) for layer in moe.layers])
