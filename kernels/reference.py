"""The plain torch truth of every kernel. Written to be read, not to be fast; tests compare kernels with this alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

SPAN = 256  # inputs of a row that share a scale where activations are rounded to 8 bits
OUTLIER = 6.0  # times a span's root mean square: beyond it dense layers round to 16
BLOCK_SIZE = 16  # tokens in a block of the KV cache


def round_activations(x: Tensor, format: str, *, is_dense: bool = False) -> Tensor:
    """x [..., K] as products of this weight format see it, float32.

    float32: as it is; bf16: rounded to bf16; int8, int4: 8 bits per row and span of 256, scale = largest / 127. In
    dense layers a span whose largest is above OUTLIER times its root mean square has 16 bits, 256 steps for one.
    """
    if format == "float32":
        return x.float()
    if format == "bf16":
        return x.to(torch.bfloat16).float()
    num_inputs = x.shape[-1]
    spans: Tensor = F.pad(x.float(), (0, -num_inputs % SPAN)).unflatten(-1, (-1, SPAN))
    largest = spans.abs().amax(-1, keepdim=True)
    steps = torch.full_like(largest, 127.0)
    if is_dense:
        widths = F.pad(torch.ones(num_inputs), (0, -num_inputs % SPAN)).view(-1, SPAN).sum(-1, keepdim=True)
        is_outlier = largest.square() * widths > OUTLIER**2 * spans.square().sum(-1, keepdim=True)
        steps = torch.where(is_outlier, 127.0 * 256.0, steps)
    q = torch.where(largest > 0, spans * (steps / largest), 0.0).round_()
    return (q * (largest / steps)).flatten(-2)[..., :num_inputs]


def quantise_rows(x: Tensor, *, is_dense: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """x [n, K] -> int8 high [n, K], int8 low [n, K], scales [n, spans]: the parts of what `round_activations` gives.

    An input is (high + low / 256) * scale; low is zero but in spans with 16 bits.
    """
    rounded = round_activations(x, "int8", is_dense=is_dense)
    scales = F.pad(x.float(), (0, -x.shape[1] % SPAN)).unflatten(-1, (-1, SPAN)).abs().amax(-1) / 127.0
    steps = scales.repeat_interleave(SPAN, -1)[:, : x.shape[1]] / 256.0
    whole = torch.where(steps > 0, rounded / steps, 0.0).round().int()
    high = (whole + 128).div(256, rounding_mode="floor")
    return high.to(torch.int8), (whole - 256 * high).to(torch.int8), scales


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, format: str) -> Tensor:
    """x [n, K], weight float32 [N, K] as unpacked from `format` -> float32 [n, N]."""
    return F.linear(round_activations(x, format, is_dense=True), weight, bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., H] normalised by its root mean square, times weight [H] (Zhang, Sennrich 2019)."""
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [T, heads, D] by cos, sin [T, D] in the half-split layout of Llama checkpoints (Su et al. 2021)."""
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos[:, None, :] + rotated * sin[:, None, :]


def append_kv(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
    """Write key, value [T, kv_heads, D] to token slots [T] (block * 16 + offset) of the paged cache, in place.

    keys [blocks, kv_heads, D, 16], values [blocks, kv_heads, 16, D].
    """
    blocks, offsets = slots.long() // BLOCK_SIZE, slots.long() % BLOCK_SIZE
    keys[blocks, :, :, offsets] = key.to(keys.dtype)
    values[blocks, :, offsets] = value.to(values.dtype)


def paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    row_begin: list[int],
    context: list[int],
    blocks: list[Tensor],
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Causal grouped-query attention of any mix of chunks and decode rows.

    query [T, heads, D]; keys, values as in `append_kv`; sequence s owns the query rows row_begin[s]..row_begin[s + 1],
    which are the last of its context[s] tokens, in the blocks blocks[s]; with a window each sees only so many tokens,
    itself the last of them. Returns [T, heads, D].
    """
    num_heads, head_dim = query.shape[1:]
    num_kv_heads = keys.shape[1]
    out = torch.empty_like(query)
    for s, length in enumerate(context):
        start, end = row_begin[s], row_begin[s + 1]
        at = blocks[s].long()
        k = keys[at].permute(1, 0, 3, 2).reshape(num_kv_heads, -1, head_dim)[:, :length].float()
        v = values[at].transpose(0, 1).reshape(num_kv_heads, -1, head_dim)[:, :length].float()
        q = query[start:end].transpose(0, 1)  # [heads, rows, D]
        num_rows = end - start
        q = q.reshape(num_kv_heads, num_heads // num_kv_heads * num_rows, head_dim)
        scores = (q @ k.transpose(1, 2)) * scale  # [kv_heads, group * rows, context]
        if num_rows > 1 or window is not None:
            hidden = torch.ones(num_rows, length, dtype=torch.bool).triu(length - num_rows + 1)
            if window is not None:
                hidden |= torch.ones(num_rows, length, dtype=torch.bool).tril(length - num_rows - window)
            scores = scores.view(num_kv_heads, -1, num_rows, length).masked_fill(hidden, float("-inf"))
            scores = scores.view(num_kv_heads, -1, length)
        attended = scores.softmax(-1) @ v
        out[start:end] = attended.view(num_heads, num_rows, head_dim).transpose(0, 1)
    return out


def route(logits: Tensor, num_active: int, routing: str) -> tuple[Tensor, Tensor]:
    """Router logits [T, E] -> (ids [T, k] int32, weights [T, k] float32), best first.

    softmax: over all experts, then the k largest as they are (OLMoE); softmax_renormalised: divided by their sum
    (Mixtral, Qwen3); unweighted: the k largest logits, each with weight 1 (an FFN that was split into experts).
    """
    if routing == "unweighted":
        ids = logits.topk(num_active, dim=-1).indices
        return ids.int(), torch.ones(ids.shape)
    weights, ids = logits.softmax(-1).topk(num_active, dim=-1)
    if routing == "softmax_renormalised":
        weights = weights / weights.sum(-1, keepdim=True)
    return ids.int(), weights


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, format: str) -> Tensor:
    """x [n, H], gate and up [I, H], down [H, I] -> silu(x gate^T) * (x up^T) down^T [n, H] (Shazeer 2020)."""
    return expert_down(expert_gate_up(x, gate, up, format), down, format)


