"""Tools through HTTP: what reaches the template and the engine, and what a client reads, streamed or not."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import openai
import pytest

from engine.messages import AddedToken
from tests.server.fake_engine import FakeEngine, Script, Token
from tests.server.test_chat import events

URL = "/v1/chat/completions"
HELLO: list[Any] = [{"role": "user", "content": "hi"}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
STOP: dict[str, Any] = {"type": "function", "function": {"name": "stop"}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def spoken(text: str, **script: Any) -> Script:
    """The text in tokens of one to four characters."""
    rng, tokens = random.Random(text), []
    while text:
        length = rng.randrange(1, 5)
        tokens.append(Token(text[:length]))
        text = text[length:]
    return Script(tokens, **script)


@pytest.fixture
def engine() -> FakeEngine:
    """A model whose template knows tools, in Hermes' way."""
    engine = FakeEngine(spoken(CALL))
    engine.model = msgspec.structs.replace(
        engine.model,
        max_model_len=4096,
        chat_template="{{ tools }} <tool_call>",
        template_variables=frozenset({"messages", "tools", "add_generation_prompt"}),
    )
    return engine


def without_tools(engine: FakeEngine) -> None:
    engine.model = msgspec.structs.replace(
        engine.model, chat_template="{{ messages }}", template_variables=frozenset({"messages"})
    )


async def ask(client: httpx.AsyncClient, **fields: Any) -> Any:
    response = await client.post(URL, json={"messages": HELLO, "tools": [WEATHER, STOP], **fields})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


