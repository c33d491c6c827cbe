"""Which JSON schemas can be enforced: every keyword is either enforced, or an annotation, or refused by its name."""

from __future__ import annotations

import json
from typing import Any

from engine.errors import InvalidRequest

MAX_DEPTH = 64  # objects and arrays within each other

# what llguidance enforces (its docs/json_schema.md)
_ENFORCED = frozenset(
    {
        *("type", "const", "enum", "anyOf", "oneOf", "allOf", "$ref", "$defs", "definitions"),
        *("items", "additionalItems", "prefixItems", "minItems", "maxItems"),
        *("properties", "additionalProperties", "patternProperties", "required", "minProperties", "maxProperties"),
        *("minLength", "maxLength", "pattern", "format"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    }
)
# what says nothing of which values are valid (JSON Schema 2020-12 core and meta-data; OpenAPI 3.1's own)
_ANNOTATIONS = frozenset(
    {
        *("$schema", "$id", "id", "$anchor", "$comment", "$vocabulary", "title", "description", "default", "examples"),
        *("deprecated", "readOnly", "writeOnly", "contentMediaType", "contentEncoding"),
        *("example", "externalDocs", "discriminator", "xml"),
    }
)
# At most so much white space between two tokens of JSON: without a bound a model can go on with it for ever.
_OPTIONS = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,32}"}
_OF_ONE_SCHEMA = frozenset({"items", "additionalItems", "additionalProperties"})
_OF_MANY_SCHEMAS = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})
_COMBINING = frozenset({"anyOf", "oneOf", "$ref"})
_OF_OBJECTS = frozenset(
    {"properties", "patternProperties", "additionalProperties", "required", "minProperties", "maxProperties"}
)
_OF_NAMED_SCHEMAS = frozenset({"properties", "patternProperties", "$defs", "definitions"})


def json_rule(schema: Any, param: str) -> str:
    """An expression of llguidance's grammars that matches JSON by the schema; raises as `enforceable`."""
    kept = enforceable(schema, param)
    if kept is False:
        raise InvalidRequest("no value is valid by the schema false", param=param)
    return "%json " + json.dumps({"x-guidance": _OPTIONS, **({} if kept is True else kept)})


def enforceable(schema: Any, param: str) -> Any:
    """The schema without its annotations; raises `InvalidRequest` naming a keyword that cannot be enforced.

    `$schema` is an annotation too: all keywords mean what they mean in draft 2020-12. An object whose schema names its
    properties, and says nothing of others, gets no others: models that may always add one more never come to an end.
    """
    if _is_deeper(schema, MAX_DEPTH):
        raise InvalidRequest(f"the schema is nested more than {MAX_DEPTH} levels deep", param=param)
    walk = _Walk(param)
    kept = walk.enforced(schema, "")
    if not walk.is_combined:
        for closable in walk.closable:
            closable["additionalProperties"] = False
    return kept


class _Walk:
    def __init__(self, param: str) -> None:
        self._param = param
        self.closable: list[dict[str, Any]] = []
        self.is_combined = False  # some schemas hold together, so that none can be closed by itself

    def enforced(self, schema: Any, path: str) -> Any:
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise self._refusal(f"the schema at #{path} must be an object or a boolean")
        kept: dict[str, Any] = {}
        for keyword, value in schema.items():
            if keyword in _ANNOTATIONS or (keyword.startswith("x-") and keyword != "x-guidance"):
                continue
            if keyword not in _ENFORCED:
                raise self._refusal(f"the schema's keyword {keyword[:100]!r} at #{path} cannot be enforced")
            kept[keyword] = self._value(keyword, value, path)
        if _is_closable(kept):
            self.closable.append(kept)
        self.is_combined |= "allOf" in kept or bool(_COMBINING & kept.keys() and _OF_OBJECTS & kept.keys())
        return kept

    def _value(self, keyword: str, value: Any, path: str) -> Any:
        place = f"{path}/{keyword}"
        if keyword in _OF_MANY_SCHEMAS or (keyword == "items" and isinstance(value, list)):
            if not isinstance(value, list):
                raise self._refusal(f"the schema's {keyword} at #{path} must be a list")
            return [self.enforced(one, f"{place}/{i}") for i, one in enumerate(value)]
        if keyword in _OF_ONE_SCHEMA:
            return self.enforced(value, place)
        if keyword in _OF_NAMED_SCHEMAS:
            if not isinstance(value, dict):
                raise self._refusal(f"the schema's {keyword} at #{path} must be an object")
            return {name: self.enforced(one, f"{place}/{name}"[:200]) for name, one in value.items()}
        return value

    def _refusal(self, message: str) -> InvalidRequest:
        return InvalidRequest(message, param=self._param)


def _is_closable(schema: dict[str, Any]) -> bool:
    properties, required, least = (schema.get(name) for name in ("properties", "required", "minProperties"))
    return (
        isinstance(properties, dict)
        and not {"additionalProperties", "patternProperties"} & schema.keys()
        and (required is None or (isinstance(required, list) and all(name in properties for name in required)))
        and (least is None or (isinstance(least, int) and least <= len(properties)))
    )


def _is_deeper(value: Any, limit: int) -> bool:
    """Level by level: a text may nest deeper than Python's own stack."""
    level = [value]
    for _ in range(limit):
        level = [inner for outer in level for inner in _inner(outer) if isinstance(inner, (dict, list))]
        if not level:
            return False
    return True


def _inner(outer: Any) -> list[Any]:
    if isinstance(outer, dict):
        return list(outer.values())
    return outer if isinstance(outer, list) else []
