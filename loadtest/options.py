"""The options that the load test adds to locust's, on the command line and in its web page."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from loadtest import prompts
from loadtest.prompts import Prompts
from loadtest.scenarios import SCENARIOS, Load

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}


def seconds(text: str) -> float:
    """seconds("90") == seconds("1m30s") == 90; raises `ValueError`."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"{text!r} is no duration; write it like 90, 30s, 5m or 1h30m")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


def add_options(parser: Any) -> None:
    """`parser` is locust's, which is argparse's with a few arguments more."""

    def add(name: str, help: str, **more: Any) -> None:
        parser.add_argument(name, help=help, **more)

    add("--scenario", "What the load is like", choices=sorted(SCENARIOS), default="steady")
    add("--duration", "For how long requests are sent: 90, 30s, 5m", default="60s")
    add("--rate", "Requests a second, sent when they are due (open loop)", type=float)
    add("--concurrency", "Without --rate: users that wait for an answer before they ask again", type=int, default=8)
    add("--output-tokens", "Of an answer at most", type=int, default=64)
    add("--exact-output", "Answers are exactly that long: ends are ignored", action="store_true")
    add("--prompts", "A file with a prompt a line, or a .jsonl with `prompt` and `domain`", default="")
    add("--domains", "Only prompts of these domains, separated by commas", default="")
    add("--burst-size", "burst: requests at one instant", type=int, default=20)
    add("--burst-every", "burst: seconds between them", type=float, default=10.0)
    add("--cancel-share", "Share of requests whose client hangs up [cancel-storm: 0.5]", type=float)
    add("--cancel-within", "It does so after up to so many seconds", type=float, default=2.0)
    add("--prompt-words", "long-prompts: about so many in each", type=int, default=2000)
    add("--temperature", "Of sampling; without it the model's own", type=float)
    add("--model", "Its name in the API; without it the first of /v1/models", default="")
    add("--expect", "Codes that are refusals, not errors, separated by commas: 503,429", default="")
    add("--drain", "Seconds that running requests have to end after the last was sent", type=float, default=60.0)
    add("--seed", "Of prompts, arrivals and cancels; without it others each time", type=int)
    add("--result", "Write the figures there as JSON", default="")
    add(
        "--api-key",
        "What to present; or set FOREGATE_API_KEY",
        env_var="FOREGATE_API_KEY",
        default="",
        is_secret=True,
    )


def load_of(options: argparse.Namespace) -> Load:
    """Raises `ValueError`."""
    return Load(
        duration_s=seconds(options.duration),
        rate=options.rate or None,
        users=options.concurrency,
        burst_size=options.burst_size,
        burst_every_s=options.burst_every,
        cancel_share=options.cancel_share,
        cancel_within_s=options.cancel_within,
        prompt_words=options.prompt_words,
    )


def prompts_of(options: argparse.Namespace) -> Prompts:
    """Raises `ValueError` and `OSError`."""
    chosen = prompts.from_file(Path(options.prompts)) if options.prompts else prompts.built_in()
    domains = [name.strip() for name in options.domains.split(",") if name.strip()]
    return chosen.of(domains) if domains else chosen


def expected_of(options: argparse.Namespace) -> frozenset[str]:
    return frozenset(code.strip() for code in options.expect.split(",") if code.strip())


def body_of(options: argparse.Namespace, model: str) -> dict[str, Any]:
    """What all requests have in common."""
    body: dict[str, Any] = {"model": model, "max_tokens": options.output_tokens}
    if options.exact_output:
        body["ignore_eos"] = True
    if options.temperature is not None:
        body["temperature"] = options.temperature
    return body
