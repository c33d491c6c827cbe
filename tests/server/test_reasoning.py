"""Thoughts: told apart from the answer, streamed or not, and chosen by what the template takes."""

from __future__ import annotations

from typing import Any

import httpx
import msgspec
import pytest

from engine.messages import AddedToken
from server.reasoning import Thinking, ThoughtParser, thinking_of
from server.tools.events import Content, PlainText, Reasoning
from server.tools.family import Words
from tests.server.fake_engine import FakeEngine
from tests.server.test_chat import events
from tests.server.test_tools import CALL, WEATHER, spoken
from tests.server.tools.test_families import cuts

URL = "/v1/chat/completions"
HELLO: list[Any] = [{"role": "user", "content": "hi"}]
THINKING = Thinking("<think>", "</think>")


@pytest.fixture
def engine() -> FakeEngine:
    engine = FakeEngine(spoken("<think>\nHm, well.\n</think>\n\nYes."))
    engine.model = msgspec.structs.replace(
        engine.model,
        max_model_len=4096,
        chat_template="{{ tools }} <tool_call> <think></think> {{ enable_thinking }}",
        template_variables=frozenset({"messages", "tools", "enable_thinking", "add_generation_prompt"}),
    )
    return engine


@pytest.mark.parametrize(
    ("text", "has_begun", "reasoning", "content"),
    [
        ("<think>\nHm <b>.\n</think>\n\nYes.\n", False, "Hm <b>.", "Yes.\n"),
        ("Hm.\n\nWell.</think>Yes.", True, "Hm.\n\nWell.", "Yes."),
        ("<think>Hm.</think>Yes.", True, "Hm.", "Yes."),
        ("\n</think>\n\nYes.", True, "", "Yes."),
        ("Still thinking </thi", True, "Still thinking </thi", ""),
        ("<think>Still", False, "Still", ""),
        ("  No thought, <think> though", False, "", "  No thought, <think> though"),
        ("<thin air", False, "", "<thin air"),
        ("<think>a</think>b</think>c", False, "a", "b</think>c"),
        ("", True, "", ""),
    ],
)
def test_a_thought_is_told_apart_however_it_is_cut(text: str, has_begun: bool, reasoning: str, content: str) -> None:
    for pieces in cuts(text) if text else [[]]:
        parser = ThoughtParser(Thinking("<think>", "</think>", has_begun=has_begun), PlainText())
        told = [event for piece in pieces for event in parser.push(piece)] + parser.finish()
        assert "".join(event.text for event in told if isinstance(event, Reasoning)) == reasoning, pieces
        assert "".join(event.text for event in told if isinstance(event, Content)) == content, pieces


def test_tags_are_known_by_the_template_and_the_prompts_end_says_where_it_stands():
    assert thinking_of("a <think> b </think>") == THINKING
    assert thinking_of("[THINK][/THINK]") == Thinking("[THINK]", "[/THINK]")
    assert thinking_of("no") is thinking_of(None) is None
    assert THINKING.after("<assistant>\n<think>\n").has_begun
    assert not THINKING.after("<think>x</think> <assistant>").has_begun
    assert THINKING.after("<think>x</think> <assistant>").may_begin
    assert not THINKING.after("<assistant><think>\n\n</think>\n\n").may_begin


def test_before_a_structured_text_a_thought_may_or_must_come():
    words = Words({})
    assert THINKING.prelude(words).startswith('prelude: ("<think>" thought GAP)?')
    assert THINKING.after("<think>").prelude(words).startswith("prelude: thought GAP")
    assert THINKING.after("<think></think>").prelude(words) == ""
    tokens = Words({"</think>": AddedToken(7, False), "<think>": AddedToken(6, False)})
    assert "<[7]>" in THINKING.prelude(tokens)
    assert "<[6]>" in THINKING.prelude(tokens)


async def test_reasoning_has_both_names_and_is_no_content(client: httpx.AsyncClient) -> None:
    choice = (await client.post(URL, json={"messages": HELLO})).json()["choices"][0]
    message = choice["message"]
    assert (message["content"], message["reasoning"], message["reasoning_content"]) == (
        "Yes.",
        "Hm, well.",
        "Hm, well.",
    )
    chunks = events(await client.post(URL, json={"messages": HELLO, "stream": True}))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    for name in ("reasoning", "reasoning_content"):
        assert "".join(delta.get(name, "") for delta in deltas) == "Hm, well."
    assert "".join(delta.get("content", "") for delta in deltas) == "Yes."
    assert not any(delta.get("content") and "reasoning" in delta for delta in deltas)


async def test_a_thought_that_the_prompt_began_and_max_tokens_cut_is_reasoning(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.prompt_end = "<think>\n"
    engine.script = spoken("So much to think about")
    choice = (await client.post(URL, json={"messages": HELLO, "max_tokens": 3})).json()["choices"][0]
    assert choice["message"]["content"] is None
    assert "So much to think about".startswith(choice["message"]["reasoning"])
    assert choice["finish_reason"] == "length"


async def test_a_call_after_a_thought_is_a_call_and_one_within_it_is_not(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.script = spoken(f"<think>{CALL}</think>\n{CALL}")
    body = {"messages": HELLO, "tools": [WEATHER]}
    choice = (await client.post(URL, json=body)).json()["choices"][0]
    assert len(choice["message"]["tool_calls"]) == 1
    assert choice["message"]["reasoning"] == CALL


async def test_a_structured_answer_may_be_thought_about_first(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await client.post(URL, json={"messages": HELLO, "response_format": {"type": "json_object"}})
    structure = engine.seen[-1][2].structure
    assert structure is not None
    assert structure.prelude.startswith("prelude: (")


async def test_effort_and_template_variables_reach_the_template_where_it_takes_them(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    async def variables(**fields: Any) -> Any:
        response = await client.post(URL, json={"messages": HELLO, **fields})
        assert response.status_code == 200, response.text
        return engine.rendering["variables"]

    assert await variables() == {}
    assert await variables(reasoning_effort="none") == {"enable_thinking": False}
    assert await variables(reasoning_effort="high") == {"enable_thinking": True}
    assert await variables(chat_template_kwargs={"enable_thinking": False}) == {"enable_thinking": False}
    engine.model = msgspec.structs.replace(engine.model, template_variables=frozenset({"reasoning_effort"}))
    assert await variables(reasoning_effort="low") == {"reasoning_effort": "low"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"tools": "x"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"unknown": True}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"enable_thinking": [True]}}, "chat_template_kwargs"),
        ({"reasoning_effort": "extreme"}, "reasoning_effort"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ],
)
async def test_what_the_template_does_not_take_is_refused(
    client: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any], param: str
) -> None:
    response = await client.post(URL, json={"messages": HELLO, **fields})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith(param)
    assert engine.seen == []


async def test_effort_without_reasoning_is_refused_unless_it_is_none(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.model = msgspec.structs.replace(engine.model, chat_template="x", template_variables=frozenset())
    for effort, status in (("none", 200), ("low", 400)):
        response = await client.post(URL, json={"messages": HELLO, "reasoning_effort": effort})
        assert response.status_code == status


async def test_the_final_message_can_be_continued(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "Yes, but"}]
    response = await client.post(URL, json={"messages": messages, "continue_final_message": True})
    assert response.status_code == 200
    rendering = engine.rendering
    assert (rendering["continue_final_message"], rendering["add_generation_prompt"]) == (True, False)


async def test_past_thoughts_go_to_the_template(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "Yes.", "reasoning": "Hm."}, *HELLO]
    await client.post(URL, json={"messages": messages})
    assert engine.messages[1] == {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}
