"""POST /v1/completions: one choice for each prompt."""

from __future__ import annotations

from collections import defaultdict

import msgspec
from fastapi import APIRouter, Request, Response
from msgspec import UNSET, UnsetType

from engine.messages import RequestOutput
from server.body import read_body
from server.collect import Collected, Tally
from server.context import AppContext
from server.errors import BadRequest
from server.generation import Job
from server.openapi import json_body
from server.protocol.completions import Completion, CompletionChoice, CompletionRequest
from server.protocol.logprobs import TextOffsets, completion_logprobs
from server.protocol.usage import Usage, usage_of
from server.routes.answer import Head, answer_stream, answer_whole, new_head
from server.sse import event


def completions_router(ctx: AppContext) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions", openapi_extra=json_body(CompletionRequest), response_model=None)
    @router.post("/completions", include_in_schema=False, response_model=None)
    async def create_completion(request: Request) -> Response:
        ctx.require_engine()
        body = await read_body(request, CompletionRequest, ctx)
        head = new_head(ctx, "cmpl", ctx.served_name(body.model))
        include_usage = body.include_usage
        if len(body.prompt) > ctx.settings.max_prompts:
            raise BadRequest(f"at most {ctx.settings.max_prompts} prompts, got {len(body.prompt)}", param="prompt")
        params = body.sampling_params(
            max_tokens=body.output_limit,
            logprobs=body.logprobs,
            max_stop_strings=ctx.settings.max_stop_strings,
        )
        token_ids = [await ctx.engine.encode(text) if isinstance(text, str) else text for text in body.prompt]
        jobs = [
            Job(f"{head.id}-{index}", prompt, params, prompt_param="prompt") for index, prompt in enumerate(token_ids)
        ]
        if body.stream:
            return await answer_stream(ctx, request, jobs, CompletionChunker(head, include_usage=include_usage))
        return await answer_whole(ctx, request, jobs, lambda choices, tally: _completion(head, choices, tally))

    return router


def _chunk(head: Head, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> Completion:
    return Completion(
        id=head.id,
        created=head.created,
        model=head.model,
        system_fingerprint=head.fingerprint,
        choices=choices,
        usage=usage,
    )


def _completion(head: Head, choices: list[Collected], tally: Tally) -> msgspec.Struct:
    return _chunk(
        head,
        [
            CompletionChoice(
                index,
                choice.text,
                completion_logprobs(choice.logprobs, TextOffsets()) if choice.logprobs else None,
                choice.finish_reason,
                choice.stop_reason,
            )
            for index, choice in enumerate(choices)
        ],
        usage_of(tally),
    )


class CompletionChunker:
    """A chunk for each output that says something, then one without text that has the finish reason."""

    def __init__(self, head: Head, *, include_usage: bool) -> None:
        self._head = head
        self._include_usage = include_usage
        self._tally = Tally()
        self._offsets: defaultdict[int, TextOffsets] = defaultdict(TextOffsets)

    def events(self, index: int, output: RequestOutput) -> bytes:
        self._tally.add(index, output)
        events = b""
        if output.text or output.logprobs:
            logprobs = completion_logprobs(output.logprobs, self._offsets[index]) if output.logprobs else None
            events += self._event(CompletionChoice(index, output.text, logprobs))
        if output.finish_reason is not None:
            finish = CompletionChoice(index, "", finish_reason=output.finish_reason, stop_reason=output.stop_reason)
            events += self._event(finish)
        return events

    def last_events(self) -> bytes:
        return event(_chunk(self._head, [], usage_of(self._tally))) if self._include_usage else b""

    def _event(self, choice: CompletionChoice) -> bytes:
        return event(_chunk(self._head, [choice], None if self._include_usage else UNSET))
