"""Who records a running engine's routing: a file from start to end, and whoever asks for a while of it."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ConfigError
from engine.layers.foresight import Observers
from engine.messages import MAX_TRACE_TOKENS, StartTrace, StopTrace, TraceRecorded
from engine.models.spec import MoeSpec
from engine.request import Request
from engine.trace_recorder import TraceRecorder

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recording:
    """What somebody asked for."""

    asked: StartTrace
    recorder: TraceRecorder

    def packed(self) -> TraceRecorded:
        """The answer. Takes seconds for a long one; on any thread, once the recording has ended."""
        trace = self.recorder.trace(self.asked.domain)
        with tempfile.TemporaryDirectory(prefix="foregate-trace-") as scratch:
            path = Path(scratch) / "trace.npz"
            trace.save(path)
            npz = path.read_bytes()
        return TraceRecorded(
            trace_id=self.asked.trace_id,
            npz=npz,
            num_tokens=trace.num_tokens,
            num_requests=trace.num_requests,
            is_full=self.recorder.is_full,
        )


class Recordings:
    """The recorders are observers that come and go between steps: while nothing is recorded there are none."""

    def __init__(self, file: Path | None, moe: MoeSpec | None, observers: Observers) -> None:
        """`file` is written by `close`. Raises `ConfigError` if that cannot be, or there is nothing to record."""
        self._file = file
        self._moe = moe
        self._observers = observers
        self._of_file = None if file is None else self._record_to(file)
        self._asked: Recording | None = None

    def request_begins(self, number: int, num_prompt_tokens: int) -> None:
        """A request is queued."""
        if self._of_file is not None:
            self._of_file.request_begins(number, num_prompt_tokens)
        if self._asked is not None:
            self._asked.recorder.request_begins(number, num_prompt_tokens)

    def start(self, asked: StartTrace, requests: Iterable[Request], when_full: Callable[[], None]) -> None:
        """Record from the next step on; `requests` are those there already. Ends what was asked for before."""
        assert self._moe is not None
        self.stop()
        recorder = TraceRecorder(self._moe, asked.max_tokens, when_full)
        for request in requests:
            recorder.request_begins(request.number, request.num_prompt_tokens)
        self._asked = Recording(asked, recorder)
        self._observers.add(recorder)

    def stop(self, trace_id: str | None = None) -> Recording | None:
        """End what was asked for last, or only if it is this one; returns what was ended."""
        recording = self._asked
        if recording is None or trace_id not in (None, recording.asked.trace_id):
            return None
        self._asked = None
        self._observers.remove(recording.recorder)
        return recording

    def close(self) -> None:
        """Write the file."""
        if self._file is not None and self._of_file is not None:
            trace = self._of_file.trace()
            trace.save(self._file)
            _log.info("routing of %d tokens of %d requests is in %s", trace.num_tokens, trace.num_requests, self._file)

    def _record_to(self, file: Path) -> TraceRecorder:
        if self._moe is None:
            raise ConfigError("this model has no experts whose routing could be recorded")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        except OSError as error:
            raise ConfigError(f"cannot write routing trace {file}: {error.strerror}") from error

        def when_full() -> None:
            self._observers.remove(recorder)
            _log.warning("routing trace %s is full: what follows is not recorded", file.name)

        recorder = TraceRecorder(self._moe, MAX_TRACE_TOKENS, when_full)
        self._observers.add(recorder)
        return recorder


class TraceService:
    """Ends recordings and answers whoever asked, from a thread of its own: the engine does not wait for compression."""

    def __init__(self, recordings: Recordings, deliver: Callable[[TraceRecorded], object]) -> None:
        """`deliver` is called on that thread."""
        self._recordings = recordings
        self._deliver = deliver
        self._packer = ThreadPoolExecutor(1, thread_name_prefix="trace")  # starts its thread when there is work

    def stop(self, message: StopTrace | None = None) -> None:
        """End that recording; or any there is."""
        recording = self._recordings.stop(None if message is None else message.trace_id)
        if recording is not None and not (message is not None and message.discard):
            self._packer.submit(self._answer, recording)

    def close(self) -> None:
        """Wait for the answers that are being made."""
        self._packer.shutdown()

    def _answer(self, recording: Recording) -> None:
        try:
            recorded = recording.packed()
        except Exception as error:
            _log.exception("a recording could not be packed")
            recorded = TraceRecorded(trace_id=recording.asked.trace_id, error=f"{type(error).__name__}: {error}")
        self._deliver(recorded)
