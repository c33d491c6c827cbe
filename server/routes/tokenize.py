"""POST /tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import Field

from server.body import read_body
from server.context import AppContext
from server.errors import BadRequest
from server.openapi import json_body
from server.protocol.chat import Message
from server.protocol.fields import Body, TokenId
from server.routes.answer import json_response


class TokenizeRequest(Body):
    """Either a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_generation_prompt: bool | None = None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[TokenId]


class Tokens(msgspec.Struct, frozen=True):
    count: int
    max_model_len: int
    tokens: list[int]


class Text(msgspec.Struct, frozen=True):
    prompt: str


def tokenize_router(ctx: AppContext) -> APIRouter:
    router = APIRouter()

    @router.post("/tokenize", openapi_extra=json_body(TokenizeRequest, Tokens), response_model=None)
    async def tokenize(request: Request) -> Response:
        ctx.require_engine()
        body = await read_body(request, TokenizeRequest, ctx)
        ctx.served_name(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise BadRequest("send either prompt or messages", param="prompt")
        if body.messages is not None:
            token_ids = await ctx.engine.render_chat(
                [message.rendered() for message in body.messages],
                add_generation_prompt=body.add_generation_prompt is not False,
            )
        else:
            token_ids = await ctx.engine.encode(body.prompt or "")
        return json_response(Tokens(len(token_ids), ctx.engine.info.max_model_len, token_ids))

    @router.post("/detokenize", openapi_extra=json_body(DetokenizeRequest, Text), response_model=None)
    async def detokenize(request: Request) -> Response:
        ctx.require_engine()
        body = await read_body(request, DetokenizeRequest, ctx)
        ctx.served_name(body.model)
        return json_response(Text(await ctx.engine.decode(body.tokens)))

    return router
