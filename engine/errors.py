"""The errors that cross the engine's face; each message says what is wrong and, where there is one, the cure."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting cannot work (unknown name, budget too small, contradiction); raised before anything is loaded."""


class CheckpointError(ValueError):
    """The model directory cannot be served: missing or damaged files, or an architecture that is not known."""


class InvalidRequest(ValueError):
    """A request is refused at the door. `param` names the offending parameter, `code` is OpenAI's code or None."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class EngineOverloaded(RuntimeError):
    """The waiting queue is full; the client may retry after `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RecordingInProgress(RuntimeError):
    """The routing is being recorded for somebody already."""


class EngineDead(RuntimeError):
    """The engine is not running (not started, stopped, or it failed); no request can be served."""
