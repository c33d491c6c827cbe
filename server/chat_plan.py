"""What a chat request asks for: how its prompt is rendered, what its text must be, and how that text is read."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import msgspec

from engine.json_schema import json_rule
from engine.messages import ModelInfo
from engine.sampling_params import SamplingParams, Structure
from server.errors import BadRequest
from server.protocol.chat import ChatRequest
from server.protocol.tools import ToolUse, tool_use
from server.reasoning import Thinking, ThoughtParser, thinking_of
from server.tools import PROMPTED, family_of
from server.tools.events import AnswerParser, Event, PlainText
from server.tools.family import ToolFamily, Words, text
from server.tools.prompted import with_tools_told

_PROMPT_END_TOKENS = 64  # in which a thought is looked for that the template begins
# what the server itself gives to templates
_OWN_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt", "tokenize", "chat_template"})


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """Of one request to one model."""

    info: ModelInfo
    family: ToolFamily
    use: ToolUse | None
    thinking: Thinking | None
    messages: list[dict[str, Any]]
    rendering: dict[str, Any]  # of `render_chat`

    @property
    def prompt_end_tokens(self) -> int:
        """How many tokens of the prompt's end `begun` wants to see; 0: none."""
        return 0 if self.thinking is None else _PROMPT_END_TOKENS

    def begun(self, prompt_end: str) -> ChatPlan:
        """With what the prompt has begun of the answer."""
        if self.thinking is None:
            return self
        thinking = self.thinking.after(prompt_end)
        return ChatPlan(self.info, self.family, self.use, thinking, self.messages, self.rendering)

    def params(self, params: SamplingParams) -> SamplingParams:
        """With what tools and thoughts ask besides. Raises `InvalidRequest` for what cannot be enforced."""
        structure = params.structure
        words = Words(self.info.added_tokens)
        if self.use is not None and (self.use.is_enforced or structure is not None):
            structure = _tool_structure(self.family, self.use, words, self.info, structure)
        if structure is not None and self.thinking is not None:
            structure = msgspec.structs.replace(structure, prelude=self.thinking.prelude(words))
        shown = params.skip_special_tokens and not self._special_marks
        return msgspec.structs.replace(params, structure=structure, skip_special_tokens=shown)

    def parser(self, *, skip_special_tokens: bool) -> AnswerParser:
        parser: AnswerParser = PlainText()
        if self.use is not None:
            parser = self.family.parser(self.use.tools, is_certain=self.use.is_enforced)
        if self.thinking is not None:
            parser = ThoughtParser(self.thinking, parser)
        if skip_special_tokens and self._special_marks:
            parser = _WithoutSpecialTokens(self.info, self._special_marks, parser)
        return parser

    @property
    def _special_marks(self) -> frozenset[str]:
        """Those that the engine would leave out of the text."""
        marks = () if self.use is None else self.family.marks
        if self.thinking is not None:
            marks += (self.thinking.opening, self.thinking.closing)
        return frozenset(mark for mark in marks if (token := self.info.added_tokens.get(mark)) and token.special)


def plan_of(body: ChatRequest, info: ModelInfo) -> ChatPlan:
    """Raises `BadRequest` for what this model's template does not know."""
    use = tool_use(body.tools or (), body.tool_choice, parallel=body.parallel_tool_calls)
    template = info.chat_template or ""
    if body.tools and "<|channel|>" in template:
        raise BadRequest("tool calls in this model's format (harmony) are not supported", param="tools")
    family = family_of(template, renders_tools="tools" in info.template_variables)
    messages = [message.rendered(arguments_as_text=family.arguments_as_text) for message in body.messages]
    shown = [] if use is None else [tool.rendered() for tool in body.tools or ()]
    rendering: dict[str, Any] = {**_turn(body), "variables": _variables(body, info)}
    if family is PROMPTED:
        messages = with_tools_told(messages, shown)
    elif shown:
        rendering["tools"] = shown
    return ChatPlan(info, family, use, thinking_of(info.chat_template), messages, rendering)


