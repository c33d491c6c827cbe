"""server/openapi.py: what /openapi.json says holds. Schemathesis makes requests of it and judges the answers."""

from __future__ import annotations

import logging
from typing import Any

import httpx
import hypothesis
import pytest
import schemathesis
from schemathesis.specs.openapi.checks import positive_data_acceptance

from engine.messages import TraceRecorded
from server.app import create_app
from server.auth import hash_key
from server.routes import ROUTERS
from server.settings import AppSettings
from tests.server.fake_engine import FakeEngine

KEY = {"Authorization": "Bearer key"}


class Prompt(FakeEngine):
    """Records no longer than a test may take."""

    async def record_trace(self, **_: Any) -> TraceRecorded:
        return self.recorded


def make_schema() -> Any:
    settings = AppSettings(served_names=("fake",), accept_any_model_name=True, api_key_hashes=(hash_key("key"),))
    return schemathesis.openapi.from_asgi("/openapi.json", create_app(Prompt(), settings), headers=KEY)


SCHEMA = make_schema()
OPERATIONS = {operation.ok().label: operation.ok() for operation in SCHEMA.get_all_operations()}
NO_KEY = {"GET /health", "GET /ready", "GET /live"}  # nothing that could be wrong can be sent to these


@pytest.mark.parametrize(
    ("label", "mode"),
    [
        (label, mode)
        for label in OPERATIONS
        for mode in schemathesis.GenerationMode
        if label not in NO_KEY or mode is schemathesis.GenerationMode.POSITIVE
    ],
)
def test_what_the_schema_allows_or_forbids_is_answered_as_it_says(
    label: str, mode: schemathesis.GenerationMode
) -> None:
    logging.getLogger("foregate.server").setLevel(logging.ERROR)  # unknown fields
    operation = OPERATIONS[label]
    statuses = set()

    @hypothesis.settings(
        max_examples=20 if label.startswith("POST") else 4,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
        deadline=None,
        database=None,
        derandomize=True,
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        response = case.call(headers=KEY)
        statuses.add(response.status_code)
        # a schema cannot say all that a model cannot do: its vocabulary, its context, what excludes what
        case.validate_response(response, headers=KEY, excluded_checks=[positive_data_acceptance])

    run()
    assert statuses
    assert max(statuses) < 500


def test_every_route_is_described_with_what_it_takes_answers_and_refuses() -> None:
    schema = SCHEMA.raw_schema
    assert schema["openapi"].startswith("3.1")
    assert len(schema["paths"]) >= len(ROUTERS)
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/admin/trace"} <= set(
        schema["paths"]
    )
    for path, item in schema["paths"].items():
        for method, operation in item.items():
            assert operation["responses"]["200"]["content"], path
            assert "422" not in operation["responses"]
            if path.startswith(("/v1/chat", "/v1/completions", "/tokenize")):
                assert "requestBody" in operation
            if "requestBody" in operation:
                assert "$ref" in operation["requestBody"]["content"]["application/json"]["schema"]
                assert {"400", "401", "413", "415", "503"} <= set(operation["responses"]), path
            assert ("security" in operation) == (f"{method.upper()} {path}" not in NO_KEY)
    references = set(_references(schema))
    assert references <= {f"#/components/schemas/{name}" for name in schema["components"]["schemas"]}


def _references(node: Any) -> Any:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from _references(value)
    elif isinstance(node, list):
        for value in node:
            yield from _references(value)


@pytest.mark.parametrize("value", [5.0, 5])
async def test_a_number_without_a_fraction_is_an_integer_as_json_has_it(
    client: httpx.AsyncClient, engine: FakeEngine, value: float
) -> None:
    assert (await client.post("/v1/completions", json={"prompt": "hi", "max_tokens": value})).status_code == 200
    assert engine.seen[-1][2].max_tokens == 5
    assert (await client.post("/v1/completions", json={"prompt": "hi", "max_tokens": 5.5})).status_code == 400
