"""response_format and structured_outputs: what of them reaches the engine, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from engine.errors import InvalidRequest
from engine.sampling_params import MAX_STRUCTURE_CHARS
from tests.server.fake_engine import FakeEngine, Script

URLS = {"/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]}, "/v1/completions": {"prompt": "hi"}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def by_schema(**fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "thing", **fields}}


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize(
    ("fields", "kind", "source", "param"),
    [
        ({"response_format": {"type": "json_object"}}, "json", {"type": "object"}, "response_format"),
        ({"response_format": by_schema(schema=SCHEMA)}, "json", SCHEMA, "response_format.json_schema.schema"),
        ({"response_format": by_schema(schema=SCHEMA, strict=True, description="d")}, "json", SCHEMA,
         "response_format.json_schema.schema"),
        ({"response_format": by_schema()}, "json", {}, "response_format.json_schema.schema"),
        ({"structured_outputs": {"json": SCHEMA}}, "json", SCHEMA, "structured_outputs.json"),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "json", SCHEMA, "structured_outputs.json"),
        ({"structured_outputs": {"json": True}}, "json", True, "structured_outputs.json"),
        ({"structured_outputs": {"json_object": True}}, "json", {"type": "object"}, "structured_outputs.json_object"),
        ({"structured_outputs": {"choice": ["a", "ü"]}}, "choice", ["a", "ü"], "structured_outputs.choice"),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+", "structured_outputs.regex"),
        ({"structured_outputs": {"grammar": "start: 5"}}, "grammar", "start: 5", "structured_outputs.grammar"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "text"}}, "regex", "a",
         "structured_outputs.regex"),
    ],
)  # fmt: skip
async def test_a_structure_reaches_the_engine(
    client: httpx.AsyncClient, engine: FakeEngine, url: str, fields: Any, kind: str, source: Any, param: str
) -> None:
    assert (await client.post(url, json={**URLS[url], **fields})).status_code == 200
    structure = engine.seen[0][2].structure
    assert structure is not None
    assert (structure.kind, structure.param, structure.prelude) == (kind, param, "")
    assert (json.loads(structure.source) if kind in ("json", "choice") else structure.source) == source


@pytest.mark.parametrize("url", URLS)
async def test_text_is_no_structure(client: httpx.AsyncClient, engine: FakeEngine, url: str) -> None:
    for fields in ({"response_format": {"type": "text"}}, {"response_format": None, "structured_outputs": None}):
        assert (await client.post(url, json={**URLS[url], **fields})).status_code == 200
        assert engine.seen[-1][2].structure is None


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format"),
        ({"response_format": by_schema(schema=5)}, "response_format"),
        ({"response_format": by_schema(schema={"a": "x" * MAX_STRUCTURE_CHARS})}, "response_format"),
        ({"response_format": by_schema(guided=True)}, "response_format"),
        ({"response_format": "json_object"}, "response_format"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
        ({"structured_outputs": {"choice": [1]}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "disable_fallback": True}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"guided_json": SCHEMA}, "guided_json"),
    ],
)
async def test_a_bad_structure_is_refused_by_name(
    client: httpx.AsyncClient, engine: FakeEngine, url: str, fields: Any, param: str
) -> None:
    response = await client.post(url, json={**URLS[url], **fields})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith(param)
    assert len(response.text) < 2500
    assert engine.seen == []


async def test_what_the_engine_cannot_enforce_is_400_naming_the_parameter(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.script = Script(refusal=InvalidRequest("'not' cannot be enforced", param="response_format"))
    for stream in (False, True):
        body = {**URLS["/v1/chat/completions"], "response_format": by_schema(schema={"not": {}}), "stream": stream}
        response = await client.post("/v1/chat/completions", json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "response_format")


async def test_a_schema_of_60000_nested_brackets_is_400(client: httpx.AsyncClient) -> None:
    schema = '{"items":' * 60_000 + "{}" + "}" * 60_000
    raw = '{"messages": [{"role": "user", "content": "hi"}], "response_format": {"type": "json_schema", "json_schema": '
    raw += '{"name": "x", "schema": ' + schema + "}}}"
    headers = {"content-type": "application/json"}
    assert (await client.post("/v1/chat/completions", content=raw, headers=headers)).status_code == 400
