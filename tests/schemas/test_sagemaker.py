"""SageMaker's notifications, key by key as its endpoints send them."""

import base64
import json
from dataclasses import replace

import pytest

from rejoinder.schemas.sagemaker import MAX_CONTENT, Invocation, completed, failed, region_of

# What an endpoint sent, as a public sample has it (its bucket and endpoint renamed).
COMPLETED = (
    '{"awsRegion":"us-east-1","eventTime":"2024-03-29T03:48:05.077Z","receivedTime":"2024-03-29T03:48:04.279Z",'
    '"invocationStatus":"Completed","requestParameters":{"accept":"application/json","contentType":"application/json",'
    '"endpointName":"endpoint","inputLocation":"s3://bucket/inputs/1-2024-03-29 03:48:03.json"},'
    '"responseParameters":{"contentType":"application/json",'
    '"outputLocation":"s3://bucket/outputs/dd334eb2-0276-4107-972a-280e0eecfd30.out"},'
    '"inferenceId":"03a98604-cf1f-44d1-b9c4-801dcbbe792b","eventVersion":"1.0","eventSource":"aws:sagemaker",'
    '"eventName":"InferenceResult"}'
)
INVOCATION = Invocation(
    inference_id="03a98604-cf1f-44d1-b9c4-801dcbbe792b",
    endpoint_name="endpoint",
    region="us-east-1",
    received_at=1711684084.279,
    ended_at=1711684085.077,
    input_location="s3://bucket/inputs/1-2024-03-29 03:48:03.json",
    content_type="application/json",
    accept="application/json",
)
INLINE = replace(INVOCATION, input_location=None, content_type=None, accept=None)
OUTPUT = "s3://bucket/outputs/dd334eb2-0276-4107-972a-280e0eecfd30.out"
# The keys of the failure in Amazon's "Check prediction results".
FAILED_KEYS = [
    "awsRegion",
    "eventTime",
    "receivedTime",
    "invocationStatus",
    "failureReason",
    "requestParameters",
    "inferenceId",
    "eventVersion",
    "eventSource",
    "eventName",
]


def test_completed_is_the_same_bytes():
    assert completed(INVOCATION, content_type="application/json", output_location=OUTPUT).decode() == COMPLETED


def test_what_is_not_known_is_left_out():
    notice = json.loads(completed(INLINE, content_type="application/json"))
    assert notice["requestParameters"] == {"endpointName": "endpoint"}
    assert notice["responseParameters"] == {"contentType": "application/json"}
    assert "failureReason" not in notice
    assert "responseBody" not in notice


def test_the_response_is_included_up_to_128_kb():
    body = b'{"a": "\xc3\xa9"}'.ljust(MAX_CONTENT)
    notice = json.loads(completed(INVOCATION, content_type="application/json", output_location=OUTPUT, content=body))
    assert list(notice) == [*list(json.loads(COMPLETED))[:6], "responseBody", *list(json.loads(COMPLETED))[6:]]
    assert list(notice["responseBody"]) == ["content", "message", "encoding"]
    assert notice["responseBody"]["encoding"] == "BASE64"
    assert base64.b64decode(notice["responseBody"]["content"], validate=True) == body
    longer = completed(INVOCATION, content_type="application/json", output_location=OUTPUT, content=body + b" ")
    assert longer.decode() == COMPLETED


def test_failed_has_the_keys_of_the_documentation():
    notice = json.loads(failed(INVOCATION, 500, "it broke"))
    assert list(notice) == FAILED_KEYS
    assert notice["invocationStatus"] == "Failed"
    assert notice["failureReason"] == "ClientError: Received server error (500) from model. it broke"
    assert notice["requestParameters"] == json.loads(COMPLETED)["requestParameters"]


def test_a_stored_failure_has_its_location():
    place = "s3://bucket/failures/x.json"
    notice = json.loads(failed(INVOCATION, 400, "bad", failure_location=place, content=b"{}"))
    assert notice["responseParameters"] == {"contentType": "application/json", "failureLocation": place}
    assert base64.b64decode(notice["responseBody"]["content"]) == b"{}"
    assert notice["failureReason"] == "ClientError: Received client error (400) from model. bad"


@pytest.mark.parametrize(
    ("status", "word"), [(400, "Failed"), (404, "Failed"), (408, "Expired"), (503, "Failed"), (504, "Failed")]
)
def test_only_408_is_expired(status, word):
    notice = json.loads(failed(INVOCATION, status, "x"))
    assert (notice["invocationStatus"], list(notice)) == (word, FAILED_KEYS)


def test_every_character_is_one_that_sns_carries():
    notice = failed(INVOCATION, 400, "\ufffe \ud800 \x00").decode()
    assert json.loads(notice)["failureReason"].endswith("\ufffe \ud800 \x00")
    assert not any(ord(char) < 0x20 or char in "\ufffe\uffff" for char in notice)


@pytest.mark.parametrize(
    ("topic", "region"),
    [
        ("arn:aws:sns:eu-west-1:000000000000:t", "eu-west-1"),
        ("arn:aws-cn:sqs:cn-north-1:000000000000:q", "cn-north-1"),
        ("memory://x", ""),
        ("projects/p/topics/t", ""),
        ("arn:aws", ""),
    ],
)
def test_the_region_is_the_topics(topic, region):
    assert region_of(topic) == region
