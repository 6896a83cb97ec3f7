"""How bodies and attributes look on SQS and SNS, and what is made of what others send."""

import base64
import json
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rejoinder.adapters import Outgoing, aws_publish, aws_wire

LEGAL = {0x9, 0xA, 0xD, *range(0x20, 0xD800), *range(0xE000, 0xFFFE), *range(0x10000, 0x110000)}
"""What the service's documentation lists."""


def arrive(text, attributes=None, **system):
    """One message as ReceiveMessage gives it."""
    values = {name: {"StringValue": value, "DataType": "String"} for name, value in (attributes or {}).items()}
    raw = {"MessageId": "sqs-id", "ReceiptHandle": "r", "Body": text, "Attributes": system}
    return aws_wire.decode(raw | ({"MessageAttributes": values} if values else {}), "lease")


@given(st.binary(max_size=40) | st.text(max_size=40).map(lambda text: text.encode(errors="surrogatepass")))
@example(b"")
@example("\ufffe".encode())
@example("\uffff \ufffd".encode())
@example(b"a\r\nb\rc\td\x7f")
@example(b"\xed\xa0\x80")
def test_every_body_arrives_as_it_was(body):
    text, coded = aws_wire.encode_body(body)
    assert text
    assert {ord(one) for one in text} <= LEGAL
    assert arrive(text, {aws_wire.BASE64: "true"} if coded else None).body == body


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=20))
def test_what_is_legal_text_goes_as_it_is(text):
    assert aws_wire.encode_body(text.encode()) == (
        (text, False) if {ord(one) for one in text} <= LEGAL else (base64.b64encode(text.encode()).decode(), True)
    )


def test_go_cdk_bodies():
    """`base64encoded` with any value says that the body is base64; one that is not, is taken as it is."""
    assert arrive("AAH/", {"base64encoded": "true", "a": "b"}).body == b"\0\1\xff"
    assert dict(arrive("AAH/", {"base64encoded": "true", "a": "b"}).attributes) == {"a": "b"}
    assert arrive("AA\nH/\n", {"base64encoded": "1"}).body == b"\0\1\xff"
    assert arrive("no base64!", {"base64encoded": "true"}).body == b"no base64!"


@pytest.mark.parametrize(
    ("attributes", "named"),
    [
        ({"aws.x": "1"}, "'aws.x'"),
        ({"Amazon.x": "1"}, "'Amazon.x'"),
        ({".x": "1"}, "'.x'"),
        ({"x.": "1"}, "'x.'"),
        ({"x..y": "1"}, "'x..y'"),
        ({"x y": "1"}, "'x y'"),
        ({"é": "1"}, "'é'"),
        ({"": "1"}, "''"),
        ({"base64encoded": "1"}, "'base64encoded'"),
        ({"x": ""}, "'x'"),
        ({"x": "\0"}, "'x'"),
        ({"x": "\uffff"}, "'x'"),
        ({"x": "\ud800"}, "'x'"),
        ({str(number): "1" for number in range(11)}, "11 attributes"),
    ],
)
def test_attributes_that_cannot_be_carried(attributes, named):
    with pytest.raises(ValueError, match=named):
        aws_wire.encode_attributes(Outgoing(b"", attributes), coded=False)


def test_nine_attributes_leave_room_for_base64():
    names = ["a", "a.b", "A-_9", "x" * 200, "awsome", "5", "6", "7", "8"]
    assert len(aws_wire.encode_attributes(Outgoing(b"\0", dict.fromkeys(names, "é\n\t")), coded=True)) == 10


def test_sizes_count_as_the_service_counts():
    attributes = aws_wire.encode_attributes(Outgoing(b"", {"ab": "é"}), coded=False)
    assert aws_wire.size("é", attributes) == 2 + (2 + len("String") + 2)


def test_numbers_and_binaries_become_text():
    values = {
        "n": {"DataType": "Number.int", "StringValue": "12"},
        "b": {"DataType": "Binary.png", "BinaryValue": b"\0\1"},
    }
    raw = {"MessageId": "i", "ReceiptHandle": "r", "Body": "x", "MessageAttributes": values}
    message = aws_wire.decode(raw, None)
    assert dict(message.attributes) == {"n": "12", "b": "AAE="}
    assert (message.attempt, message.sent_at, message.ordering_key) == (None, None, None)


