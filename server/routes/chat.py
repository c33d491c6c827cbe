"""POST /v1/chat/completions: n answers to a conversation."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from fastapi import APIRouter, Request, Response
from msgspec import UNSET

from engine.admission import too_long
from engine.messages import RequestOutput
from server.body import read_body
from server.chat_message import MessageBuilder
from server.chat_plan import plan_of
from server.collect import Collected, Tally
from server.context import AppContext
from server.errors import BadRequest
from server.generation import jobs_of
from server.openapi import json_body
from server.protocol.chat import ChatChoice, ChatChunk, ChatChunkChoice, ChatCompletion, ChatDelta, ChatRequest
from server.protocol.logprobs import chat_logprobs
from server.protocol.usage import usage_of
from server.routes.answer import Head, answer_stream, answer_whole, new_head
from server.sse import event
from server.tools.events import AnswerParser

_DESCRIBED = json_body(ChatRequest, ChatCompletion, stream=ChatChunk)


class Reading(msgspec.Struct, frozen=True):
    """How the text of one choice is read, and what it is put together to."""

    parser: AnswerParser
    builder: MessageBuilder


def chat_router(ctx: AppContext) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions", openapi_extra=_DESCRIBED, response_model=None)
    @router.post("/chat/completions", include_in_schema=False, response_model=None)
    async def create_chat_completion(request: Request) -> Response:
        ctx.require_room()
        body = await read_body(request, ChatRequest, ctx)
        limit = ctx.engine.info.max_model_len
        if len(body.messages) > limit:  # each is a token at least
            raise too_long(limit, f"more than {limit}", param="messages")
        head = new_head(ctx, "chatcmpl", ctx.served_name(body.model))
        include_usage = body.include_usage
        n = body.n or 1
        if n > ctx.settings.max_choices:
            raise BadRequest(f"at most {ctx.settings.max_choices} choices, got {n}", param="n")
        params = body.sampling_params(
            max_tokens=body.output_limit,
            logprobs=body.num_logprobs,
            max_stop_strings=ctx.settings.max_stop_strings,
        )
        plan = plan_of(body, ctx.engine.info)
        prompt = await ctx.engine.render_chat(plan.messages, **plan.rendering)
        if plan.prompt_end_tokens:
            plan = plan.begun(await ctx.engine.decode(prompt[-plan.prompt_end_tokens :]))
        jobs = jobs_of(head.id, [prompt], plan.params(params), n=n, prompt_param="messages")

        def reading() -> Reading:
            builder = MessageBuilder(call_id_chars=plan.family.call_id_chars, has_reasoning=plan.thinking is not None)
            return Reading(plan.parser(skip_special_tokens=params.skip_special_tokens), builder)

        if body.stream:
            return await answer_stream(ctx, request, jobs, ChatChunker(head, reading, include_usage=include_usage, n=n))
        return await answer_whole(ctx, request, jobs, lambda *told: _completion(head, reading, *told), n=n)

    return router


def _completion(head: Head, reading: Callable[[], Reading], choices: list[Collected], tally: Tally) -> msgspec.Struct:
    return ChatCompletion(
        id=head.id,
        created=head.created,
        model=head.model,
        system_fingerprint=head.fingerprint,
        choices=[_choice(index, choice, reading()) for index, choice in enumerate(choices)],
        usage=usage_of(tally),
    )


def _choice(index: int, choice: Collected, reading: Reading) -> ChatChoice:
    builder = reading.builder
    builder.add([*reading.parser.push(choice.text), *reading.parser.finish()])
    return ChatChoice(
        index,
        builder.message,
        chat_logprobs(choice.logprobs) if choice.logprobs else None,
        builder.finish_reason(choice.finish_reason),
        choice.stop_reason,
    )


class ChatChunker:
    """First a chunk with the role, then those of what each output says, then one with the finish reason."""

    def __init__(self, head: Head, reading: Callable[[], Reading], *, include_usage: bool, n: int = 1) -> None:
        self._head = head
        self._reading = reading
        self._include_usage = include_usage
        self._tally = Tally(n)
        self._readings: dict[int, Reading] = {}

    def events(self, index: int, output: RequestOutput) -> bytes:
        self._tally.add(index, output)
        events = b""
        if index not in self._readings:
            self._readings[index] = self._reading()
            events += self._event(ChatChunkChoice(index, ChatDelta(role="assistant", content="")))
        parser, builder = self._readings[index].parser, self._readings[index].builder
        told = parser.push(output.text)
        if output.finish_reason is not None:
            told += parser.finish()
        deltas = builder.deltas(told)
        logprobs = chat_logprobs(output.logprobs) if output.logprobs else None
        if logprobs is not None and not deltas:
            deltas = [ChatDelta(content="")]
        for i, delta in enumerate(deltas):
            events += self._event(ChatChunkChoice(index, delta, logprobs if i == 0 else None))
        if output.finish_reason is not None:
            reason = builder.finish_reason(output.finish_reason)
            finish = ChatChunkChoice(index, ChatDelta(), finish_reason=reason, stop_reason=output.stop_reason)
            events += self._event(finish)
        return events

    def last_events(self) -> bytes:
        if not self._include_usage:
            return b""
        return event(msgspec.structs.replace(self._chunk([]), usage=usage_of(self._tally)))

    def _event(self, choice: ChatChunkChoice) -> bytes:
        return event(self._chunk([choice]))

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        return ChatChunk(
            id=self._head.id,
            created=self._head.created,
            model=self._head.model,
            system_fingerprint=self._head.fingerprint,
            choices=choices,
            usage=None if self._include_usage else UNSET,
        )
