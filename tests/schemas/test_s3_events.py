"""S3's event notifications: each record is read, or refused by itself; and the metadata made of it."""

import json
from copy import deepcopy
from urllib.parse import quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rejoinder.schemas.s3_events import PLACEHOLDERS, Record, TestEvent, check_template, metadata_of, read_event
from rejoinder.schemas.wire import WireError

# The example in Amazon's "Event message structure", with a key that has to be decoded.
EXAMPLE = {
    "Records": [
        {
            "eventVersion": "2.1",
            "eventSource": "aws:s3",
            "awsRegion": "us-west-2",
            "eventTime": "1970-01-01T00:00:00.000Z",
            "eventName": "ObjectCreated:Put",
            "userIdentity": {"principalId": "AIDAJDPLRKLG7UEXAMPLE"},
            "requestParameters": {"sourceIPAddress": "172.16.0.1"},
            "responseElements": {"x-amz-request-id": "C3D13FE58DE4C810", "x-amz-id-2": "FMyUVURIY8/IgAtTv8xRjskZQpcI"},
            "s3": {
                "s3SchemaVersion": "1.0",
                "configurationId": "testConfigRule",
                "bucket": {
                    "name": "amzn-s3-demo-bucket",
                    "ownerIdentity": {"principalId": "A3NL1KOZZKExample"},
                    "arn": "arn:aws:s3:::amzn-s3-demo-bucket",
                },
                "object": {
                    "key": "in/red+flower%2B%C3%A9.jpg",
                    "size": 1024,
                    "eTag": "d41d8cd98f00b204e9800998ecf8427e",
                    "versionId": "096fKKXTRTtl3on89fVO.nfljtsv6qko",
                    "sequencer": "0055AED6DCD90281E5",
                },
            },
        }
    ]
}
TEST_EVENT = {
    "Service": "Amazon S3",
    "Event": "s3:TestEvent",
    "Time": "2014-10-13T15:57:02.089Z",
    "Bucket": "amzn-s3-demo-bucket",
    "RequestId": "5582815E1AEA5ADF",
    "HostId": "8cLeGAmw098X5cv4Zkwcmo8vvZa3eH3eKxsPzbB9wrR+YstdA6Knx4Ip8EXAMPLE",
}


def read(event):
    return read_event(json.dumps(event).encode())


def changed(path, value):
    """The example with one field of its record changed; ... removes it."""
    event = deepcopy(EXAMPLE)
    *steps, last = path.split(".")
    inner = event["Records"][0]
    for step in steps:
        inner = inner[step]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return event


def test_amazons_example():
    (record,) = read(EXAMPLE)
    assert record == Record(
        bucket="amzn-s3-demo-bucket",
        key="in/red flower+é.jpg",
        event_name="ObjectCreated:Put",
        size=1024,
        etag="d41d8cd98f00b204e9800998ecf8427e",
        version_id="096fKKXTRTtl3on89fVO.nfljtsv6qko",
        sequencer="0055AED6DCD90281E5",
        event_time="1970-01-01T00:00:00.000Z",
    )
    assert record.location == "s3://amzn-s3-demo-bucket/in/red flower+é.jpg"


@pytest.mark.parametrize("version", ["2.0", "2.1", "2.3", "2.9", "2.10"])
def test_later_minor_versions_are_taken(version):
    event = changed("eventVersion", version)
    event["Records"][0]["glacierEventData"] = {"new": 1}
    assert isinstance(read(event)[0], Record)


@pytest.mark.parametrize(
    "name", ["ObjectCreated:Copy", "ObjectCreated:CompleteMultipartUpload", "s3:ObjectCreated:Put"]
)
def test_whatever_creates_an_object_is_taken(name):
    assert read(changed("eventName", name))[0].event_name == name.removeprefix("s3:")