def test_system_attributes():
    message = arrive("x", ApproximateReceiveCount="3", SentTimestamp="1795317215984", MessageGroupId="g")
    assert (message.attempt, message.sent_at, message.ordering_key) == (3, 1795317215.984, "g")


ROOT = "Root=1-5759e988-bd862e3fe1be46a994272793"


@pytest.mark.parametrize(
    ("header", "traceparent"),
    [
        (f"{ROOT};Parent=53995c3f42cd8ad8;Sampled=1", "00-5759e988bd862e3fe1be46a994272793-53995c3f42cd8ad8-01"),
        (f"Sampled=0; Parent=53995c3f42cd8ad8; {ROOT}", "00-5759e988bd862e3fe1be46a994272793-53995c3f42cd8ad8-00"),
        (f"{ROOT};Parent=53995c3f42cd8ad8;Lineage=a:1", "00-5759e988bd862e3fe1be46a994272793-53995c3f42cd8ad8-00"),
        (f"{ROOT};Sampled=1", None),
        ("Root=1-5759e988-xyz;Parent=53995c3f42cd8ad8", None),
        ("garbage;;=", None),
    ],
)
def test_the_x_ray_header_becomes_a_traceparent(header, traceparent):
    assert arrive("x", AWSTraceHeader=header).attributes.get("traceparent") == traceparent


def test_a_traceparent_of_its_own_stays():
    header = f"{ROOT};Parent=53995c3f42cd8ad8"
    assert arrive("x", {"traceparent": "00-mine"}, AWSTraceHeader=header).attributes["traceparent"] == "00-mine"


def envelope(**changes):
    fields = {
        "Type": "Notification",
        "MessageId": "sns-id",
        "TopicArn": "arn:aws:sns:us-east-1:000000000000:t",
        "Subject": "s",
        "Message": "the body",
        "Timestamp": "2026-11-22T03:25:36.946Z",
        "MessageAttributes": {"a": {"Type": "String", "Value": "1"}, "b": {"Type": "Binary", "Value": "AAE="}},
    }
    return {name: value for name, value in (fields | changes).items() if value is not None}


@pytest.mark.parametrize("indent", [None, 2])
def test_an_sns_envelope_is_taken_off(indent):
    message = arrive(json.dumps(envelope(), indent=indent), MessageGroupId="g")
    assert (message.id, message.body, message.ordering_key) == ("sns-id", b"the body", "g")
    assert dict(message.attributes) == {"a": "1", "b": "AAE="}


def test_base64_inside_an_envelope():
    flag = {"base64encoded": {"Type": "String", "Value": "true"}}
    message = arrive(json.dumps(envelope(Message="AAE=", MessageAttributes=flag)))
    assert (message.body, dict(message.attributes)) == (b"\0\1", {})


@pytest.mark.parametrize(
    "changes",
    [
        {"Type": "SubscriptionConfirmation"},
        {"Type": None},
        {"MessageId": None},
        {"MessageId": ""},
        {"MessageId": 5},
        {"TopicArn": "mine"},
        {"Message": None},
        {"Message": {"x": 1}},
        {"Timestamp": None},
    ],
)
def test_what_is_no_envelope_stays(changes):
    text = json.dumps(envelope(**changes))
    assert (arrive(text).id, arrive(text).body) == ("sqs-id", text.encode())


def test_what_looks_like_an_envelope_stays():
    for text in (
        json.dumps({"outer": envelope()}),
        json.dumps([envelope()]),
        json.dumps(envelope())[:-1],
        '{"TopicArn": ' + "[" * 100_000,
        '{"TopicArn": ' + "9" * 5_000 + "}",
    ):
        assert arrive(text).body == text.encode()
    # Attributes beside the body: SNS sends none, so somebody passes an envelope on as a body.
    assert arrive(json.dumps(envelope()), {"a": "b"}).body == json.dumps(envelope()).encode()


CLASSES = ["software.amazon.payloadoffloading.PayloadS3Pointer", "com.amazon.sqs.javamessaging.MessageS3Pointer"]


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
def test_a_pointer_is_told(name, separators):
    text = json.dumps([name, {"s3BucketName": "b", "s3Key": "k/é x"}], separators=separators)
    for message in (
        arrive(text, {"ExtendedPayloadSize": "300000"}),
        arrive(json.dumps(envelope(Message=text, MessageAttributes=None))),
    ):
        assert (message.body, message.stored_at) == (b"", "s3://b/k/é x")