def _turn(body: ChatRequest) -> dict[str, bool]:
    if not body.continue_final_message:
        return {"add_generation_prompt": body.add_generation_prompt is not False}
    if body.add_generation_prompt:
        raise BadRequest(
            "continue_final_message and add_generation_prompt cannot both be true", param="continue_final_message"
        )
    last = body.messages[-1]
    if last.role != "assistant" or not last.content or last.tool_calls:
        raise BadRequest(
            "continue_final_message needs an assistant message with content at the end", param="continue_final_message"
        )
    return {"add_generation_prompt": False, "continue_final_message": True}


def _variables(body: ChatRequest, info: ModelInfo) -> dict[str, Any]:
    """Of the template. Raises `BadRequest` for one that it does not take."""
    known = {name for name in info.template_variables - _OWN_VARIABLES if not name.endswith("_token")}
    variables = dict(body.chat_template_kwargs or {})
    for name in variables:
        if name not in known:
            raise BadRequest(
                f"chat_template_kwargs: this model's template takes no {name[:100]!r} from a request; it takes: "
                f"{', '.join(sorted(known))[:500] or 'nothing'}",
                param="chat_template_kwargs",
            )
    effort = body.reasoning_effort
    if effort is not None:
        switch = next((name for name in ("enable_thinking", "thinking") if name in known), None)
        if "reasoning_effort" in known:
            variables.setdefault("reasoning_effort", effort)
        elif switch is not None:
            variables.setdefault(switch, effort != "none")
        elif effort != "none" or thinking_of(info.chat_template) is not None:
            raise BadRequest(
                "reasoning_effort: this model's reasoning has no effort that could be chosen", param="reasoning_effort"
            )
    return variables


def _tool_structure(
    family: ToolFamily, use: ToolUse, words: Words, info: ModelInfo, structure: Structure | None
) -> Structure:
    """Calls where there must be some; otherwise text, or what `structure` asks, in which a call is well formed."""
    rules = family.calls_rule(use.tools, words, parallel=use.parallel)
    begins = family.begins_with
    begun = "begun: calls" if begins is None else f"begun: {words.mark(begins)} calls"
    if use.must_call:
        if structure is not None:
            raise BadRequest(f"{structure.param} cannot be honoured by a call that is required", param="tool_choice")
        start = "start: begun"
    elif structure is not None:
        if structure.kind != "json":
            raise BadRequest("structured_outputs and tools cannot both be given", param="structured_outputs")
        try:
            schema = json.loads(structure.source)
        except (ValueError, RecursionError):
            raise BadRequest(f"{structure.param} is not JSON", param=structure.param) from None
        start = f"start: begun | answer\nanswer: {json_rule(schema, structure.param)}"
    elif begins is None:
        raise BadRequest(
            "strict tools, or parallel_tool_calls false, are enforced with this model only where tool_choice is "
            "required or names one",
            param="tools",
        )
    elif words.token(begins) is None:
        start = f"start: opening calls | TEXT?\nopening[lazy]: ANY {text(begins)}\nANY: /(.|\\n)*/\nTEXT: /(.|\\n)+/"
    else:
        others = words.others((begins,), info.eos_token_ids)
        prose = "TEXT" if others is None else f"(TEXT | {others})+"
        start = f"start: prose? begun?\nprose: {prose}\nTEXT: /(.|\\n)+/"
    return Structure(kind="grammar", source=f"%llguidance {{}}\n{start}\n{begun}\n{rules}", param="tools")


class _WithoutSpecialTokens:
    """An `AnswerParser`: the engine tells all tokens' text where `marks` are wanted; the others go here."""

    def __init__(self, info: ModelInfo, marks: frozenset[str], rest: AnswerParser) -> None:
        special = [mark for mark, token in info.added_tokens.items() if token.special and mark not in marks]
        self._others = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")
        self._rest = rest

    def push(self, text: str) -> list[Event]:
        return self._rest.push(self._others.sub("", text))

    def finish(self) -> list[Event]:
        return self._rest.finish()
