"""What a cache of experts is likely to hit, before anything is known of a model's routing."""

from __future__ import annotations

import numpy as np

# What `segment` hits beyond chance, (hits - share) / (1 - share), by slots over one token's experts: the mean over
# gpt-oss-20b, DeepSeek-V2-Lite, granite-3.0-1b and Qwen1.5-MoE (docs/cache.md)
_MULTIPLES = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0)
_BEYOND_CHANCE = (0.0, 0.12, 0.30, 0.48, 0.57, 0.66, 0.75)


def expected_hit_rate(num_slots: int, num_experts: int, per_token: int) -> float:
    """Of `num_experts` in all layers together, of which a token uses `per_token`; as of published models."""
    if num_slots >= num_experts:
        return 1.0
    share = num_slots / num_experts
    return share + (1.0 - share) * float(np.interp(num_slots / per_token, _MULTIPLES, _BEYOND_CHANCE))