@pytest.mark.parametrize(
    "body",
    [
        [CLASSES[0], {"s3BucketName": "b", "s3Key": "k"}, 1],
        [CLASSES[0], {"s3BucketName": "b", "s3Key": ""}],
        [CLASSES[0], {"s3BucketName": 1, "s3Key": "k"}],
        [CLASSES[0], {"s3BucketName": "b"}],
        [CLASSES[0], {"s3BucketName": "b", "s3Key": "k", "more": 1}],
        [CLASSES[0]],
        [[CLASSES[0]]],
        ["software.amazon.Other", {"s3BucketName": "b", "s3Key": "k"}],
    ],
)
def test_what_is_no_pointer_stays(body):
    text = json.dumps(body)
    assert (arrive(text).body, arrive(text).stored_at) == (text.encode(), None)


def sent(outgoing):
    return aws_publish.entry(0, outgoing, body_field="MessageBody", fifo=False)


def test_a_pointer_is_written_as_the_extended_client_does():
    """The text and the attribute of `PayloadS3Pointer.toJson` and `SQSExtendedClientConstants` in Amazon's library."""
    entry = sent(Outgoing(b"", {"response_id": "r"}, stored_at="s3://b/responses/r.json", stored_size=300_000))
    assert entry.request["MessageBody"] == (
        '["software.amazon.payloadoffloading.PayloadS3Pointer",{"s3BucketName":"b","s3Key":"responses/r.json"}]'
    )
    assert entry.request["MessageAttributes"] == {
        "response_id": {"DataType": "String", "StringValue": "r"},
        "ExtendedPayloadSize": {"DataType": "Number", "StringValue": "300000"},
    }
    assert entry.size == len(entry.request["MessageBody"]) + len("response_idStringrExtendedPayloadSizeNumber300000")


@given(st.text(min_size=1))
def test_a_pointer_arrives_as_it_was_sent(key):
    stored_at = f"s3://b/{key}"
    request = sent(Outgoing(b"", {"a": "b"}, stored_at=stored_at, stored_size=1)).request
    assert request["MessageBody"].isascii()
    attributes = {name: value["StringValue"] for name, value in request["MessageAttributes"].items()}
    message = arrive(request["MessageBody"], attributes)
    assert (message.body, message.stored_at, dict(message.attributes)) == (b"", stored_at, {"a": "b"})


def test_beside_nine_attributes_there_is_room_for_the_size():
    nine = {f"a{number}": "x" for number in range(9)}
    pointer = Outgoing(b"", nine, stored_at="s3://b/k", stored_size=1)
    assert len(sent(pointer).request["MessageAttributes"]) == 10
    with pytest.raises(ValueError, match="11 attributes, 10 are the most"):
        sent(replace(pointer, attributes=nine | {"more": "x"}))


@pytest.mark.parametrize(
    ("outgoing", "message"),
    [
        (Outgoing(b"x", stored_at="s3://b/k"), "a body or stored_at, not both"),
        (Outgoing(b"", stored_at="gs://b/k"), "stored_at 'gs://b/k': SQS carries pointers to s3://bucket/key only"),
        (Outgoing(b"", stored_at="s3://b/"), "stored_at 's3://b/'"),
        (Outgoing(b"", stored_at="s3:///k"), "stored_at 's3:///k'"),
        (Outgoing(b"", stored_at=""), "stored_at ''"),
        (Outgoing(b"", stored_at="s3://b/k", stored_size=-1), "stored_at 's3://b/k'"),
        # A reader would take what has one of these for a pointer.
        (Outgoing(b"x", {"ExtendedPayloadSize": "1"}), "attribute 'ExtendedPayloadSize'"),
        (Outgoing(b"x", {"SQSLargePayloadSize": "1"}), "attribute 'SQSLargePayloadSize'"),
    ],
)
def test_what_is_no_pointer_is_not_sent_as_one(outgoing, message):
    with pytest.raises(ValueError, match=message):
        sent(outgoing)


def test_a_pointer_in_base64_is_a_body():
    text = json.dumps([CLASSES[0], {"s3BucketName": "b", "s3Key": "k"}])
    message = arrive(base64.b64encode(text.encode()).decode(), {"base64encoded": "true"})
    assert (message.body, message.stored_at) == (text.encode(), None)
