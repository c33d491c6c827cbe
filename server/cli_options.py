"""What the commands share: their options' types and defaults, where a model is, and logging."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.config import parse_nbytes
from engine.errors import ConfigError
from server.settings import Environment

LOG_LEVELS = ("debug", "info", "warning", "error")


def _size(text: str) -> int:
    try:
        return parse_nbytes(text)
    except ConfigError as exc:
        raise typer.BadParameter(str(exc)) from None


def rate(text: str) -> float:
    if not text.endswith("/s"):
        raise typer.BadParameter(f"cannot read rate {text!r}; write it like 8GiB/s")
    rate = _size(text.removesuffix("/s"))
    if rate <= 0:
        raise typer.BadParameter("a link that carries nothing brings no expert")
    return float(rate)


def _duration(text: str) -> float:
    """'80ms' or '2s' -> seconds."""
    number, unit = (text[:-2], 1e-3) if text.endswith("ms") else (text.removesuffix("s"), 1.0)
    try:
        seconds = float(number) * unit
    except ValueError:
        seconds = 0.0
    if text == number or not 0 < seconds < float("inf"):
        raise typer.BadParameter(f"cannot read time {text!r}; write it like 80ms or 2s")
    return seconds


def _ids(text: str) -> range:
    first, _, last = text.partition("-")
    if not (first.isascii() and first.isdigit() and last.isascii() and last.isdigit() and int(first) <= int(last)):
        raise typer.BadParameter(f"cannot read token ids {text!r}; write them like 1000-29999")
    return range(int(first), int(last) + 1)


def _size_option(text: str) -> Any:
    return typer.Option(parser=_size, metavar="SIZE", help=text)


Model = Annotated[str, typer.Argument(help="A checkpoint directory, `demo`, or a hub name such as org/name.")]
Dtype = Annotated[str, typer.Option(help="Dense weights and activations: auto, float32, bfloat16, int8, int4.")]
Experts = Annotated[str, typer.Option(help="Format of the experts: auto, float32, bf16, int8 or int4.")]
ExpertMemory = Annotated[int | None, _size_option("Memory for experts, such as 512MiB [default: what fits]")]
KvMemory = Annotated[int, _size_option("Memory for keys and values, such as 2GiB.")]
OpenKvMemory = Annotated[
    int | None,
    _size_option("Memory for keys and values, such as 2GiB [default: 512MiB; on a device what serves most]"),
]
PackedDir = Annotated[Path | None, typer.Option(help="Where packed experts are kept [default: beside the checkpoint]")]
MaxModelLen = Annotated[int | None, typer.Option(min=1, help="Tokens of prompt and output together.")]
CachePolicy = Annotated[str, typer.Option(help="Which experts stay in memory: lru, lfu, slru, ...")]
Predictor = Annotated[str, typer.Option(help="What experts are read ahead by: auto or off.")]
HostMemory = Annotated[int | None, _size_option("A tier in RAM between disk and expert memory [default: none].")]
ExclusiveTiers = Annotated[bool, typer.Option(help="What is in expert memory is not in host memory too.")]
Device = Annotated[
    str,
    typer.Option(help="Where experts are computed: cpu; cuda (never met a GPU: docs/gpu.md); sim, to test."),
]
CpuExperts = Annotated[
    bool,
    typer.Option("--cpu-experts", help="With --device: missing experts may be computed on the CPU, if that is sooner."),
]
ExpertParallel = Annotated[int, typer.Option(min=1, help="Processes that share the experts.")]
PlacementFile = Annotated[
    Path | None, typer.Option("--placement", help="Which of them has which, from `foregate trace placement`.")
]
LinkBandwidth = Annotated[
    float | None,
    typer.Option(
        parser=rate,
        metavar="RATE",
        help="Make what brings experts as slow as a link of that rate: 8GiB/s. To measure.",
    ),
]
ExpertSize = Annotated[int | None, _size_option("Of one expert, such as 3.4MiB, to tell caches in bytes.")]
Scheduler = Annotated[str, typer.Option(help="expert-aware, or fcfs: first come, first served.")]
MaxStepSeqs = Annotated[int | None, typer.Option(min=1, help="Of the requests that run, in one step [default: all].")]
TargetItl = Annotated[
    float | None, typer.Option(parser=_duration, metavar="TIME", help="Between two tokens of an answer, such as 80ms.")
]
TargetTtft = Annotated[
    float | None, typer.Option(parser=_duration, metavar="TIME", help="To the first token of an answer, such as 2s.")
]
RecordTrace = Annotated[Path | None, typer.Option(help="Write which experts tokens were routed to, at the end.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads for arithmetic [default: one a core].")]
Kernels = Annotated[str, typer.Option(help="auto, native, triton (a GPU's), or reference (slow, for comparison).")]
Router = Annotated[str, typer.Option(help="layerwise, or pregated where the model has a pre-gate.")]
Seed = Annotated[int | None, typer.Option(help="For requests that bring none [default: random].")]
RandomShape = Annotated[
    str | None,
    typer.Option("--random", metavar="SHAPE", help="Random weights of a known shape (olmoe, ...) instead of MODEL."),
]
Layers = Annotated[int | None, typer.Option(min=1, help="With --random: so many layers.")]
TokenIds = Annotated[range, typer.Option(parser=_ids, metavar="FIRST-LAST", help="What prompts are drawn from.")]
LogLevel = Annotated[str, typer.Option(help=f"One of {', '.join(LOG_LEVELS)}.")]

KV_MEMORY: Any = "512MiB"  # typer passes defaults through the parser
TOKEN_IDS: Any = "1000-29999"  # no special tokens, and within the vocabularies of today


def directory_of(model: str, environment: Environment) -> Path:
    """The checkpoint directory; `demo` is pulled first where it is not here yet."""
    from engine import hub
    from server.progress import ProgressDisplay

    if model == hub.DEMO and not Path(model).is_dir():
        with ProgressDisplay() as display:
            return hub.pull(model, environment.home, display)
    return hub.resolve_model(model, environment.home)


def name_of(model: str) -> str:
    return Path(model).resolve().name if Path(model).is_dir() else model


def check_random(model: str, shape: str | None, layers: int | None) -> None:
    """Refuse what would not be honoured beside --random or without it."""
    from engine import hub

    if shape is None and layers is not None:
        raise typer.BadParameter("needs --random", param_hint="--layers")
    if shape is not None and model != hub.DEMO:
        raise typer.BadParameter("--random stands in for it; leave it out", param_hint="MODEL")


def start_logging(level: str) -> None:
    if level not in LOG_LEVELS:
        raise typer.BadParameter(f"{level!r} is not one of {', '.join(LOG_LEVELS)}", param_hint="--log-level")
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    if level == "info":
        for chatty in ("uvicorn.error", "httpx", "httpcore", "asyncio"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
