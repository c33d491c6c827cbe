"""The chat templates that checkpoints bring: small programs, so they run in a sandbox. Pure; no tokenizer, no process.

As transformers renders them (transformers.utils.chat_template_utils), which tests hold it to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import meta, nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # where the last message's text ends
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names under which templates look for it


class TemplateRefusal(ValueError):
    """The template does not take these messages; the text is its own."""


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    *,
    continue_final_message: bool = False,
) -> str:
    """The prompt's text. With `continue_final_message` it ends where that message does, for the model to go on.

    Raises `TemplateRefusal` for whatever goes wrong.
    """
    chat = [_message(message) for message in messages]
    if continue_final_message:
        if not chat or not isinstance(chat[-1].get("content"), str):
            raise TemplateRefusal("there is no final message with a text to continue")
        chat[-1] = {**chat[-1], "content": chat[-1]["content"] + _TAG}
    try:
        text = _compiled(template).render(messages=chat, **{"tools": None, "documents": None, **variables})
    except Exception as error:  # it is the model's own program and may raise anything
        raise TemplateRefusal(str(error) or type(error).__name__) from error
    return _cut(text, str(chat[-1]["content"]).removesuffix(_TAG)) if continue_final_message else text


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Without keys that are null, which templates would write out; reasoning under each of its names."""
    said = {key: value for key, value in message.items() if value is not None}
    reasoning = next((said[name] for name in _REASONING if name in said), None)
    return said if reasoning is None else {"thinking": reasoning, **said, "reasoning_content": reasoning}


def _cut(text: str, final: str) -> str:
    at = text.rfind(_TAG.strip())
    if at < 0 or final.strip() not in text:
        raise TemplateRefusal("it leaves out parts of the final message, which so cannot be continued")
    kept = text[:at]
    return kept if text.startswith(_TAG, at) else kept.rstrip()  # it trims what follows a message


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the model says, for training; here it is only passed over."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def variables_of(template: str) -> frozenset[str]:
    """Names that the template reads and does not set; empty for one that cannot be parsed."""
    environment = _environment()
    try:
        return frozenset(meta.find_undeclared_variables(environment.parse(template))) - environment.globals.keys()
    except jinja2.TemplateError:
        return frozenset()


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


def _environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
