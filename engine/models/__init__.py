"""Model families: one family, one file, one line in the table. Each turns a config.json into a `ModelSpec`."""

from collections.abc import Callable

from engine.models.llama_moe import llama, llama_moe
from engine.models.mixtral import mixtral
from engine.models.olmoe import olmoe
from engine.models.qwen3_moe import qwen3_moe
from engine.models.spec import Config, ModelSpec

FAMILIES: dict[str, Callable[[Config], ModelSpec]] = {
    "foregate_llama_moe": llama_moe,
    "llama": llama,
    "mixtral": mixtral,
    "olmoe": olmoe,
    "qwen3_moe": qwen3_moe,
}
