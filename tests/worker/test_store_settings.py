"""Settings of stores, notices and S3 events: what is taken, and what is refused because it would be ignored."""

import pytest

from rejoinder.worker.settings import Settings, SettingsError, resolve

GIVEN = {"requests": "memory://a", "responses": "memory://b", "engine": "echo"}
SQS = {**GIVEN, "responses": "awssqs:///answers"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"blobs": "ftp://a"}, "blobs is 'ftp://a': it should be the URL of a store: file://, gs://, memory://, s3://"),
        ({"output_path": "outputs"}, "output_path is 'outputs': it should be the URL of a store"),
        ({"failure_path": "S3://a"}, "failure_path is 'S3://a': it should be the URL of a store"),
        ({"ledger": "s3://"}, "ledger is 's3://': it names nothing after its scheme"),
        ({"ledger": "s3:///?region=x"}, "ledger is 's3:///.region=x': it names nothing after its scheme"),
        ({"blobs": "file://here"}, "blobs is 'file://here': a directory is absolute, with three slashes"),
        ({"allow_input": "s3://a, http://b"}, "allow_input has 'http://b': it should be the URL of a store"),
        ({"max_inline_bytes": 1}, "max_inline_bytes has no meaning without blobs or output_path"),
        ({"max_inline_bytes": -1, "blobs": "s3://b"}, "max_inline_bytes .from flag. is -1"),
        ({"max_input_bytes": 1}, "max_input_bytes has no meaning without blobs or allow_input"),
        ({"s3_event_path": "/echo"}, "s3_event_path has no meaning without blobs or allow_input"),
        ({"s3_event_path": "echo", "blobs": "s3://b"}, "s3_event_path .from flag. is 'echo'"),
        ({"s3_event_metadata": "{}"}, "s3_event_metadata has no meaning without s3_event_path"),
        ({"extended_client": True}, "extended_client has no meaning without blobs"),
        ({"extended_client": True, "blobs": "s3://b"}, "extended_client is for responses on awssqs://, and they go to"),
        (
            {**SQS, "extended_client": True, "blobs": "gs://b"},
            "extended_client points to objects on S3, and blobs is 'gs://b'",
        ),
        ({"include_inference_response": True}, "include_inference_response has no meaning without success_topic or"),
        ({"endpoint_name": "e"}, "endpoint_name has no meaning without success_topic or error_topic"),
        ({"endpoint_name": "e_", "error_topic": "memory://c"}, "endpoint_name .from flag. is 'e_'"),
        ({"success_topic": "memory://a"}, "success_topic is 'memory://a', where the requests are: notices would be"),
        ({"error_topic": "memory://b"}, "error_topic is 'memory://b', where the responses are: notices would be"),
    ],
)
def test_what_would_be_ignored_or_cannot_be_is_refused(flags, message):
    with pytest.raises(SettingsError, match=message) as caught:
        resolve({**GIVEN, **flags}, {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ('{"a": "{nope}"}', r"unknown placeholder \{nope\} in '\{nope\}'; known are \{bucket\}, \{key\}, \{size\}"),
        ('{"a": [{"b": "x {key} {Key}"}]}', r"unknown placeholder \{Key\}"),
        ('{"a": "{key.x}"}', r"unknown placeholder \{key.x\}"),
        ('{"a": "{key[0]}"}', r"unknown placeholder \{key\[0\]\}"),
        ('{"a": "{size:>9}"}', r"unknown placeholder \{size\}"),
        ('{"a": "{size!r}"}', r"unknown placeholder \{size\}"),
        ('{"a": "{}"}', r"unknown placeholder \{\}"),
        ('{"a": "{0}"}', r"unknown placeholder \{0\}"),
        ('{"a": "{key"}', "a brace that is no placeholder is written twice"),
        ('{"a": "key}"}', "a brace that is no placeholder is written twice"),
        ("[]", "it should be a JSON object"),
    ],
)
def test_a_template_of_metadata_has_placeholders_that_exist(template, message):
    given = {**GIVEN, "blobs": "s3://b", "s3_event_path": "/echo", "s3_event_metadata": template}
    with pytest.raises(SettingsError, match=message) as caught:
        resolve(given, {})
    assert "\n" not in str(caught.value)


def test_all_of_them_together_are_taken():
    settings = resolve(
        {
            **SQS,
            "blobs": "s3://bucket/prefix?region=eu-west-1",
            "output_path": "memory://out",
            "failure_path": "file:///failed",
            "max_inline_bytes": 0,
            "ledger": "gs://bucket/ledger",
            "allow_input": "s3://in/a,gs://in",
            "s3_event_path": "/echo",
            "s3_event_metadata": '{"of": "{bucket}/{key} {{}}", "size": "{size}", "n": [1, {"t": "{event_time}"}]}',
            "extended_client": True,
            "success_topic": "awssns:///arn",
            "include_inference_response": True,
            "endpoint_name": "my-endpoint",
        },
        {},
    ).settings
    assert settings.allow_input == ["s3://in/a", "gs://in"]
    assert settings.max_inline_bytes == 0


def test_nothing_is_stored_unless_somebody_says_so():
    settings = Settings(**GIVEN)
    stores = (settings.blobs, settings.output_path, settings.failure_path, settings.ledger, settings.allow_input)
    assert stores == (None, None, None, None, [])
    assert (settings.s3_event_path, settings.success_topic, settings.error_topic) == (None, None, None)
    assert not settings.extended_client
