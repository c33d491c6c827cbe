"""POST /v1/chat/completions."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Request, Response
from msgspec import UNSET

from engine.messages import RequestOutput
from server.body import read_body
from server.collect import Collected, Tally
from server.context import AppContext
from server.generation import Job
from server.openapi import json_body
from server.protocol.chat import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatMessage,
    ChatRequest,
)
from server.protocol.logprobs import chat_logprobs
from server.protocol.usage import usage_of
from server.routes.answer import Head, answer_stream, answer_whole, new_head
from server.sse import event

_DESCRIBED = json_body(ChatRequest, ChatCompletion, stream=ChatChunk)


def chat_router(ctx: AppContext) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions", openapi_extra=_DESCRIBED, response_model=None)
    @router.post("/chat/completions", include_in_schema=False, response_model=None)
    async def create_chat_completion(request: Request) -> Response:
        ctx.require_engine()
        body = await read_body(request, ChatRequest, ctx)
        head = new_head(ctx, "chatcmpl", ctx.served_name(body.model))
        include_usage = body.include_usage
        params = body.sampling_params(
            max_tokens=body.output_limit,
            logprobs=body.num_logprobs,
            max_stop_strings=ctx.settings.max_stop_strings,
        )
        prompt_token_ids = await ctx.engine.render_chat(
            [message.rendered() for message in body.messages],
            add_generation_prompt=body.add_generation_prompt is not False,
        )
        jobs = [Job(head.id, prompt_token_ids, params, prompt_param="messages")]
        if body.stream:
            return await answer_stream(ctx, request, jobs, ChatChunker(head, include_usage=include_usage))
        return await answer_whole(ctx, request, jobs, lambda choices, tally: _completion(head, choices, tally))

    return router


def _completion(head: Head, choices: list[Collected], tally: Tally) -> msgspec.Struct:
    return ChatCompletion(
        id=head.id,
        created=head.created,
        model=head.model,
        system_fingerprint=head.fingerprint,
        choices=[
            ChatChoice(
                index,
                ChatMessage("assistant", choice.text),
                chat_logprobs(choice.logprobs) if choice.logprobs else None,
                choice.finish_reason,
                choice.stop_reason,
            )
            for index, choice in enumerate(choices)
        ],
        usage=usage_of(tally),
    )


class ChatChunker:
    """First a chunk with the role, then one for each output that says something, then one with the finish reason."""

    def __init__(self, head: Head, *, include_usage: bool) -> None:
        self._head = head
        self._include_usage = include_usage
        self._tally = Tally()
        self._opened: set[int] = set()

    def events(self, index: int, output: RequestOutput) -> bytes:
        self._tally.add(index, output)
        events = b""
        if index not in self._opened:
            self._opened.add(index)
            events += self._event(ChatChunkChoice(index, ChatDelta(role="assistant", content="")))
        if output.text or output.logprobs:
            logprobs = chat_logprobs(output.logprobs) if output.logprobs else None
            events += self._event(ChatChunkChoice(index, ChatDelta(content=output.text), logprobs))
        if output.finish_reason is not None:
            finish = ChatChunkChoice(
                index, ChatDelta(), finish_reason=output.finish_reason, stop_reason=output.stop_reason
            )
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