def group_by_expert(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """ids [T, k] -> begin int32 [experts + 1], positions int32 [T * k] (token * k + rank) by expert, then ascending."""
    flat = ids.flatten().long()
    begin = F.pad(torch.bincount(flat, minlength=num_experts).cumsum(0), (1, 0))
    return begin.int(), flat.argsort(stable=True).int()


def cut_tiles(begin: Tensor, chosen: Tensor, rows_a_tile: int) -> Tensor:
    """Segment s has rows begin[s]..begin[s + 1] -> int32 [tiles, 3] (i, first row, end row) of the chosen[i]."""
    tiles = []
    for i, segment in enumerate(chosen.tolist()):
        end = int(begin[segment + 1])
        tiles += [(i, row, min(row + rows_a_tile, end)) for row in range(int(begin[segment]), end, rows_a_tile)]
    return torch.tensor(tiles, dtype=torch.int32).view(-1, 3)


def expert_gate_up(x: Tensor, gate: Tensor, up: Tensor, format: str) -> Tensor:
    """x [n, H] of one expert's tokens, gate and up [I, H] -> silu(x gate^T) * (x up^T) [n, I]."""
    x = round_activations(x, format)
    return F.silu(F.linear(x, gate)) * F.linear(x, up)


def expert_down(x: Tensor, down: Tensor, format: str) -> Tensor:
    """x [n, I] of one expert's tokens, down [H, I] -> [n, H]."""
    return F.linear(round_activations(x, format), down)


def combine(outputs: Tensor, weights: Tensor) -> Tensor:
    """outputs [T, k, H] of each (token, expert) in routing order, weights [T, k] -> [T, H].

    Added in routing order, one after the other, whatever order the experts were computed in.
    """
    total = outputs[:, 0] * weights[:, :1]
    for i in range(1, outputs.shape[1]):
        total = total + outputs[:, i] * weights[:, i : i + 1]
    return total


def choose(logits: Tensor, uniform: float, temperature: float, top_k: int, top_p: float, min_p: float) -> int:
    """logits float [V] -> the token that a number in [0, 1) draws; at temperature 0 the likeliest, of equals the first.

    top_k (0: all), then of these the best that make up top_p, then those that have min_p of the best's probability.
    By inversion of the cumulative distribution in the order of the tokens' numbers; of equals the lower are better.
    """
    if temperature == 0:
        return int((logits == logits.max()).nonzero()[0])
    values, ids = (logits.double() / temperature).sort(descending=True, stable=True)
    probs = values.softmax(-1)
    if top_k:
        probs[top_k:] = 0.0
    if top_p < 1.0:
        probs = torch.where(probs.cumsum(-1) - probs < top_p * probs.sum(), probs, 0.0)  # the one that crosses it stays
    probs = torch.where(probs >= min_p * probs[0], probs, 0.0)
    cumulative = torch.zeros_like(probs).scatter(0, ids, probs).cumsum(-1)
    token = int(torch.searchsorted(cumulative, uniform * float(cumulative[-1]), right=True))
    return min(token, int(ids[probs > 0].max()))  # rounding at the very end
