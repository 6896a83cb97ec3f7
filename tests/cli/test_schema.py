"""The JSON Schemas that are printed."""

import json
from typing import Any

import pytest
from command import rejoinder

from rejoinder.cli.schema import Part, schema_of


def references(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return own.union(*map(references, value.values()))
    return set().union(*map(references, value)) if isinstance(value, list) else set()


@pytest.mark.parametrize("part", Part)
def test_each_is_complete_in_itself(part: Part, tmp_path) -> None:
    done = rejoinder("schema", part.value, cwd=tmp_path)
    assert done.returncode == 0
    schema = json.loads(done.stdout)
    assert schema == schema_of(part)
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert references(schema) <= {f"#/$defs/{name}" for name in schema.get("$defs", {})}


def test_a_request_says_one_of_body_and_location_and_the_body_of_each_path() -> None:
    schema = schema_of(Part.REQUEST)
    assert schema["required"] == ["metadata"]
    body, location = schema["oneOf"]
    assert body["required"] == ["body"]
    assert location["required"] == ["input_location"]
    assert location["not"] == {"required": ["body"]}
    bodies = {
        rule["if"]["properties"]["path"]["enum"][0]: rule["then"]["properties"]["body"]["$ref"]
        for rule in schema["allOf"]
    }
    assert bodies == {
        "/v1/completions": "#/$defs/CompletionRequest",
        "/v1/chat/completions": "#/$defs/ChatCompletionRequest",
        "/v1/embeddings": "#/$defs/EmbeddingRequest",
        "/v1/rerank": "#/$defs/RerankRequest",
    }
    assert "prompt" in schema["$defs"]["CompletionRequest"]["properties"]


def test_a_response_says_its_error() -> None:
    schema = schema_of(Part.RESPONSE)
    assert set(schema["required"]) >= {"status_code", "metadata"}
    assert schema["then"]["properties"]["body"]["anyOf"][0] == {"$ref": "#/$defs/ErrorBody"}


def test_an_unknown_part_is_refused_by_name(tmp_path) -> None:
    done = rejoinder("schema", "nothing", cwd=tmp_path)
    assert done.returncode == 2
    assert b"'nothing' is not one of" in done.stderr
