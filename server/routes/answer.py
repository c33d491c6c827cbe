"""What the two completion routes do alike once they have their jobs: run them, and answer in one piece or a stream."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from server.collect import Collected, Tally
from server.context import AppContext
from server.generation import Job, Outputs, collect, first_output, run_jobs
from server.metrics import RequestTimer
from server.middleware import endpoint_of, record_of
from server.sse import Chunker, EventStream


class Head(msgspec.Struct, frozen=True):
    """What the answer and all chunks of one request have in common."""

    id: str
    created: int
    model: str
    fingerprint: str


def new_head(ctx: AppContext, prefix: str, model: str) -> Head:
    return Head(f"{prefix}-{uuid.uuid4().hex}", int(ctx.now()), model, ctx.fingerprint())


def json_response(message: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(message), media_type="application/json")


async def answer_whole(
    ctx: AppContext,
    request: Request,
    jobs: Sequence[Job],
    build: Callable[[list[Collected], Tally], msgspec.Struct],
    *,
    n: int = 1,
) -> Response:
    """`n`: choices of each prompt. Raises the engine's errors, `GenerationFailed` and `ClientGone`."""
    record = record_of(request)
    outputs = _outputs(ctx, request, jobs)
    choices, tally = await collect(outputs, request.receive, len(jobs), n=n)
    record.finish_reason = choices[0].finish_reason or ""
    return json_response(build(choices, tally))


async def answer_stream(ctx: AppContext, request: Request, jobs: Sequence[Job], chunker: Chunker) -> Response:
    """Raises what fails before the first output; what fails later becomes an event of the stream."""
    record = record_of(request)
    record.stream = True
    outputs = _outputs(ctx, request, jobs)
    first = await first_output(outputs, request.receive)
    return EventStream(
        first,
        outputs,
        chunker,
        record,
        heartbeat_s=ctx.settings.heartbeat_s,
        send_timeout_s=ctx.settings.send_timeout_s,
    )


def _outputs(ctx: AppContext, request: Request, jobs: Sequence[Job]) -> Outputs:
    record = record_of(request)
    timer = RequestTimer(ctx.metrics, record.started_s, ctx.clock)
    record.logged = ctx.requests.begin(record, endpoint_of(request.scope), timer)
    return run_jobs(ctx.engine, jobs, record.logged, max_parallel=ctx.settings.max_parallel_prompts)
