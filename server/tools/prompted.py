"""Models whose template knows no tools, or a format that is not known here: a system message tells them Hermes' way."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from server.tools.hermes import CLOSE, OPEN, Hermes

_TOLD = (
    "You can call functions to help the user. Their signatures, as JSON:\n<tools>\n{tools}\n</tools>\n"
    "To call one, write its name and arguments as JSON within marks, and nothing else:\n"
    '{open}\n{{"name": "the function\'s name", "arguments": {{...}}}}\n{close}'
)


class Prompted(Hermes):
    name = "prompted"

    def is_of(self, template: str) -> bool:
        return True


def with_tools_told(messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages in roles and contents that every template has, with the tools in the system message."""
    told: list[dict[str, Any]] = []
    if tools:
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        told.append({"role": "system", "content": _TOLD.format(tools=listed, open=OPEN, close=CLOSE)})
    for message in messages:
        if message["role"] == "system" and len(told) == 1 and told[0]["role"] == "system":
            told[0] = {**message, "content": f"{message['content']}\n\n{told[0]['content']}"}
        elif message["role"] == "tool":
            response = f"<tool_response>\n{message['content']}\n</tool_response>"
            if told and told[-1].get("is_response"):
                told[-1]["content"] += f"\n{response}"
            else:
                told.append({"role": "user", "content": response, "is_response": True})
        elif calls := message.get("tool_calls"):
            written = [f"{OPEN}\n{_call(call)}\n{CLOSE}" for call in calls]
            content = "\n".join([*([message["content"]] if message.get("content") else []), *written])
            told.append({"role": "assistant", "content": content})
        else:
            told.append(message)
    return [{key: value for key, value in message.items() if key != "is_response"} for message in told]


def _call(call: dict[str, Any]) -> str:
    function = call["function"]
    return json.dumps({"name": function["name"], "arguments": function["arguments"]}, ensure_ascii=False)
