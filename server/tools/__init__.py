"""Ways to call functions, of which a model's chat template says which is its own. The first that it matches counts."""

from __future__ import annotations

from server.tools.deepseek import DeepSeek, DeepSeekV31
from server.tools.family import ToolFamily
from server.tools.hermes import Hermes
from server.tools.llama import Llama
from server.tools.mistral import MistralArgs, MistralList
from server.tools.prompted import Prompted
from server.tools.qwen_coder import QwenCoder

_ALL: tuple[ToolFamily, ...] = (
    QwenCoder(),
    Hermes(),
    MistralArgs(),
    MistralList(),
    DeepSeekV31(),
    DeepSeek(),
    Llama(),
)
FAMILIES = {family.name: family for family in _ALL}
PROMPTED: ToolFamily = Prompted()


def family_of(template: str, *, renders_tools: bool) -> ToolFamily:
    """`renders_tools`: the template has `tools`; otherwise what it says of calls is only how to read old ones."""
    if not renders_tools:
        return PROMPTED
    return next((family for family in FAMILIES.values() if family.is_of(template)), PROMPTED)
