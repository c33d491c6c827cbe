"""Answers to prompts, by the dense model (what a refactored chat model must stay good at) or by the refactored one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from engine.refactor.dense import DenseLayer, Rotary
from engine.refactor.healing import healed
from engine.refactor.perplexity import ffn
from engine.refactor.plan import RefactorPlan, SplitSettings
from engine.refactor.source import DenseSource
from kernels.reference import rms_norm, rope


class ChatWriter:
    """Holds the model (refactored, if there is a plan) in float32, a few billion weights at most; continues prompts."""

    def __init__(self, source: DenseSource, plan: RefactorPlan | None = None, max_len: int = 1024) -> None:
        self._config = source.config
        source = healed(source, plan.healing if plan is not None else None)
        num_layers = self._config.num_hidden_layers
        self._plans = [None] * num_layers if plan is None else plan.by_layer(num_layers)
        self._settings = SplitSettings() if plan is None else plan.settings
        self._layers = [DenseLayer.load(source, i) for i in range(self._config.num_hidden_layers)]
        self._embedding = source.tensor("model.embed_tokens.weight")
        self._norm = source.tensor("model.norm.weight")
        tied = self._config.tie_word_embeddings
        self._head = self._embedding if tied else source.tensor("lm_head.weight")
        self._rotary = Rotary.build(self._config, max_len)

    @torch.inference_mode()
    def write(
        self,
        prompts: Sequence[Sequence[int]],
        num_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 32,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[list[int]]:
        """Answers of up to num_tokens ids, an ending eos included, in the prompts' order; temperature 0: greedy."""
        generator = torch.Generator().manual_seed(seed)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # equal lengths together: less padding
        answers: list[list[int]] = [[] for _ in prompts]
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            written = self._continue([prompts[i] for i in batch], num_tokens, temperature, generator)
            for i, answer in zip(batch, written, strict=True):
                answers[i] = answer
            progress(min(start + batch_size, len(order)), len(order))
        return answers

    def _continue(
        self, prompts: list[Sequence[int]], num_tokens: int, temperature: float, generator: torch.Generator
    ) -> list[list[int]]:
        width = max(map(len, prompts))
        padding = torch.tensor([width - len(p) for p in prompts])  # on the left, so that all rows end together
        tokens = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
        shape = (len(prompts), self._config.num_key_value_heads, width + num_tokens, self._config.head_dim)
        caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in self._layers]
        answers: list[list[int]] = [[] for _ in prompts]
        running = set(range(len(prompts)))
        past = 0
        for _ in range(num_tokens):
            logits = self._forward(tokens, past, padding, caches)  # [B, vocabulary]
            past += tokens.shape[1]
            if temperature == 0:
                chosen = logits.argmax(-1)
            else:
                chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
            for row in sorted(running):
                answers[row].append(int(chosen[row]))
                if answers[row][-1] in self._config.eos_token_ids:
                    running.discard(row)
            if not running:
                break
            tokens = chosen[:, None]
        return answers

    def _forward(self, tokens: Tensor, past: int, padding: Tensor, caches: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Tokens [B, n] at columns past..past+n of the left-padded batch -> logits of the last column."""
        config, (num_seqs, length) = self._config, tokens.shape
        end = past + length
        columns = torch.arange(past, end)
        positions = (columns - padding[:, None]).clamp(min=0).flatten()
        cos, sin = self._rotary.cos[positions], self._rotary.sin[positions]
        key_columns = torch.arange(end)
        visible = (key_columns <= columns[:, None]) & (key_columns >= padding[:, None, None])  # [B, n, end]
        visible |= key_columns == columns[:, None]  # a padding row sees itself: softmax over nothing is NaN
        hidden = F.embedding(tokens, self._embedding)
        for index, (layer, (keys, values)) in enumerate(zip(self._layers, caches, strict=True)):
            x = rms_norm(hidden, layer.input_norm, config.rms_norm_eps).flatten(0, 1)
            q = rope(F.linear(x, layer.q).unflatten(-1, (-1, config.head_dim)), cos, sin)
            k = rope(F.linear(x, layer.k).unflatten(-1, (-1, config.head_dim)), cos, sin)
            v = F.linear(x, layer.v).unflatten(-1, (-1, config.head_dim))
            q, k, v = (t.unflatten(0, (num_seqs, length)).transpose(1, 2) for t in (q, k, v))
            keys[:, :, past:end], values[:, :, past:end] = k, v
            attended = F.scaled_dot_product_attention(
                q, keys[:, :, :end], values[:, :, :end], attn_mask=visible[:, None], enable_gqa=True
            )
            hidden = hidden + F.linear(attended.transpose(1, 2).flatten(2), layer.o)
            x = rms_norm(hidden, layer.post_norm, config.rms_norm_eps)
            hidden = hidden + ffn(x, layer, self._plans[index], self._settings)
        return F.linear(rms_norm(hidden[:, -1], self._norm, config.rms_norm_eps), self._head)
