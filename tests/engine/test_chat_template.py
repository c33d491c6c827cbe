"""Chat templates: rendered as transformers renders them, in a process that may be killed."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from engine.chat_template import TemplateRefusal, render
from engine.errors import InvalidRequest
from engine.template_pool import TemplatePool
from engine.tokenizer import Tokenizer
from tests.engine.tiny_models import CHAT_TEMPLATE, save_tokenizer

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief <&>", "name": None},
    {"role": "user", "content": "What is 6 x 7?\n"},
    {"role": "assistant", "content": "It is é ", "reasoning": "six sevens"},
]
TOOLS = [{"type": "function", "function": {"name": "mul", "parameters": {"type": "object", "b": 1, "a": "é"}}}]
TEMPLATES = {
    "chatml": CHAT_TEMPLATE,
    "tools": "{{ bos_token }}{% if tools %}{% for t in tools %}{{ t | tojson(indent=2) }}{{ t.function | tojson }}"
    "{% endfor %}{% endif %}{{ messages[-1].content }}{{ eos_token }}",
    "namespace": "{% set ns = namespace(n=0, last='') %}{% for m in messages %}\n    {% if m.role == 'system' %}"
    "{% continue %}{% endif %}{% set ns.n = ns.n + 1 %}{% set ns.last = m.content | trim %}\n{% endfor %}"
    "{{ ns.n }}{{ ns.last }}{{ dict(a=1).a }}",
    "generation": "{% for m in messages %}{% generation %}[{{ m.content }}]{% endgeneration %}{% endfor %}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content }}{{ m.thinking }}{{ m.name is defined }};{% endfor %}",
    "date": "{{ strftime_now('%Y') }}{{ documents is none }}{{ enable_thinking | default('unset') }}",
}
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = b %}{% endfor %}{% endfor %}"
IN_C = "{{ 10 ** (10 ** 9) }}"  # no bytecode in which it could be interrupted


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory)
    return directory


@pytest.fixture
async def pool() -> AsyncIterator[TemplatePool]:
    pool = TemplatePool(render_s=1.0)
    yield pool
    await pool.close()


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("final", [False, True])
def test_a_prompt_is_what_transformers_makes_of_the_messages(
    directory: Path, name: str, tools: list[Any] | None, final: bool
) -> None:
    template = TEMPLATES[name]
    wrapper = AutoTokenizer.from_pretrained(directory)
    options = {"add_generation_prompt": not final, "enable_thinking": False}

    def theirs() -> str | None:
        try:
            return str(
                wrapper.apply_chat_template(
                    CHAT, tools, chat_template=template, tokenize=False, continue_final_message=final, **options
                )
            )
        except ValueError:
            return None

    def ours() -> str | None:
        variables = {**Tokenizer(directory).special_tokens, "tools": tools, **options}
        try:
            return render(template, CHAT, variables, continue_final_message=final)
        except TemplateRefusal:
            return None

    assert ours() == theirs()


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.nothing.there }}", "has no attribute"),
        ("{% for m in messages %}", "end of template"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ range(10 ** 9) }}", "Range too big"),
        ("{{ 'a' * 10 ** 10 }}", "MemoryError"),
    ],
)
async def test_what_a_template_refuses_or_may_not_do_is_said(pool: TemplatePool, template: str, why: str) -> None:
    with pytest.raises(InvalidRequest, match="the model's chat template refuses these messages") as refusal:
        await pool.render(template, CHAT, {})
    assert why in str(refusal.value)
    assert refusal.value.param == "messages"
    assert await pool.render("{{ messages[1].content }}", CHAT, {}) == "What is 6 x 7?\n"


@pytest.mark.parametrize("template", [ENDLESS, IN_C])
async def test_a_template_that_does_not_end_is_killed_while_the_event_loop_goes_on(
    pool: TemplatePool, template: str
) -> None:
    rendering = asyncio.ensure_future(pool.render(template, CHAT, {}))
    others = await asyncio.gather(*(pool.render(CHAT_TEMPLATE, CHAT, {}) for _ in range(20)))
    assert not rendering.done()  # the others did not wait for it
    with pytest.raises(InvalidRequest, match="takes longer than 1 s"):
        await rendering
    assert set(others) == {await pool.render(CHAT_TEMPLATE, CHAT, {})}


async def test_who_leaves_takes_the_template_along(pool: TemplatePool) -> None:
    rendering = asyncio.ensure_future(pool.render(ENDLESS, CHAT, {}))
    while not (started := _children()):
        await asyncio.sleep(0.01)
    rendering.cancel()
    await asyncio.wait({rendering})
    deadline = time.monotonic() + 10
    while started & _children() and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    assert not started & _children()
    assert await pool.render("{{ messages | length }}", CHAT, {}) == "3"


async def test_a_long_conversation_crosses_and_no_key_does(pool: TemplatePool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREGATE_API_KEY", "secret")
    text = "é" * 3_000_000
    assert await pool.render("{{ messages[0].content }}", [{"role": "user", "content": text}], {}) == text
    (worker,) = _children()
    assert b"secret" not in Path(f"/proc/{worker}/environ").read_bytes()


def _children() -> set[int]:
    return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))
