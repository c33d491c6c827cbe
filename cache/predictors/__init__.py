"""Predictors of routing: one predictor, one file, one line in the table."""

from collections.abc import Callable

from cache.predictors.gates import GatePredictor
from cache.predictors.history import HistoryPredictor
from cache.predictors.path import PathPredictor
from cache.predictors.predictor import Predictor
from cache.predictors.token_table import TokenTablePredictor

PREDICTORS: dict[str, Callable[[int, int, int], Predictor]] = {  # of numbers of layers, experts, active ones
    "history": lambda layers, experts, active: HistoryPredictor(layers, experts, active, decay=0.9),
    "path": lambda layers, experts, active: PathPredictor(),
    "probe": lambda layers, experts, active: GatePredictor("probe", active),
    "stale_gate": lambda layers, experts, active: GatePredictor("stale_gate", active),
    "token": TokenTablePredictor,
}
LEARNED = ("path", "probe")  # which a model has only once they were
