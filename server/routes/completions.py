"""POST /v1/completions: n choices for each prompt."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from fastapi import APIRouter, Request, Response
from msgspec import UNSET, UnsetType

from engine.errors import InvalidRequest
from engine.messages import PositionLogprobs, RequestOutput
from engine.sampling_params import SamplingParams
from server.body import read_body
from server.collect import Collected, Tally
from server.context import AppContext
from server.errors import BadRequest
from server.generation import jobs_of
from server.openapi import json_body
from server.protocol.completions import Completion, CompletionChoice, CompletionRequest
from server.protocol.logprobs import TextOffsets, completion_logprobs
from server.protocol.usage import Usage, usage_of
from server.routes.answer import Head, answer_stream, answer_whole, new_head
from server.sse import event

_DESCRIBED = json_body(CompletionRequest, Completion, stream=Completion)


def completions_router(ctx: AppContext) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions", openapi_extra=_DESCRIBED, response_model=None)
    @router.post("/completions", include_in_schema=False, response_model=None)
    async def create_completion(request: Request) -> Response:
        ctx.require_room()
        body = await read_body(request, CompletionRequest, ctx)
        head = new_head(ctx, "cmpl", ctx.served_name(body.model))
        include_usage = body.include_usage
        n = _num_choices(body, ctx)
        params = _params(body, ctx)
        prompts = [await ctx.engine.encode(text) if isinstance(text, str) else text for text in body.prompt]
        jobs = jobs_of(head.id, prompts, params, n=n, prompt_param="prompt")
        echo = await _echo(body, ctx)
        if body.stream:
            chunker = CompletionChunker(head, include_usage=include_usage, n=n, echo=echo)
            return await answer_stream(ctx, request, jobs, chunker)
        return await answer_whole(
            ctx, request, jobs, lambda choices, tally: _completion(head, choices, tally, n, echo), n=n
        )

    return router


async def _echo(body: CompletionRequest, ctx: AppContext) -> list[str] | None:
    """What each answer begins with."""
    if not body.echo:
        return None
    try:
        return [prompt if isinstance(prompt, str) else await ctx.engine.decode(prompt) for prompt in body.prompt]
    except InvalidRequest as exc:
        raise BadRequest(str(exc), param="prompt") from exc


def _num_choices(body: CompletionRequest, ctx: AppContext) -> int:
    n, num_prompts = body.num_choices, len(body.prompt)
    if num_prompts > ctx.settings.max_prompts:
        raise BadRequest(f"at most {ctx.settings.max_prompts} prompts, got {num_prompts}", param="prompt")
    if n * num_prompts > ctx.settings.max_choices:
        raise BadRequest(
            f"at most {ctx.settings.max_choices} choices in all, got {n} for each of {num_prompts} prompts", param="n"
        )
    return n


def _params(body: CompletionRequest, ctx: AppContext) -> SamplingParams:
    params = body.sampling_params(
        max_tokens=body.output_limit, logprobs=body.logprobs, max_stop_strings=ctx.settings.max_stop_strings
    )
    return msgspec.structs.replace(params, prompt_logprobs=body.logprobs if body.echo else None)


def _chunk(head: Head, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> Completion:
    return Completion(
        id=head.id,
        created=head.created,
        model=head.model,
        system_fingerprint=head.fingerprint,
        choices=choices,
        usage=usage,
    )


def _completion(
    head: Head, choices: list[Collected], tally: Tally, n: int, echo: Sequence[str] | None
) -> msgspec.Struct:
    answers: list[CompletionChoice] = []
    for index, choice in enumerate(choices):
        text = "" if echo is None else echo[index // n]
        prompt = choices[index - index % n].prompt_logprobs
        logprobs = None
        if choice.logprobs or prompt:
            logprobs = completion_logprobs(choice.logprobs, TextOffsets(text), prompt=prompt)
        answers.append(CompletionChoice(index, text + choice.text, logprobs, choice.finish_reason, choice.stop_reason))
    return _chunk(head, answers, usage_of(tally))


class CompletionChunker:
    """A chunk with the echo, if any, one for each output that says something, then one with the finish reason."""

    def __init__(self, head: Head, *, include_usage: bool, n: int = 1, echo: Sequence[str] | None = None) -> None:
        self._head = head
        self._include_usage = include_usage
        self._n = n
        self._echo = echo
        self._tally = Tally(n)
        self._offsets: dict[int, TextOffsets] = {}
        self._prompts: dict[int, list[PositionLogprobs]] = {}  # by the prompt's number

    def events(self, index: int, output: RequestOutput) -> bytes:
        self._tally.add(index, output)
        self._prompts.setdefault(index // self._n, []).extend(output.prompt_logprobs or ())
        events = b""
        if index not in self._offsets and (output.token_ids or output.finish_reason is not None):
            events += self._begin(index)
        if output.text or output.logprobs:
            logprobs = completion_logprobs(output.logprobs, self._offsets[index]) if output.logprobs else None
            events += self._event(CompletionChoice(index, output.text, logprobs))
        if output.finish_reason is not None:
            finish = CompletionChoice(index, "", finish_reason=output.finish_reason, stop_reason=output.stop_reason)
            events += self._event(finish)
        return events

    def last_events(self) -> bytes:
        return event(_chunk(self._head, [], usage_of(self._tally))) if self._include_usage else b""

    def _begin(self, index: int) -> bytes:
        """The prompt has been computed: it is told if it is to be."""
        text = "" if self._echo is None else self._echo[index // self._n]
        self._offsets[index] = offsets = TextOffsets(text)
        if self._echo is None:
            return b""
        prompt = self._prompts[index // self._n]
        logprobs = completion_logprobs((), offsets, prompt=prompt) if prompt else None
        return self._event(CompletionChoice(index, text, logprobs))

    def _event(self, choice: CompletionChoice) -> bytes:
        return event(_chunk(self._head, [choice], None if self._include_usage else UNSET))
