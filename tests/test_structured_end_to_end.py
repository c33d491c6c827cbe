"""Tools and structured output as a user has them: the command, the bundled model, the openai client."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from tests.test_end_to_end import QUESTION, client, server  # noqa: F401  # fixtures

ADD: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"enum": [1, 2, 3]}, "b": {"enum": [1, 2, 3]}},
            "required": ["a", "b"],
        },
    },
}


class Capital(BaseModel):
    city: Literal["Paris", "Rome"]
    is_large: bool


def test_a_required_call_is_made_streamed_or_not(client: openai.OpenAI):  # noqa: F811
    arguments: dict[str, Any] = {
        "model": "demo", "messages": QUESTION, "tools": [ADD], "temperature": 0, "max_tokens": 60,
        "tool_choice": {"type": "function", "function": {"name": "add"}},
    }  # fmt: skip
    whole = client.chat.completions.create(**arguments).choices[0]
    (call,) = whole.message.tool_calls or []
    assert whole.finish_reason == "tool_calls"
    assert set(json.loads(call.function.arguments)) == {"a", "b"}
    chunks = list(client.chat.completions.create(**arguments, stream=True))
    told = [piece for chunk in chunks for piece in chunk.choices[0].delta.tool_calls or []]
    assert (told[0].function.name, bool(told[0].id)) == ("add", True)
    assert "".join(piece.function.arguments for piece in told) == call.function.arguments


def test_an_answer_is_parsed_into_a_model(client: openai.OpenAI):  # noqa: F811
    answer = client.chat.completions.parse(
        model="demo", messages=QUESTION, response_format=Capital, temperature=0, max_tokens=60
    )
    assert isinstance(answer.choices[0].message.parsed, Capital)


def test_a_schema_that_cannot_be_enforced_is_a_bad_request_that_names_the_keyword(client: openai.OpenAI):  # noqa: F811
    format: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"uniqueItems": True}}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="demo", messages=QUESTION, response_format=format)
    assert caught.value.param == "response_format.json_schema.schema"
    assert "'uniqueItems'" in caught.value.message
