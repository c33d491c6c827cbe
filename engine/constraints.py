"""The structured requests among those that run: which wait for a grammar, and which tokens the others may have next.

Grammars are compiled on a thread, beside the steps. That they end is not checked here: `engine.grammar_trial` has.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.byte_lru import ByteLru
from engine.errors import InvalidRequest
from engine.request import Request
from engine.sampling_params import Structure

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

    from engine.grammar import Grammars

_log = logging.getLogger(__name__)

_CACHE_NBYTES = 64 * 1024**2
_UNMEASURED_NBYTES = 512 * 1024  # what a usual schema takes
_NBYTES_PER_CHAR = 32

_Key = tuple[str, str, str]


class Constraints:
    """Matchers belong to requests and outlive their preemption. One thread calls all of this."""

    def __init__(
        self,
        tokenizer_json: Callable[[], str],
        vocab_size: int,
        eos_token_ids: Sequence[int],
        num_threads: int,
        *,
        cache_nbytes: int = _CACHE_NBYTES,
    ) -> None:
        self._tokenizer_json = tokenizer_json
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._num_threads = num_threads
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._cache: ByteLru[_Key, LLMatcher] = ByteLru(cache_nbytes)
        self._compiling: dict[_Key, Future[LLMatcher]] = {}
        self._waiting: dict[Request, Future[LLMatcher]] = {}
        self._grammars: Grammars | None = None
        self._executor: LLExecutor | None = None

    @property
    def waiting(self) -> Sequence[Request]:
        """Requests that cannot begin before their grammar is compiled."""
        return list(self._waiting)

    def admit(self, request: Request) -> bool:
        """Whether the request can begin now; else `compiled` returns it later."""
        structure = request.params.structure
        if structure is None:
            return True
        key = (structure.kind, structure.source, structure.prelude)
        matcher = self._cache.get(key)
        if matcher is not None:
            request.matcher = matcher.deep_copy()
            return True
        if key not in self._compiling:
            self._compiling[key] = self._thread.submit(self._compile, structure)
        self._waiting[request] = self._compiling[key]
        return False

    def drop(self, request: Request) -> bool:
        """Forget a request; False: it does not wait here."""
        future = self._waiting.pop(request, None)
        if future is None:
            return False
        if future not in self._waiting.values():
            future.cancel()  # unless it runs already
            self._compiling = {key: other for key, other in self._compiling.items() if other is not future}
        return True

    def compiled(self, wait_s: float) -> tuple[list[Request], list[tuple[Request, str | InvalidRequest]]]:
        """Those that can begin now, and those that cannot, with the reason. Waits so long for the first of them."""
        if not self._waiting:
            return [], []
        wait(self._waiting.values(), timeout=wait_s, return_when=FIRST_COMPLETED)
        begin: list[Request] = []
        refused: list[tuple[Request, str | InvalidRequest]] = []
        for request, future in list(self._waiting.items()):
            if not future.done():
                continue
            del self._waiting[request]
            structure = request.params.structure
            assert structure is not None
            key = (structure.kind, structure.source, structure.prelude)
            self._compiling.pop(key, None)
            error = future.exception()
            if error is None:
                matcher = future.result()
                self._cache.put(key, matcher, _nbytes(structure))
                request.matcher = matcher.deep_copy()
                begin.append(request)
            else:
                why = f"{structure.param}: {error}"
                if isinstance(error, InvalidRequest):
                    refused.append((request, InvalidRequest(why, param=error.param or structure.param)))
                else:
                    _log.error("a grammar could not be compiled", exc_info=error)
                    refused.append((request, why))
        return begin, refused

    def masks(
        self, requests: Sequence[Request], which: Sequence[int]
    ) -> tuple[list[Tensor], dict[int, InvalidRequest]]:
        """int32 [V / 32] for each of `which`: a bit for each token, the lowest first, set if it may come.

        Also returns which of all requests have a grammar that has become too complex, with the reason.
        """
        masks: list[Tensor] = []
        if which:
            assert self._executor is not None
            assert self._grammars is not None
            words = torch.empty((len(which), -(-self._grammars.vocab_size // 32)), dtype=torch.int32)
            targets = [(matcher, at) for at, i in enumerate(which) if (matcher := requests[i].matcher) is not None]
            self._executor.unsafe_compute_mask_ptr(targets, words.data_ptr(), words.stride(0) * 4, len(targets))
            masks = list(words.unbind())
        spoiled = {}
        for i, request in enumerate(requests):
            # a matcher in error lets the end of the text through: whoever does not ask takes half of one for the whole
            if request.matcher is not None and request.matcher.is_stopped() and request.matcher.is_error():
                spoiled[i] = spoiled_by(request)
        return masks, spoiled

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _compile(self, structure: Structure) -> LLMatcher:
        if self._grammars is None:
            # imported and built when they are first needed: that takes a second
            from llguidance import LLExecutor

            from engine.grammar import Grammars

            self._executor = LLExecutor(self._num_threads)
            self._grammars = Grammars(
                self._tokenizer_json(), vocab_size=self._vocab_size, eos_token_ids=self._eos_token_ids
            )
        return self._grammars.compile(structure)


def spoiled_by(request: Request) -> InvalidRequest:
    """Why the grammar of a request cannot be followed any further. It is never answered without one."""
    from engine.grammar import why

    assert request.params.structure is not None
    assert request.matcher is not None
    param = request.params.structure.param
    return InvalidRequest(
        f"{param}: too complex to be enforced beyond token {request.num_output_tokens} of the answer: "
        f"{why(request.matcher)}; ask for something simpler",
        param=param,
        code="grammar_too_complex",
    )


def _nbytes(structure: Structure) -> int:
    return structure.nbytes or _UNMEASURED_NBYTES + _NBYTES_PER_CHAR * len(structure.source)
