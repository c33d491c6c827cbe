"""The tokens of one step: drawn freely first, and again from what a grammar allows where it does not take them.

That is how the masked distribution is drawn from: a token that is allowed comes with its own probability p, or, after
one that is not, with (1 - Z) p / Z, if Z is what all that are allowed make up; together p / Z. A mask costs up to a
millisecond, and most tokens of a structured answer are allowed without one being looked at.

`top_k`, `top_p` and `min_p` so cut the model's own distribution first, and the allowed tokens' only where the grammar
does not take what is drawn from that: p / F + (1 - A) p / M, if F and M are what is left of the two, and A is the
allowed part of the first.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from engine.constraints import Constraints
from engine.request import Request
from engine.sampler import SampledToken, Sampler

Chosen = SampledToken | Exception  # an exception fails its request alone


def choose_tokens(
    logits: Tensor, requests: Sequence[Request], sampler: Sampler, constraints: Constraints
) -> list[Chosen]:
    """float32 logits [n, V], one row a request, not changed -> what is chosen, or why the request fails, for each."""
    chosen = _choose(logits, requests, list(range(len(requests))), sampler, None)
    refused = [i for i, request in enumerate(requests) if not _is_settled(request, chosen[i])]
    masks, spoiled = constraints.masks(requests, refused)
    chosen |= _choose(logits, requests, refused, sampler, masks)
    return [spoiled.get(i, chosen[i]) for i in range(len(requests))]


def _is_settled(request: Request, chosen: Chosen) -> bool:
    """Whether there is no grammar, or it takes what was drawn freely, or nothing can be drawn."""
    if request.matcher is None or not isinstance(chosen, SampledToken):
        return True
    return bool(request.matcher.validate_tokens([chosen.token_id]) == 1)


def _choose(
    logits: Tensor, requests: Sequence[Request], which: list[int], sampler: Sampler, masks: Sequence[Tensor] | None
) -> dict[int, Chosen]:
    """Of some of the rows; `masks` are theirs."""
    if not which:
        return {}
    rows = logits.unbind() if len(which) == len(requests) else [logits[i] for i in which]
    of = [requests[i] for i in which]
    try:
        return dict(zip(which, sampler.sample(rows, of, masks), strict=True))
    except Exception:
        alone: dict[int, Chosen] = {}
        for at, i in enumerate(which):
            try:
                (alone[i],) = sampler.sample([rows[at]], [of[at]], None if masks is None else [masks[at]])
            except Exception as error:
                alone[i] = error
        return alone
