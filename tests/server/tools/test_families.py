"""Every family: what its models write is read as calls however it is cut, and its grammar allows nothing else."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher
from tokenizers import AddedToken as NewToken
from tokenizers import Tokenizer

from engine.errors import InvalidRequest
from engine.grammar import Grammars, prepared
from engine.messages import AddedToken
from engine.sampling_params import Structure
from server.tools import FAMILIES, PROMPTED, family_of
from server.tools.events import AnswerParser, CallArguments, CallBegins, Content, Event, Reasoning
from server.tools.family import Tool, ToolFamily, Words
from server.tools.prompted import with_tools_told
from tests.engine.tiny_models import save_tokenizer

CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}
TOOLS = [
    Tool("get_weather", CITY, "tools[0].function"),
    Tool("stop-all", {"type": "object", "properties": {}}, "tools[1].function"),
]
WEATHER = {"city": 'Pa"ris\n{', "days": 3}
HERMES = '<tool_call>\n{"name": "get_weather", "arguments": ' + json.dumps(WEATHER) + "}\n</tool_call>"
HERMES_STOP = '<tool_call>\n{"name": "stop-all", "arguments": {}}\n</tool_call>'
LISTED = '{"name": "get_weather", "arguments": ' + json.dumps(WEATHER) + "}"
DEEPSEEK = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>"
DEEPSEEK_31 = "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
CODER = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\n"
    + WEATHER["city"]
    + "\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
)

# a template's text by which the family is known, one call, two calls
SPOKEN: dict[str, tuple[str, str, str]] = {
    "hermes": ("... <tool_call> ...", HERMES, f"{HERMES}\n{HERMES_STOP}"),
    "qwen-coder": (
        "<tool_call> <function=... <parameter=...",
        CODER,
        f"{CODER}\n<tool_call>\n<function=stop-all>\n</function>\n</tool_call>",
    ),
    "mistral": (
        "[TOOL_CALLS] ...",
        f"[TOOL_CALLS][{LISTED}]",
        f'[TOOL_CALLS][{LISTED}, {{"name": "stop-all", "arguments": {{}}}}]',
    ),
    "mistral-args": (
        "[TOOL_CALLS] [ARGS]",
        "[TOOL_CALLS]get_weather[ARGS]" + json.dumps(WEATHER),
        "[TOOL_CALLS]get_weather[ARGS]" + json.dumps(WEATHER) + "[TOOL_CALLS]stop-all[ARGS]{}",
    ),
    "deepseek": (
        "<｜tool▁call▁begin｜> ```json",
        f"<｜tool▁calls▁begin｜>{DEEPSEEK.format('get_weather', json.dumps(WEATHER))}<｜tool▁calls▁end｜>",
        f"<｜tool▁calls▁begin｜>{DEEPSEEK.format('get_weather', json.dumps(WEATHER))}\n"
        f"{DEEPSEEK.format('stop-all', '{}')}<｜tool▁calls▁end｜>",
    ),
    "deepseek-v3.1": (
        "<｜tool▁call▁begin｜>",
        f"<｜tool▁calls▁begin｜>{DEEPSEEK_31.format('get_weather', json.dumps(WEATHER))}<｜tool▁calls▁end｜>",
        f"<｜tool▁calls▁begin｜>{DEEPSEEK_31.format('get_weather', json.dumps(WEATHER))}\n"
        f"{DEEPSEEK_31.format('stop-all', '{}')}<｜tool▁calls▁end｜>",
    ),
    "llama": (
        '<|eot_id|> "parameters"',
        '{"name": "get_weather", "parameters": ' + json.dumps(WEATHER) + "}",
        '<|python_tag|>{"name": "get_weather", "parameters": '
        + json.dumps(WEATHER)
        + '};{"name": "stop-all", "parameters": {}}',
    ),
}
each_family = pytest.mark.parametrize("name", FAMILIES)


def read(parser: AnswerParser, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """Content, and calls with their arguments."""
    events: list[Event] = [event for piece in pieces for event in parser.push(piece)] + parser.finish()
    content, calls = "", []
    for event in events:
        if isinstance(event, Content):
            assert event.text
            content += event.text
        elif isinstance(event, CallBegins):
            calls.append((event.name, ""))
        elif isinstance(event, CallArguments):
            calls[-1] = calls[-1][0], calls[-1][1] + event.text
        else:
            assert not isinstance(event, Reasoning)
    return content, calls


def cuts(text: str) -> list[list[str]]:
    """The text whole, by characters, and cut at random."""
    rng = random.Random(text)
    ways = [[text], list(text)]
    for _ in range(20):
        at = sorted({0, len(text), *(rng.randrange(len(text) + 1) for _ in range(rng.randrange(1, 9)))})
        ways.append([text[a:b] for a, b in itertools.pairwise(at)])
    return ways


def test_every_family_has_a_text_here():
    assert set(SPOKEN) == set(FAMILIES)


@each_family
def test_a_family_is_known_by_its_template(name: str):
    assert family_of(SPOKEN[name][0], renders_tools=True) is FAMILIES[name]
    assert family_of(SPOKEN[name][0], renders_tools=False) is PROMPTED
    assert family_of("{{ tools }}", renders_tools=True) is PROMPTED


@each_family
@pytest.mark.parametrize("is_certain", [False, True])
def test_calls_are_read_however_they_are_cut(name: str, is_certain: bool):
    for text, names in ((SPOKEN[name][1], ["get_weather"]), (SPOKEN[name][2], ["get_weather", "stop-all"])):
        for pieces in cuts(text):
            content, calls = read(FAMILIES[name].parser(TOOLS, is_certain=is_certain), pieces)
            assert (content, [called for called, _ in calls]) == ("", names), pieces
            assert json.loads(calls[0][1]) == WEATHER
            assert all(json.loads(arguments) == {} for _, arguments in calls[1:])


@each_family
def test_text_before_a_call_is_content_without_the_space_between(name: str):
    if FAMILIES[name].begins_with is None:
        return
    for pieces in cuts("  Let me <look>.\n\n" + SPOKEN[name][1] + "\n"):
        content, calls = read(FAMILIES[name].parser(TOOLS, is_certain=False), pieces)
        assert (content, len(calls)) == ("  Let me <look>.", 1), pieces


@each_family
def test_what_is_no_call_is_content_to_the_last_character(name: str):
    call = SPOKEN[name][1]
    texts = [
        "",
        "Hello, world.\n",
        " <tool",
        "a {b} [c] <d>",
        call.replace("get_weather", "nobody"),
        call[: len(call) // 2],
        call.replace("{", "(", 1) if name != "qwen-coder" else call.replace("<function=", "<fun=", 1),
    ]
    for text in texts:
        for pieces in cuts(text) if text else [[]]:
            content, calls = read(FAMILIES[name].parser(TOOLS, is_certain=False), pieces)
            assert calls == [], text
            said = text
            for mark in ("<|python_tag|>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"):  # around all calls
                said = said.replace(mark, "")
            assert content.split() == said.split(), pieces


@each_family
def test_a_certain_call_is_told_as_it_comes(name: str):
    if name == "qwen-coder":
        return  # its arguments are no JSON before they are complete
    text = SPOKEN[name][1]
    parser = FAMILIES[name].parser(TOOLS, is_certain=True)
    told = [event for piece in text for event in parser.push(piece)]
    assert isinstance(told[0], CallBegins)
    assert len(told) > len(json.dumps(WEATHER)) // 2
    half = FAMILIES[name].parser(TOOLS, is_certain=True)
    content, calls = read(half, [text[: text.index("days")]])
    assert content == ""
    assert calls[0][0] == "get_weather"
    assert json.dumps(WEATHER).startswith(calls[0][1].rstrip())


@pytest.fixture(scope="module")
def make_grammars(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str]], tuple[Grammars, Tokenizer]]:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory)

    def make(marks: list[str]) -> tuple[Grammars, Tokenizer]:
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        tokenizer.add_special_tokens([NewToken(mark, special=True) for mark in marks])
        return Grammars(tokenizer.to_str(), eos_token_ids=[256]), tokenizer

    return make


def allows(grammars: Grammars, tokenizer: Tokenizer, grammar: str, text: str) -> bool:
    matcher: LLMatcher = grammars.compile(prepared(Structure(kind="grammar", source=grammar, param="p")))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def whole(family: ToolFamily, words: Words, tools: list[Tool], *, parallel: bool) -> str:
    begins = "" if family.begins_with is None else words.mark(family.begins_with)
    return f"%llguidance {{}}\nstart: {begins} calls\n{family.calls_rule(tools, words, parallel=parallel)}"


@each_family
@pytest.mark.parametrize("has_tokens", [False, True])
def test_the_grammar_allows_calls_by_the_schema_and_nothing_else(
    make_grammars: Callable[[list[str]], tuple[Grammars, Tokenizer]], name: str, has_tokens: bool
):
    family = FAMILIES[name]
    grammars, tokenizer = make_grammars(list(family.marks) if has_tokens else [])
    words = Words({mark: AddedToken(tokenizer.token_to_id(mark), True) for mark in family.marks} if has_tokens else {})
    _, one, two = SPOKEN[name]
    grammar = whole(family, words, TOOLS, parallel=True)
    assert allows(grammars, tokenizer, grammar, one)
    assert not allows(grammars, tokenizer, grammar, one.replace("get_weather", "get_whether"))
    assert not allows(grammars, tokenizer, grammar, one.replace("city", "town"))
    assert not allows(grammars, tokenizer, grammar, one.replace("3", '"three"'))
    assert not allows(grammars, tokenizer, grammar, "Hello " + one)
    if name != "llama":  # which calls one at a time
        assert allows(grammars, tokenizer, grammar, two)
        assert not allows(grammars, tokenizer, whole(family, words, TOOLS, parallel=False), two)
    assert not allows(grammars, tokenizer, whole(family, words, TOOLS[1:], parallel=True), one)


def test_text_values_whose_schema_cannot_be_enforced_unquoted_are_refused_by_name():
    def rule(schema: dict[str, Any]) -> str:
        tool = Tool("f", {"type": "object", "properties": {"x": schema}}, "tools[0].function")
        return FAMILIES["qwen-coder"].calls_rule([tool], Words({}), parallel=False)

    assert "yes" in rule({"enum": ["yes", "no"]})
    with pytest.raises(InvalidRequest, match="'maxLength' of the text 'x'"):
        rule({"type": "string", "maxLength": 3})


def test_small_models_variations_of_a_call_are_read_too():
    for text in (
        '<tool_call>{"arguments": {"city": "x"}, "name": "get_weather"}</tool_call>',
        '<tool_call>[{"name": "get_weather", "arguments": {"city": "x"}}]</tool_call>',
        '<tool_call>\n{"name": "get_weather", "parameters": {"city": "x"}}\n',
        '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"x\\"}"}</tool_call>',
    ):
        for pieces in cuts(text):
            content, calls = read(PROMPTED.parser(TOOLS, is_certain=False), pieces)
            assert (content.strip(), [(n, json.loads(a)) for n, a in calls]) == ("", [("get_weather", {"city": "x"})])


def test_a_template_without_tools_is_told_of_them_in_roles_that_it_knows():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "one", "tool_call_id": "1"},
        {"role": "tool", "content": "two", "tool_call_id": "1"},
    ]
    told = with_tools_told(messages, [{"type": "function", "function": {"name": "f"}}])
    assert [message["role"] for message in told] == ["system", "user", "assistant", "user"]
    assert told[0]["content"].startswith("Be brief.\n\n")
    assert '{"name": "f"}' in told[0]["content"]
    assert told[2]["content"].count('<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>') == 2
    assert told[3]["content"] == "<tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</tool_response>"
    assert with_tools_told(messages[:2], []) == messages[:2]