async def test_a_call_in_the_text_is_a_tool_call(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    choice = await ask(client)
    (call,) = choice["message"].pop("tool_calls")
    assert choice["message"] == {"role": "assistant", "content": None, "refusal": None, "annotations": []}
    assert choice["finish_reason"] == "tool_calls"
    assert call.pop("id").startswith("call_")
    assert call == {"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    # auto: only read, nothing enforced
    assert engine.seen[0][2].structure is None
    assert engine.rendering["tools"][0] == WEATHER
    assert engine.rendering["tools"][1]["function"]["parameters"] == {"type": "object", "properties": {}}
    assert engine.messages == HELLO


@pytest.mark.parametrize("choice", ["auto", "required"])
async def test_a_streamed_call_has_its_name_first_and_then_its_arguments(
    client: httpx.AsyncClient, engine: FakeEngine, choice: str
) -> None:
    engine.script = spoken(f"Let me see.\n{CALL}\n{CALL.replace('Paris', 'Rome')}" if choice == "auto" else CALL)
    body = {"messages": HELLO, "tools": [WEATHER], "tool_choice": choice, "stream": True}
    chunks = events(await client.post(URL, json=body))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content") or "" for delta in deltas) == ("Let me see." if choice == "auto" else "")
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    firsts = [call for call in calls if "id" in call]
    assert [call["index"] for call in firsts] == list(range(len(firsts)))
    assert all(
        call["function"] == {"name": "get_weather", "arguments": ""} and call["type"] == "function" for call in firsts
    )
    assert all(set(call) == {"index", "function"} and set(call["function"]) == {"arguments"}
               for call in calls if "id" not in call)  # fmt: skip
    arguments = ["".join(c["function"]["arguments"] for c in calls if c["index"] == i) for i in range(len(firsts))]
    cities = ["Paris", "Rome"] if choice == "auto" else ["Paris"]
    assert [json.loads(text) for text in arguments] == [{"city": city} for city in cities]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    if choice == "required":  # as they come
        assert len(calls) > 4


async def test_what_is_no_call_is_content(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for text in ('<tool_call>\n{"name": "get_weather", "argu', "I know no tools.", CALL.replace("get_weather", "x")):
        engine.script = spoken(text)
        choice = await ask(client)
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")
        assert "tool_calls" not in choice["message"]
        chunks = events(await client.post(URL, json={"messages": HELLO, "tools": [WEATHER], "stream": True}))
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text


async def test_without_tools_or_with_none_chosen_text_is_text(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for fields in ({"tools": None}, {"tools": []}, {"tool_choice": "none"}):
        choice = await ask(client, **fields)
        assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop")
        assert "tools" not in engine.rendering
        assert engine.seen[-1][2].structure is None


async def test_required_and_named_calls_are_enforced(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    for choice, names in (("required", ["get_weather", "stop"]), (named, ["get_weather"])):
        assert (await ask(client, tool_choice=choice))["finish_reason"] == "tool_calls"
        structure = engine.seen[-1][2].structure
        assert structure is not None
        assert structure.kind == "grammar"
        assert [name for name in ("get_weather", "stop") if f'\\"{name}\\"' in structure.source] == names
        assert "city" in structure.source
        assert len(engine.rendering["tools"]) == 2
        assert "TEXT" not in structure.source


async def test_strict_tools_and_one_call_at_most_are_enforced_where_a_call_is_free(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    await ask(client, tools=[strict, STOP])
    structure = engine.seen[-1][2].structure
    assert structure is not None
    assert "city" in structure.source
    assert "TEXT" in structure.source
    await ask(client, parallel_tool_calls=False)
    structure = engine.seen[-1][2].structure
    assert structure is not None
    assert "city" not in structure.source
    assert "call)*" not in structure.source


async def test_marks_that_are_special_tokens_are_read_and_other_special_tokens_are_left_out(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    added = {
        "<tool_call>": AddedToken(200, True),
        "</tool_call>": AddedToken(201, True),
        "<pad>": AddedToken(202, True),
    }
    engine.model = msgspec.structs.replace(engine.model, added_tokens=added, eos_token_ids=(202,))
    engine.script = Script([Token("Hm"), Token("<pad>"), Token("!"), Token("<tool_call>"), *spoken(CALL[11:]).tokens])
    choice = await ask(client, tool_choice="required")
    assert choice["message"]["content"] == "Hm!"
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "get_weather"
    params = engine.seen[-1][2]
    assert params.structure is not None
    assert "<[200]>" in params.structure.source
    assert "<[201]>" in params.structure.source
    assert params.skip_special_tokens is False


async def test_a_conversation_with_calls_goes_through_the_template(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "sunny"}]},
    ]
    await ask(client, messages=messages)
    assert engine.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"}
    assert engine.messages[2] == {"role": "tool", "content": "sunny", "tool_call_id": "c1"}
    # and without a template for them, in roles that every model knows
    without_tools(engine)
    await ask(client, messages=messages)
    assert [message["role"] for message in engine.messages] == ["system", "user", "assistant", "user"]
    assert "get_weather" in engine.messages[0]["content"]
    assert engine.messages[2]["content"] == CALL
    assert "sunny" in engine.messages[3]["content"]
    assert "tools" not in engine.rendering


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": "x"}, "tools"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "x" * 65}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 5}}]}, "tools[0].function.parameters"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)]}, "tools"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"parallel_tool_calls": False, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"functions": [{}]}, "functions"),
    ],
)
async def test_bad_tools_are_refused_at_their_place(
    client: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any], param: str
) -> None:
    response = await client.post(URL, json={"messages": HELLO, "tools": [WEATHER], **fields})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith(param)
    assert engine.seen == []


@pytest.mark.parametrize("choice", ["required", "auto"])
async def test_a_tools_schema_that_cannot_be_enforced_is_refused_where_it_is_to_be(
    client: httpx.AsyncClient, engine: FakeEngine, choice: str
) -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    response = await client.post(URL, json={"messages": HELLO, "tools": [WEATHER, tool], "tool_choice": choice})
    if choice == "auto":
        assert response.status_code == 200
        return
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "tools[1].function.parameters")
    assert "'uniqueItems'" in error["message"]


async def test_a_model_of_a_format_that_cannot_be_read_is_refused_tools(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.model = msgspec.structs.replace(engine.model, chat_template="{{ tools }} <|channel|>")
    response = await client.post(URL, json={"messages": HELLO, "tools": [WEATHER]})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")


async def test_json_by_a_schema_or_a_call_can_be_the_choice(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}}
    await ask(client, response_format=format)
    structure = engine.seen[-1][2].structure
    assert structure is not None
    assert "start: begun | answer" in structure.source
    assert '"integer"' in structure.source


@pytest.fixture
async def sdk(connect: Callable[..., httpx.AsyncClient]) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(api_key="k", base_url="http://test/v1", http_client=connect(), max_retries=0)


async def test_the_openai_client_puts_a_streamed_call_together(sdk: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.script = spoken("First.\n" + CALL)
    async with sdk.chat.completions.stream(model="fake", messages=HELLO, tools=[WEATHER]) as stream:  # type: ignore[list-item]
        async for _ in stream:
            pass
        final = await stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls or []
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    assert final.choices[0].message.content == "First."
    assert final.choices[0].finish_reason == "tool_calls"
