from __future__ import annotations

from typing import Any

import httpx
import numpy as np

from cache.expert_table import ExpertTable
from server.auth import hash_key
from tests.server.fake_engine import FakeEngine

TABLE = ExpertTable(
    layers=[1, 3],
    num_experts=3,
    half_life_s=10.0,
    queries=np.array([4, 0, 2, 1, 1, 2**40], dtype="<u8").tobytes(),
    hits=np.array([3, 0, 0, 1, 0, 2**40], dtype="<u8").tobytes(),
    recent=np.array([1.234, 0, 0.5, 0, 0, 7], dtype="<f4").tobytes(),
    residency=bytes([2, 0, 1, 0, 0, 2]),
)


async def test_counts_and_places_are_told_layer_by_layer(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.table = TABLE
    response = await client.get("/v1/experts/stats")
    assert response.headers["cache-control"] == "no-store"
    assert response.json() == {
        "object": "experts.stats",
        "model": "fake",
        "layers": [1, 3],
        "num_experts": 3,
        "queries": [[4, 0, 2], [1, 1, 2**40]],
        "hits": [[3, 0, 0], [1, 0, 2**40]],
        "recent": [[1.23, 0.0, 0.5], [0.0, 0.0, 7.0]],
        "half_life_s": 10.0,
        "residency": [[2, 0, 1], [0, 0, 2]],
        "residency_names": ["absent", "host", "top"],
        "totals": {
            "experts": 6,
            "queries": 2**40 + 8,
            "hits": 2**40 + 4,
            "misses": 4,
            "residency": {"absent": 3, "host": 1, "top": 2},
        },
    }


async def test_a_model_without_experts_has_empty_tables(client: httpx.AsyncClient) -> None:
    body = (await client.get("/v1/experts/stats")).json()
    assert (body["layers"], body["queries"], body["num_experts"]) == ([], [], 0)
    assert body["totals"]["experts"] == 0


async def test_it_needs_the_key_and_a_loaded_model(connect: Any, engine: FakeEngine) -> None:
    client = connect(api_key_hashes=(hash_key("k"),))
    assert (await client.get("/v1/experts/stats")).status_code == 401
    client.headers["authorization"] = "Bearer k"
    assert (await client.get("/v1/experts/stats")).status_code == 200
    engine.state = "loading"
    response = await client.get("/v1/experts/stats")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "loading")


async def test_the_answer_is_what_openapi_says(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.table = TABLE
    api = (await client.get("/openapi.json")).json()
    answer = api["paths"]["/v1/experts/stats"]["get"]["responses"]["200"]
    name = answer["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[-1]
    told = (await client.get("/v1/experts/stats")).json()
    assert set(told) == set(api["components"]["schemas"][name]["properties"])
    assert set(told["totals"]) == set(api["components"]["schemas"]["ExpertTotals"]["properties"])