@pytest.mark.parametrize("path", ["s3.object.size", "s3.object.eTag", "s3.object.versionId", "s3.object.sequencer"])
@pytest.mark.parametrize("value", [..., None])
def test_what_some_events_lack_may_be_missing(path, value):
    (record,) = read(changed(path, value))
    assert None in (record.size, record.etag, record.version_id, record.sequencer)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("eventSource", "aws:sns", 'is "aws:sns"; only aws:s3 is taken'),
        ("eventSource", ..., "is null; only aws:s3 is taken"),
        ("eventVersion", "3.0", 'is "3.0"; only 2.0 and its later minor versions are taken'),
        ("eventVersion", "1.0", "only 2.0 and its later"),
        ("eventVersion", "2", "only 2.0 and its later"),
        ("eventVersion", 2.1, "is 2.1; only 2.0 and its later"),
        ("eventVersion", "2." + "1" * 5000, r"\.\.\.; only 2.0 and its later"),
        ("eventName", "ObjectRemoved:Delete", 'is "ObjectRemoved:Delete"; only ObjectCreated:. is a request'),
        ("eventName", "s3:TestEvent", "only ObjectCreated"),
        ("eventName", ..., "should be a text"),
        ("eventTime", 5, "should be a text"),
        ("s3.bucket.name", "", "should be a text that is not empty"),
        ("s3.bucket", ["a"], "should be a text"),
        ("s3.object.key", ..., "should be a text"),
        ("s3.object.key", "%FF", "should be UTF-8, form-encoded"),
        ("s3.object.size", -1, "should be a whole number from 0"),
        ("s3.object.size", True, "should be a whole number from 0"),
        ("s3.object.size", "5", "should be a whole number from 0"),
        ("s3.object.eTag", 5, "should be a text"),
    ],
)
def test_a_record_that_cannot_be_taken_is_refused_by_its_field(path, value, message):
    event = changed(path, value)
    event["Records"].append(EXAMPLE["Records"][0])
    bad, good = read(event)
    assert isinstance(good, Record)
    assert isinstance(bad, WireError)
    assert bad.param.startswith("Records.0.")
    assert path in bad.param or bad.param == "Records.0.s3.bucket.name"
    with pytest.raises(WireError, match=message):
        raise bad


@pytest.mark.parametrize("record", [None, 1, "x", [], {}, {"s3": None}])
def test_a_record_that_is_none(record):
    (bad,) = read({"Records": [record]})
    assert isinstance(bad, WireError)
    assert bad.param == "Records.0.eventSource"


def test_the_test_event_is_told():
    assert isinstance(read(TEST_EVENT), TestEvent)


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"body": 1},
        {"Records": []},
        {"Records": {}},
        {"Records": "x"},
        {"Event": "s3:OtherEvent"},
        {**TEST_EVENT, "Records": []},
        {**TEST_EVENT, "metadata": {}},
        {**EXAMPLE, "metadata": {}},
        [EXAMPLE],
    ],
)
def test_everything_else_is_no_event(message):
    assert read(message) is None
    assert read_event(json.dumps(message).encode()[:-1]) is None


@given(st.text(min_size=1), st.sampled_from(["/", ""]))
def test_every_key_comes_back(key, safe):
    (record,) = read(changed("s3.object.key", quote_plus(key, safe=safe)))
    assert record.key == key


VALUES = Record("b", "k é", "ObjectCreated:Put", 5, None, "v", None, "1970-01-01T00:00:00.000Z")


def test_the_metadata_of_a_template():
    template = {
        "of": "{bucket}/{key}",
        "size": "{size}",
        "sized": "{size} bytes",
        "tag": "{etag}",
        "tagged": "tag {etag}.",
        "fixed": [1, 2.5, None, True, {"deep": ["{event_name}", "{{size}}", "plain"]}],
        "{key}": "keys stay",
    }
    assert check_template(template) is None
    assert json.loads(metadata_of(VALUES, template)) == {
        "of": "b/k é",
        "size": 5,
        "sized": "5 bytes",
        "tag": None,
        "tagged": "tag .",
        "fixed": [1, 2.5, None, True, {"deep": ["ObjectCreated:Put", "{size}", "plain"]}],
        "{key}": "keys stay",
    }


def test_every_placeholder_has_its_value():
    template = {name: f"{{{name}}}" for name in PLACEHOLDERS}
    assert check_template(template) is None
    assert json.loads(metadata_of(VALUES, template)) == {name: getattr(VALUES, name) for name in PLACEHOLDERS}


@given(st.text(st.sampled_from("{}a[].!:key ") | st.characters()), st.text())
def test_a_template_that_passed_can_be_filled_and_keys_are_never_templates(text, key):
    template = {"a": text, "key": "<{key}>"}
    if check_template(template) is None:
        made = json.loads(metadata_of(Record("b", key, "e"), template))
        assert made["key"] == f"<{key}>"
        assert list(made) == ["a", "key"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}])
def test_a_template_is_json(value):
    assert "cannot be written as JSON" in str(check_template({"a": value}))
