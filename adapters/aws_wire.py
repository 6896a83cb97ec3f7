"""Bytes on SQS and SNS: how a body becomes text and back, attributes, and transports' envelopes.

A body goes as it is where it is text that SQS takes, else as base64 with the attribute `base64encoded`, as Go CDK does
(`pubsub/awssnssqs`). What is stored elsewhere goes as the pointer of Amazon's Extended Client Library. On the way in,
SNS's envelope is taken off and such a pointer is told: exactly these two, and a body that begins otherwise is not
looked into.
"""

import base64
import binascii
import json
import re
from collections.abc import Mapping
from typing import Any, Final

from rejoinder.adapters.driver import Message, Outgoing

BASE64: Final = "base64encoded"
STORED_SIZE: Final = "ExtendedPayloadSize"
"""The attribute, a Number, by which the Extended Client knows its pointers."""
STORED_SIZES: Final = (STORED_SIZE, "SQSLargePayloadSize")
"""The same, and what it was called before. With a message that is no pointer, the library's readers would fail."""
EMPTY: Final = "\n"
"""An empty body in base64: SQS takes no empty text, and decoders of base64 pass over line ends."""
MAX_ATTRIBUTES: Final = 10
SYSTEM_ATTRIBUTES: Final = ["ApproximateReceiveCount", "SentTimestamp", "MessageGroupId", "AWSTraceHeader"]

# SQS takes #x9 | #xA | #xD | #x20-#xD7FF | #xE000-#xFFFD | #x10000-#x10FFFF. UTF-8 has no surrogates, so what is left
# to look for are the control characters and, as bytes, U+FFFE and U+FFFF.
_CONTROL: Final = bytes(set(range(0x20)) - {0x09, 0x0A, 0x0D})
_NONCHARACTERS: Final = (b"\xef\xbf\xbe", b"\xef\xbf\xbf")

_NAME: Final = re.compile(
    r"(?!aws\.|amazon\.)(?!.*\.\.)[A-Za-z0-9_-](?:[A-Za-z0-9_.-]{0,254}[A-Za-z0-9_-])?", re.IGNORECASE
)
_VALUE: Final = re.compile("[\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]+")
_GROUP: Final = re.compile("[\x21-\x7e]{1,128}")
_POINTER_CLASS: Final = "software.amazon.payloadoffloading.PayloadS3Pointer"
_POINTER: Final = re.compile(
    rf'\[\s*"(?:{re.escape(_POINTER_CLASS)}|com\.amazon\.sqs\.javamessaging\.MessageS3Pointer)"'
)
_OBJECT: Final = re.compile(r"s3://([^/]+)/(.+)", re.DOTALL)
_TRACE: Final = re.compile("1-([0-9a-f]{8})-([0-9a-f]{24})")
_PARENT: Final = re.compile("[0-9a-f]{16}")


def encode_body(body: bytes) -> tuple[str, bool]:
    """Return the text to send for `body`, and whether it is base64."""
    if body and len(body.translate(None, _CONTROL)) == len(body) and not any(one in body for one in _NONCHARACTERS):
        try:
            return body.decode(), False
        except UnicodeDecodeError:
            return base64.b64encode(body).decode(), True
    return base64.b64encode(body).decode() or EMPTY, True


def encode_pointer(outgoing: Outgoing) -> str:
    """Return the text to send for `outgoing`, whose body is at `stored_at`: the Extended Client's pointer.

    Raises:
        ValueError: it has a body too, or what is there is no object on S3.
    """
    found = _OBJECT.fullmatch(outgoing.stored_at or "")
    if found is None or outgoing.stored_size < 0:
        raise ValueError(f"stored_at {outgoing.stored_at!r}: SQS carries pointers to s3://bucket/key only")
    if outgoing.body:
        raise ValueError("a message has a body or stored_at, not both")
    return json.dumps([_POINTER_CLASS, {"s3BucketName": found[1], "s3Key": found[2]}], separators=(",", ":"))


def encode_attributes(outgoing: Outgoing, *, coded: bool) -> dict[str, dict[str, str]]:
    """Return the attributes to send with `outgoing`, whose body is base64 if `coded`.

    Raises:
        ValueError: SQS cannot carry them; names which.
    """
    attributes: dict[str, dict[str, str]] = {}
    for name, value in outgoing.attributes.items():
        if name == BASE64 or name in STORED_SIZES or not _NAME.fullmatch(name):
            raise ValueError(f"attribute {name!r}: SQS and SNS cannot carry this name, or mean something else by it")
        if not _VALUE.fullmatch(value):
            raise ValueError(f"attribute {name!r}: its value is empty or has characters that SQS and SNS cannot carry")
        attributes[name] = {"DataType": "String", "StringValue": value}
    if coded:
        attributes[BASE64] = {"DataType": "String", "StringValue": "true"}
    if outgoing.stored_at is not None:
        attributes[STORED_SIZE] = {"DataType": "Number", "StringValue": str(outgoing.stored_size)}
    if len(attributes) > MAX_ATTRIBUTES:
        raise ValueError(f"{len(attributes)} attributes, {MAX_ATTRIBUTES} are the most that SQS takes with a message")
    return attributes


