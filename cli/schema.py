"""`rejoinder schema`."""

import json
from enum import StrEnum
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from rejoinder.schemas.bodies import BODIES
from rejoinder.schemas.embeddings import EmbeddingRequest, RerankRequest
from rejoinder.schemas.envelope import Request, Response
from rejoinder.schemas.errors import ErrorBody
from rejoinder.schemas.openai import ChatCompletionRequest, CompletionRequest

DIALECT = "https://json-schema.org/draft/2020-12/schema"

# `input_location: null` is as good as absent.
ONE_OF_BODY_AND_LOCATION = [
    {"required": ["body"], "properties": {"input_location": {"type": "null"}}},
    {
        "required": ["input_location"],
        "properties": {"input_location": {"type": "string"}},
        "not": {"required": ["body"]},
    },
]


class Part(StrEnum):
    """What has a schema."""

    REQUEST = "request"
    RESPONSE = "response"
    COMPLETION = "completion"
    CHAT = "chat"
    EMBEDDINGS = "embeddings"
    RERANK = "rerank"


def schema(part: Annotated[Part, typer.Argument(help="Of which part of the contract.")] = Part.REQUEST) -> None:
    """Print the JSON Schema of a request, a response or a body.

    completion, chat, embeddings and rerank are the bodies of /v1/completions, /v1/chat/completions, /v1/embeddings and
    /v1/rerank. Some rules are beyond a schema (no duplicate keys, for one): the worker checks them, and so does
    rejoinder publish.
    """
    typer.echo(json.dumps(schema_of(part), indent=2, ensure_ascii=False))


def schema_of(part: Part) -> dict[str, Any]:
    """The JSON Schema of `part`, complete in itself."""
    match part:
        case Part.REQUEST:
            return _request()
        case Part.RESPONSE:
            return _response()
        case Part.COMPLETION:
            return {"$schema": DIALECT, **CompletionRequest.model_json_schema()}
        case Part.CHAT:
            return {"$schema": DIALECT, **ChatCompletionRequest.model_json_schema()}
        case Part.EMBEDDINGS:
            return {"$schema": DIALECT, **EmbeddingRequest.model_json_schema()}
        case Part.RERANK:
            return {"$schema": DIALECT, **RerankRequest.model_json_schema()}


def _request() -> dict[str, Any]:
    """The envelope, with one of body and location, and the body that its path asks for."""
    models: list[type[BaseModel]] = [Request, *BODIES.values()]
    names, schemas = models_json_schema([(model, "validation") for model in models])
    definitions = schemas["$defs"]
    envelope = definitions.pop(_name(names[Request, "validation"]))
    by_path = [
        {
            # A missing leading slash is added.
            "if": {"required": ["path", "body"], "properties": {"path": {"enum": [path, path.removeprefix("/")]}}},
            "then": {"properties": {"body": names[model, "validation"]}},
        }
        for path, model in BODIES.items()
    ]
    extra = {"oneOf": ONE_OF_BODY_AND_LOCATION, "allOf": by_path, "$defs": definitions}
    return {"$schema": DIALECT, **envelope, **extra}


def _response() -> dict[str, Any]:
    """The response, whose body is an error from status 400 on unless it went to a store."""
    names, schemas = models_json_schema([(model, "serialization") for model in (Response, ErrorBody)])
    definitions = schemas["$defs"]
    envelope = definitions.pop(_name(names[Response, "serialization"]))
    failed = {"required": ["status_code"], "properties": {"status_code": {"minimum": 400}}}
    error = {"properties": {"body": {"anyOf": [names[ErrorBody, "serialization"], {"type": "null"}]}}}
    return {"$schema": DIALECT, **envelope, "if": failed, "then": error, "$defs": definitions}


def _name(reference: dict[str, Any]) -> str:
    return str(reference["$ref"]).removeprefix("#/$defs/")
