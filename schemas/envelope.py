"""The envelope: what a producer publishes and what a consumer receives."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
)

from rejoinder.schemas.output_names import check_extension, check_filename
from rejoinder.schemas.problems import first_problem
from rejoinder.schemas.wire import WireError, read_object, safe_text, write_json

PRINTABLE = r"^[\x20-\x7e]*$"
Header = Annotated[str, Field(max_length=1024, pattern=PRINTABLE)]


def _parse_deadline(value: Any) -> Any:
    # Strict mode takes datetimes only from JSON text; here the JSON is parsed already. Numbers stay refused.
    if not isinstance(value, str):
        raise ValueError("it should be an RFC 3339 time with an offset, such as 2026-11-21T12:00:00Z")  # noqa: TRY004
    try:
        return datetime.fromisoformat(value)
    except ValueError as exc:
        raise ValueError("it should be an RFC 3339 time with an offset, such as 2026-11-21T12:00:00Z") from exc


class Options(BaseModel):
    """What a producer may ask for besides the work. The SageMaker fields have SageMaker's limits."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    inference_id: str | None = Field(
        default=None, min_length=1, max_length=64, pattern=PRINTABLE, description="Names the answer: its response id."
    )
    request_ttl_seconds: int | None = Field(
        default=None, ge=60, le=21600, description="Counted from when the broker took the request; then 408."
    )
    invocation_timeout_seconds: int | None = Field(default=None, ge=1, le=3600, description="Of inference; then 504.")
    content_type: Header | None = None
    accept: Header | None = None
    custom_attributes: Header | None = None
    output_path_extension: (
        Annotated[str, Field(min_length=1, max_length=512), AfterValidator(check_extension)] | None
    ) = Field(default=None, description="Parts of a path, put between the output path and the result's name.")
    filename: Annotated[str, Field(min_length=1, max_length=32), AfterValidator(check_filename)] | None = Field(
        default=None, description="The result's name, in a folder of its own; at most one dot."
    )
    stream: bool | None = Field(
        default=None, description="Answer in several responses, each as soon as there is something to say."
    )
    deadline: Annotated[AwareDatetime, BeforeValidator(_parse_deadline, json_schema_input_type=str)] | None = Field(
        default=None, description="RFC 3339; a request not started by then is answered 408."
    )


class Request(BaseModel):
    """One request: `path` says what to run, `metadata` rejoins the answer, `body` is the work."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    path: str | None = Field(default=None, description="Absent: the worker's default path.")
    metadata: dict[str, Any] = Field(description="The sender's own; returned exactly.")
    body: JsonValue = Field(default=None, description="What the path decides. Exactly one of body and input_location.")
    input_location: str | None = Field(
        default=None, min_length=1, max_length=1024, description="The body is this object's content."
    )
    options: Options | None = None


class Stream(BaseModel):
    """Where a response stands among those that a stream is. A later attempt is a new stream, and replaces this one."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    index: int = Field(ge=0, description="Which response of the attempt this is, from 0.")
    done: bool = Field(description="Whether it is the last one.")
    attempt: int = Field(ge=1, description="Grows with each attempt, not always by one.")
    chunks: int = Field(
        default=1, ge=0, description="1: the body is a chunk; else it is a list of so many, or nothing where 0."
    )


class Response(BaseModel):
    """One response: how it went, the request's own metadata, and the result or the error."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    status_code: int = Field(ge=100, le=599)
    metadata: dict[str, Any] | None = Field(description="As the request had it; null where it could not be read.")
    body: JsonValue = Field(default=None, description='The result, or {"error": {...}} when status_code >= 400.')
    output_location: str | None = None
    failure_location: str | None = None
    headers: dict[str, str] | None = Field(default=None, description="Those that the worker's own function gave.")
    stream: Stream | None = Field(default=None, description="Where the request asked for a stream.")


@dataclass(slots=True)  # not frozen: making one would take three times as long
class ParsedRequest:
    """A request that keeps its envelope's rules: a `Request`, but for its metadata."""

    path: str | None
    body: Any
    input_location: str | None
    options: Options | None
    metadata: str
    """The text of the metadata, as the sender wrote it."""