def size(body: str, attributes: Mapping[str, Mapping[str, str]]) -> int:
    """Count a message as AWS does: its body, and its attributes' names, types and values, in bytes."""
    total = len(body) if body.isascii() else len(body.encode())
    for name, attribute in attributes.items():
        total += len(name) + len(attribute["DataType"]) + len(attribute["StringValue"].encode())
    return total


def check_group(ordering_key: str) -> str:
    """Return `ordering_key` where it can be a message group id. Raises ValueError."""
    if not _GROUP.fullmatch(ordering_key):
        raise ValueError(f"ordering_key {ordering_key!r}: SQS takes 1 to 128 printable ASCII characters without spaces")
    return ordering_key


def decode(raw: Mapping[str, Any], lease: object) -> Message:
    """Read one message of ReceiveMessage's answer, whose handle is `lease`."""
    system = raw.get("Attributes", {})
    text: str = raw["Body"]
    message_id: str = raw["MessageId"]
    attributes = {name: _attribute(value) for name, value in raw.get("MessageAttributes", {}).items()}
    # SNS puts attributes into its envelope and none beside it.
    if not attributes and text.startswith("{") and '"TopicArn"' in text and (envelope := _envelope(text)):
        text, message_id = envelope["Message"], envelope["MessageId"]
        attributes = _enveloped(envelope.get("MessageAttributes"))
    stored_at = _pointed(text) if text.startswith("[") else None
    if stored_at:
        body = b""
        for name in STORED_SIZES:
            attributes.pop(name, None)
    else:
        body = _body(text, coded=attributes.pop(BASE64, None) is not None)
    if "traceparent" not in attributes and (traceparent := _traceparent(system.get("AWSTraceHeader"))):
        attributes["traceparent"] = traceparent
    attempt, sent = system.get("ApproximateReceiveCount"), system.get("SentTimestamp")
    return Message(
        id=message_id,
        body=body,
        attributes=attributes,
        attempt=int(attempt) if attempt else None,
        sent_at=int(sent) / 1000 if sent else None,
        lease=lease,
        ordering_key=system.get("MessageGroupId"),
        stored_at=stored_at,
    )


def _body(text: str, *, coded: bool) -> bytes:
    if coded:
        try:
            return base64.b64decode(text.replace("\r", "").replace("\n", ""), validate=True)
        except (binascii.Error, ValueError):
            # Somebody else's attribute of the same name. Go CDK takes the body as it is, too.
            return text.encode(errors="surrogatepass")
    return text.encode(errors="surrogatepass")


def _attribute(value: Mapping[str, Any]) -> str:
    binary = value.get("BinaryValue")
    return str(value.get("StringValue", "")) if binary is None else base64.b64encode(binary).decode()


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _envelope(text: str) -> dict[str, Any] | None:
    """Return SNS's envelope if `text` is one: a notification with all that each of them has."""
    found = _json(text)
    if not isinstance(found, dict) or found.get("Type") != "Notification":
        return None
    known = all(isinstance(found.get(key), str) for key in ("MessageId", "TopicArn", "Message", "Timestamp"))
    return found if known and found["TopicArn"].startswith("arn:") and found["MessageId"] else None


def _enveloped(attributes: object) -> dict[str, str]:
    """Return the attributes inside an SNS envelope. A Binary's value is base64 there already."""
    if not isinstance(attributes, dict):
        return {}
    return {
        name: value["Value"]
        for name, value in attributes.items()
        if isinstance(value, dict) and isinstance(value.get("Value"), str)
    }


def _pointed(text: str) -> str | None:
    """Return where the body is if `text` is the Extended Client's pointer."""
    if not _POINTER.match(text):
        return None
    found = _json(text)
    match found:
        case [str(), {"s3BucketName": str(bucket), "s3Key": str(key), **more}] if bucket and key and not more:
            return f"s3://{bucket}/{key}"
    return None


def _traceparent(header: str | None) -> str | None:
    """Return the W3C trace context of an X-Ray trace header, where it names a parent."""
    if not header:
        return None
    fields = dict(part.strip().partition("=")[::2] for part in header.split(";"))
    root, parent = _TRACE.fullmatch(fields.get("Root", "")), fields.get("Parent", "")
    if root is None or not _PARENT.fullmatch(parent):
        return None
    return f"00-{root[1]}{root[2]}-{parent}-{'01' if fields.get('Sampled') == '1' else '00'}"
