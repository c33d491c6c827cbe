"""server/routes/models.py and server/routes/tokenize.py."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from tests.server.fake_engine import FakeEngine


async def test_every_served_name_is_listed(client: httpx.AsyncClient) -> None:
    answer = (await client.get("/v1/models")).json()
    assert answer["object"] == "list"
    assert [card["id"] for card in answer["data"]] == ["fake", "org/alias"]
    card = answer["data"][0]
    assert card.pop("created") > 0
    assert card == {
        "id": "fake",
        "object": "model",
        "owned_by": "foregate",
        "root": "fake",
        "parent": None,
        "max_model_len": 64,
    }


async def test_a_model_is_found_by_its_name_even_with_a_slash(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/models/org/alias")).json()["id"] == "org/alias"
    missing = await client.get("/v1/models/nobody")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


async def test_the_openai_client_lists_the_models(client: httpx.AsyncClient) -> None:
    sdk = openai.AsyncOpenAI(api_key="k", base_url="http://test/v1", http_client=client, max_retries=0)
    assert [model.id async for model in await sdk.models.list()] == ["fake", "org/alias"]
    assert (await sdk.models.retrieve("fake")).id == "fake"


async def test_text_becomes_tokens_and_back(client: httpx.AsyncClient) -> None:
    answer = (await client.post("/tokenize", json={"prompt": "hé"})).json()
    assert answer == {"count": 3, "max_model_len": 64, "tokens": [104, 195, 169]}
    assert (await client.post("/detokenize", json={"tokens": answer["tokens"]})).json() == {"prompt": "hé"}


async def test_messages_are_tokenized_through_the_template(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "add_generation_prompt": False}
    assert (await client.post("/tokenize", json=body)).json()["tokens"] == list(b"<user>a")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": False}, "add_special_tokens"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [256]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
    ],
)
async def test_what_cannot_be_tokenized_is_refused(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], param: str
) -> None:
    response = await client.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_the_openapi_document_defines_every_body_it_points_to(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).text
    schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
    pointed_to = {part.partition('"')[0] for part in document.split("#/components/schemas/")[1:]}
    assert {"ChatRequest", "CompletionRequest", "Message"} <= pointed_to <= set(schemas)
    assert "temperature" in schemas["ChatRequest"]["properties"]
