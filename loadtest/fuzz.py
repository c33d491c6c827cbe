"""`python -m loadtest.fuzz URL`: many malformed and unusual requests to a running server; no answer may be its fault.

Bodies are real ones with fields replaced, added, removed or repeated, bytes flipped or cut, in the odd encoding, method
or path. Expected are answers below 500, and 503 with Retry-After from a full queue. Exit status 1 for anything else.
Where a request's limit was mutated away, it generates to the end of the context: serve with a small `--max-model-len`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from typing import Any

import httpx

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
BASES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "hi", "max_tokens": 2},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [1, 2, 3]},
}
PATHS = (
    "/v1/models",
    "/v1/models/x%00y",
    "/metrics",
    "/health",
    "/version",
    "/openapi.json",
    "/v1/experts/stats",
    "/%ff",
)
ATOMS: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 16, 127, 10**30, -(2**63), 2**63, 0.5, -0.0, 1e308, 1e-320),
    *(
        "",
        "hi",
        "\x00",
        "\U0001f600",
        "é" * 500,
        "a" * 20_000,
        "{{ 1 }}",
        "<|im_end|>",
        "auto",
        "required",
        "json_object",
    ),
    *([], {}, [[]], [1, 2], ["a", "b"], [[1], [2]], {"type": "text"}, {"type": "json_object"}, {"a": {"b": {"c": []}}}),
]
SCHEMAS: tuple[Any, ...] = (
    *({"type": "object"}, {"$ref": "#"}, {"type": "nothing"}, {"pattern": "("}, {"enum": []}, True),
)
HINTS: dict[str, list[Any]] = {
    "messages": [
        [{"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {}}]}],
        [{"role": "tool", "content": "x", "tool_call_id": "1"}],
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}],
    ],
    "response_format": [{"type": "json_schema", "json_schema": {"name": "a", "schema": schema}} for schema in SCHEMAS],
    "tools": [[{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}], [{}]],
    "tool_choice": [{"type": "function", "function": {"name": "f"}}],
    "structured_outputs": [{"regex": "a*"}, {"regex": "((a*)*)*b"}, {"choice": []}, {"grammar": "root ::= root"}],
    "stream_options": [{"include_usage": True}, {"x": 1}],
    "logit_bias": [{"1": 5}, {"-1": 1}, {"1e9": 1}],
}


def anything(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.random()
    if depth > 3 or kind < 0.7:
        return rng.choice(ATOMS)
    if kind < 0.85:
        return [anything(rng, depth + 1) for _ in range(rng.randrange(5))]
    keys = ("role", "content", "type", "text", "name", "schema", "function", "1", "\x00", "é")
    return {rng.choice(keys): anything(rng, depth + 1) for _ in range(rng.randrange(5))}


def mutated(rng: random.Random, base: dict[str, Any], fields: list[str]) -> bytes:
    """A body that is nearly one that the server takes."""
    body = json.loads(json.dumps(base))
    for _ in range(rng.randrange(1, 4)):
        name = rng.choice(fields)
        body[name] = rng.choice(HINTS[name]) if name in HINTS and rng.random() < 0.5 else anything(rng)
    if rng.random() < 0.05:
        body.pop(rng.choice(list(body)))
    if "max_tokens" in base and body.get("max_tokens") is None and body.get("max_completion_tokens") is None:
        body["max_tokens"] = 2  # not as many as the context holds, which is no fault but takes its time
    raw = json.dumps(body, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    kind = rng.random()
    if kind < 0.05:
        raw = raw[: rng.randrange(len(raw))]
    elif kind < 0.1:
        at = rng.randrange(len(raw))
        raw = raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1 :]
    elif kind < 0.12:
        raw = rng.choice((b"[" * 60_000, b'{"a":' * 20_000, b"\xff\xfe", b"", b"1" * 5000, raw + raw))
    return raw


def request_of(rng: random.Random, fields: dict[str, list[str]]) -> dict[str, Any]:
    """The arguments of `httpx.AsyncClient.request`."""
    if rng.random() < 0.05:
        return {"method": rng.choice(("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS")), "url": rng.choice(PATHS)}
    path = rng.choice(list(BASES))
    headers = {"content-type": "application/json"}
    if rng.random() < 0.03:
        headers = {
            "content-type": rng.choice(("text/plain", "application/json; charset=utf-16", "x", "multipart/form-data"))
        }
    if rng.random() < 0.03:
        headers["content-encoding"] = rng.choice(("gzip", "identity", "br"))
    if rng.random() < 0.03:
        headers["x-request-id"] = rng.choice(("a" * 1000, "ok", "%00", "a b"))
    return {"method": "POST", "url": path, "headers": headers, "content": mutated(rng, BASES[path], fields[path])}


async def fields_of(client: httpx.AsyncClient) -> dict[str, list[str]]:
    """The fields of each body as /openapi.json has them, and some that it has not."""
    schema = (await client.get("/openapi.json")).raise_for_status().json()
    fields: dict[str, list[str]] = {}
    for path in BASES:
        reference = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        known = schema["components"]["schemas"][reference.rpartition("/")[2]]["properties"]
        fields[path] = sorted({*known, *HINTS, "guided_json", "unknown", "prompt_logprobs", "reasoning_effort"})
    return fields


async def fuzz(
    url: str, num_requests: int, concurrency: int, seed: int, key: str | None
) -> tuple[Counter[str], list[str]]:
    """-> how many answers of each status, and what should not have been."""
    rng = random.Random(seed)
    statuses: Counter[str] = Counter()
    faults: list[str] = []
    headers = {"authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=120, trust_env=False) as client:
        fields = await fields_of(client)
        left = iter(range(num_requests))

        async def work() -> None:
            for _ in left:
                asked = request_of(rng, fields)
                try:
                    response = await client.request(**asked)
                except httpx.TransportError as error:
                    statuses[type(error).__name__] += 1
                    faults.append(f"{type(error).__name__}: {asked}"[:2000])
                    continue
                statuses[str(response.status_code)] += 1
                overloaded = response.status_code == 503 and "retry-after" in response.headers
                is_fault = response.status_code >= 500 or b'"type":"server_error"' in response.content  # in a stream
                if is_fault and not overloaded:
                    faults.append(f"{response.status_code} {response.text[:300]}: {asked}"[:2000])

        await asyncio.gather(*(work() for _ in range(concurrency)))
    return statuses, faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--key")
    options = parser.parse_args()
    began = time.monotonic()
    statuses, faults = asyncio.run(fuzz(options.url, options.requests, options.concurrency, options.seed, options.key))
    for fault in faults[:20]:
        sys.stderr.write(f"{fault}\n")
    result = {
        "num_requests": options.requests,
        "seconds": round(time.monotonic() - began, 1),
        "statuses": dict(sorted(statuses.items())),
        "unexpected": len(faults),
    }
    sys.stdout.write(f"{json.dumps(result)}\n")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
