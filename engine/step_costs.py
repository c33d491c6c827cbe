"""What a step costs by what is in it, learned as steps run. Plain numbers."""

from __future__ import annotations

import numpy as np

_MEMORY = 0.98  # of what was learned, from step to step
_RIDGE = 1e-3  # of the mean square of each feature: with steps that are all alike, the parts cannot be told apart
_MIN_STEPS = 8


class StepCosts:
    """seconds = a + b x decoding requests + s, if there are prompt tokens, + p x prompt tokens; none is negative.

    Least squares with forgetting. `s` is what streaming the experts of any prompt costs, `p` what its tokens do.
    """

    def __init__(self) -> None:
        self._moments = np.zeros((4, 4))
        self._products = np.zeros(4)
        self._num_steps = self._num_chunks = 0
        self._found = np.zeros(4)

    @property
    def knows_decoding(self) -> bool:
        return self._num_steps >= _MIN_STEPS

    @property
    def knows_prompts(self) -> bool:
        return self._num_chunks >= _MIN_STEPS

    @property
    def stream_s(self) -> float:
        """What any prompt chunk costs beside its tokens."""
        return float(self._found[2])

    @property
    def prompt_token_s(self) -> float:
        return float(self._found[3])

    def add(self, num_decoding: int, num_prompt_tokens: int, seconds: float) -> None:
        """A step was measured."""
        x = np.asarray((1.0, num_decoding, float(num_prompt_tokens > 0), num_prompt_tokens))
        self._moments *= _MEMORY
        self._moments += np.outer(x, x)
        self._products *= _MEMORY
        self._products += x * seconds
        self._num_steps += 1
        self._num_chunks += num_prompt_tokens > 0
        self._found = self._fit()

    def seconds(self, num_decoding: int, num_prompt_tokens: int) -> float:
        """Of a step with so many requests that decode and so many tokens of prompts."""
        x = np.asarray((1.0, num_decoding, float(num_prompt_tokens > 0), num_prompt_tokens))
        return float(x @ self._found)

    def _fit(self) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """With what would be negative taken out, one after the other."""
        free = np.diagonal(self._moments) > 0
        while True:
            at = np.flatnonzero(free)
            found = np.zeros(4)
            moments = self._moments[np.ix_(at, at)]
            scale = np.diag(np.diagonal(moments)) * _RIDGE
            found[at] = np.linalg.solve(moments + scale, self._products[at])
            if (found >= 0).all():
                return found
            free[int(found.argmin())] = False
