"""The notifications of Amazon SageMaker Asynchronous Inference, as its SNS topics carry them.

What its documentation shows and what endpoints were seen to send: `eventVersion` 1.0. A key whose value is not known,
such as the location of an input that came inline, is left out, as SageMaker does.
"""

import base64
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Literal

from rejoinder.schemas.wire import write_json

MAX_CONTENT: Final = 128 * 1024
"""Bytes of the largest response that a notification includes."""
_ELSEWHERE: Final = "Check the location in responseParameters (if configured) or the worker's log for further details."


@dataclass(frozen=True, slots=True)
class Invocation:
    """The request that a notification is about. Times are seconds since the epoch."""

    inference_id: str
    endpoint_name: str
    region: str
    received_at: float
    ended_at: float
    input_location: str | None = None
    content_type: str | None = None
    accept: str | None = None


def region_of(topic: str) -> str:
    """The region in the name of an AWS topic or queue, its ARN; an empty text for any other broker's."""
    parts = topic.split(":")
    return parts[3] if parts[0] == "arn" and len(parts) > 3 else ""


def completed(
    invocation: Invocation, *, content_type: str, output_location: str | None = None, content: bytes | None = None
) -> bytes:
    """The notification of a success.

    Args:
        invocation: The request.
        content_type: Of the result.
        output_location: Where the result is stored, if it is.
        content: The result, to be included unless it is larger than `MAX_CONTENT`.
    """
    response = {"contentType": content_type, "outputLocation": output_location}
    return _notification(invocation, "Completed", None, response, content)


def failed(
    invocation: Invocation,
    status_code: int,
    message: str,
    *,
    failure_location: str | None = None,
    content: bytes | None = None,
) -> bytes:
    """The notification of an answer with `status_code` 400 or above: `Expired` for 408, else `Failed`.

    Args:
        invocation: The request.
        status_code: The response's.
        message: Its error's.
        failure_location: Where the failure is stored, if it is.
        content: The error body, to be included unless it is larger than `MAX_CONTENT`.
    """
    stored = failure_location is not None or content is not None
    response = {"contentType": "application/json" if stored else None, "failureLocation": failure_location}
    # SageMaker's own first sentence, by which its users tell a model's errors.
    side = "server" if status_code >= 500 else "client"
    reason = f"ClientError: Received {side} error ({status_code}) from model. {message}"
    if status_code == 408:
        return _notification(invocation, "Expired", f"ClientError: {message}", response, content)
    return _notification(invocation, "Failed", reason, response, content)


def _notification(
    invocation: Invocation,
    status: Literal["Completed", "Failed", "Expired"],
    reason: str | None,
    response: dict[str, Any],
    content: bytes | None,
) -> bytes:
    request = {
        "accept": invocation.accept,
        "contentType": invocation.content_type,
        "endpointName": invocation.endpoint_name,
        "inputLocation": invocation.input_location,
    }
    fields = {
        "awsRegion": invocation.region,
        "eventTime": _time(invocation.ended_at),
        "receivedTime": _time(invocation.received_at),
        "invocationStatus": status,
        "failureReason": reason,
        "requestParameters": _known(request),
        "responseParameters": _known(response) or None,
        "responseBody": _included(content),
        "inferenceId": invocation.inference_id,
        "eventVersion": "1.0",
        "eventSource": "aws:sagemaker",
        "eventName": "InferenceResult",
    }
    return write_json(_known(fields)).encode()


def _known(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _included(content: bytes | None) -> dict[str, str] | None:
    if content is None or len(content) > MAX_CONTENT:
        return None
    return {"content": base64.b64encode(content).decode(), "message": _ELSEWHERE, "encoding": "BASE64"}


def _time(seconds: float) -> str:
    """Such as `2023-05-23T03:23:21.814Z`."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
