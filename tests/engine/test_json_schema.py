"""Every keyword of a schema is enforced, or an annotation, or refused by its name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.errors import InvalidRequest
from engine.json_schema import MAX_DEPTH, enforceable, json_rule


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels - 1):
        schema = {"items": schema}
    return schema


def test_annotations_go_at_schemas_and_stay_in_values():
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "T",
        "description": "d",
        "type": "object",
        "properties": {"title": {"type": "string", "default": "x", "deprecated": True}, "x-y": {"const": {"title": 1}}},
        "x-order": 3,
        "required": ["title"],
        "$defs": {"description": {"enum": [{"description": 1}]}},
    }
    assert enforceable(schema, "p") == {
        "type": "object",
        "properties": {"title": {"type": "string"}, "x-y": {"const": {"title": 1}}},
        "required": ["title"],
        "$defs": {"description": {"enum": [{"description": 1}]}},
        "additionalProperties": False,
    }


def test_objects_get_no_properties_that_their_schema_does_not_name_where_that_is_sure_to_be_possible():
    names = {"properties": {"a": True}}
    assert enforceable(names, "p") == {**names, "additionalProperties": False}
    nested = {"items": {"anyOf": [names, {"$ref": "#"}]}}
    assert enforceable(nested, "p")["items"]["anyOf"][0]["additionalProperties"] is False
    for left_alone in (
        {**names, "additionalProperties": True},
        {**names, "patternProperties": {"^b": True}},
        {**names, "required": ["b"]},
        {**names, "minProperties": 2},
        {"type": "object"},
        {"allOf": [names, {"properties": {"b": True}, "required": ["b"]}]},
        {**names, "anyOf": [{"required": ["b"]}, {"properties": {"c": True}}]},
        {"$defs": {"d": names}, "$ref": "#/$defs/d", "required": ["b"]},
    ):
        assert enforceable(left_alone, "p") == left_alone


@pytest.mark.parametrize(
    "keyword",
    [
        *(
            "uniqueItems",
            "not",
            "if",
            "then",
            "contains",
            "dependentRequired",
            "propertyNames",
            "unevaluatedProperties",
        ),
        *("$dynamicRef", "nullable", "minimun", "x-guidance", ""),
    ],
)
@pytest.mark.parametrize("place", ["", "properties", "anyOf", "items", "prefixItems", "$defs", "additionalProperties"])
def test_a_keyword_that_cannot_be_enforced_is_refused_by_name_wherever_it_is(keyword: str, place: str):
    wrong: Any = {"type": "array", keyword: True}
    schemas = {
        "": wrong,
        "properties": {"properties": {"a": wrong}},
        "anyOf": {"anyOf": [True, wrong]},
        "items": {"items": wrong},
        "prefixItems": {"prefixItems": [wrong]},
        "$defs": {"$defs": {"a": wrong}},
        "additionalProperties": {"additionalProperties": wrong},
    }
    with pytest.raises(InvalidRequest, match="cannot be enforced") as caught:
        enforceable(schemas[place], "response_format")
    assert repr(keyword) in str(caught.value)
    assert f"#/{place}".rstrip("/") in str(caught.value)
    assert caught.value.param == "response_format"


@pytest.mark.parametrize("schema", [5, None, [], "x", {"items": 5}, {"anyOf": {}}, {"properties": []}, {"allOf": [3]}])
def test_what_is_no_schema_is_refused(schema: Any):
    with pytest.raises(InvalidRequest, match="must be"):
        enforceable(schema, "p")


def test_a_schema_may_be_nested_so_deep_and_no_deeper():
    assert enforceable(nested(MAX_DEPTH), "p") == nested(MAX_DEPTH)
    with pytest.raises(InvalidRequest, match="more than 64 levels"):
        enforceable(nested(MAX_DEPTH + 1), "p")
    with pytest.raises(InvalidRequest, match="more than 64 levels"):
        enforceable({"const": nested(MAX_DEPTH)}, "p")


def test_booleans_are_schemas():
    assert json.loads(json_rule(True, "p").removeprefix("%json "))
    with pytest.raises(InvalidRequest, match="no value"):
        json_rule(False, "p")