def parse_request(data: bytes) -> ParsedRequest:
    """Read and check the bytes of a request.

    Raises:
        WireError: what is wrong, which field, and the metadata's text where it could be read.
    """
    values, metadata = read_object(data)
    # Before pydantic, which would make an error of each: a small message of a million keys must cost no gigabytes.
    options = values.get("options")
    unknown = _unknown(options) if isinstance(options, dict) else None
    if metadata is None:
        raise WireError(
            "metadata is missing: it must be a JSON object, and comes back with the response", param="metadata"
        )
    if not isinstance(values["metadata"], dict):
        raise WireError("metadata must be a JSON object", param="metadata")
    if unknown is not None:
        message = f"options.{unknown} is not a supported option; known are {', '.join(Options.model_fields)}"
        raise WireError(message, param=f"options.{unknown}", metadata=metadata)
    if ("body" in values) == (values.get("input_location") is not None):
        problem = "body and input_location are both given" if "body" in values else "body is missing"
        raise WireError(f"{problem}: give exactly one of body and input_location", param="body", metadata=metadata)
    # The body is checked by whoever serves the path; walking it here would only cost time.
    body = values.pop("body", None)
    if _is_plain(values):
        return ParsedRequest(values.get("path"), body, None, None, metadata)
    try:
        request = Request.model_validate(values)
    except ValidationError as exc:
        message, param = first_problem(exc, Request, values)
        raise WireError(message, param=param, metadata=metadata) from exc
    return ParsedRequest(request.path, body, request.input_location, request.options, metadata)


def _unknown(options: dict[str, Any]) -> str | None:
    known = Options.model_fields
    return next((key for key in options if key not in known), None)


def _is_plain(values: dict[str, Any]) -> bool:
    """Whether a look is enough, as it is for nearly all requests, to see that `Request` takes `values` as they are.

    That `metadata` is an object is known by now.
    """
    path = values.get("path")
    return (
        (path is None or isinstance(path, str))
        and values.get("options") is None
        and values.get("input_location") is None
    )


@dataclass(frozen=True, slots=True)
class Beside:
    """What a response has beside its body, if anything. See `Response`."""

    output_location: str | None = None
    failure_location: str | None = None
    headers: Mapping[str, str] | None = None
    stream: Mapping[str, Any] | None = None
    """The fields of a `Stream`."""


NOTHING = Beside()


def write_response(status_code: int, metadata: str | None, body: Any, beside: Beside = NOTHING) -> bytes:
    """Write a response's bytes around the metadata's own text.

    Args:
        status_code: See `Response`.
        metadata: The text of the request's metadata; None where it could not be read.
        body: A JSON value. None where the result is stored.
        beside: What else there is.

    Raises:
        ValueError, TypeError: `body` is not JSON.
    """
    if beside is not NOTHING:
        return wrap_response(status_code, metadata, write_json(body), beside)
    own = "null" if metadata is None else safe_text(metadata)
    return f'{{"status_code":{status_code},"metadata":{own},"body":{write_json(body)}}}'.encode()


def wrap_response(status_code: int, metadata: str | None, body: str, beside: Beside = NOTHING) -> bytes:
    """As `write_response`, of a body that `write_json` has already written."""
    own = "null" if metadata is None else safe_text(metadata)
    values = ((name, getattr(beside, name)) for name in Beside.__dataclass_fields__)
    more = "".join(f',"{name}":{write_json(value)}' for name, value in values if value is not None)
    return f'{{"status_code":{status_code},"metadata":{own},"body":{body}{more}}}'.encode()


def response_head(status_code: int, metadata: str | None) -> str:
    """The text with which such a response begins, up to its body."""
    own = "null" if metadata is None else safe_text(metadata)
    return f'{{"status_code":{status_code},"metadata":{own},"body":'
