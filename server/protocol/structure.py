"""`response_format` and `structured_outputs`: what an answer's text must be, in the words of OpenAI and of vLLM."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from engine.sampling_params import MAX_STRUCTURE_CHARS, Structure
from server.errors import BadRequest


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class TextFormat(_Strict):
    type: Literal["text"]


class JsonObjectFormat(_Strict):
    type: Literal["json_object"]


class JsonSchema(BaseModel):
    """`strict` is without effect: the schema is enforced in any case."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, populate_by_name=True)

    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class JsonSchemaFormat(_Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StructuredOutputs(_Strict):
    """One of these."""

    json_: Annotated[dict[str, Any] | bool | str | None, Field(alias="json")] = None
    json_object: Literal[True] | None = None
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: str | None = None


def structure_of(format: ResponseFormat | None, outputs: StructuredOutputs | None) -> Structure | None:
    """Raises `BadRequest`. Whether it can be enforced is found out by the engine."""
    if outputs is None:
        return _of_format(format)
    if format is not None and not isinstance(format, TextFormat):
        raise BadRequest("response_format and structured_outputs cannot both be given", param="structured_outputs")
    given = [name for name, value in outputs.model_dump().items() if value is not None]
    if len(given) != 1:
        raise BadRequest(
            "structured_outputs must be one of json, json_object, regex, choice and grammar", param="structured_outputs"
        )
    name = given[0].rstrip("_")
    param = f"structured_outputs.{name}"
    if outputs.json_ is not None:
        return Structure(kind="json", source=_json(outputs.json_, param), param=param)
    if outputs.json_object is not None:
        return Structure(kind="json", source='{"type":"object"}', param=param)
    if outputs.regex is not None:
        return Structure(kind="regex", source=outputs.regex, param=param)
    if outputs.choice is not None:
        return Structure(kind="choice", source=_json(outputs.choice, param), param=param)
    return Structure(kind="grammar", source=outputs.grammar or "", param=param)


def _of_format(format: ResponseFormat | None) -> Structure | None:
    match format:
        case JsonObjectFormat():
            return Structure(kind="json", source='{"type":"object"}', param="response_format")
        case JsonSchemaFormat(json_schema=JsonSchema(schema_=schema)):
            param = "response_format.json_schema.schema"
            return Structure(kind="json", source=_json({} if schema is None else schema, param), param=param)
        case _:
            return None


def _json(value: Any, param: str) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) > MAX_STRUCTURE_CHARS:
        raise BadRequest(f"{param} has more than {MAX_STRUCTURE_CHARS} characters", param=param)
    return text
