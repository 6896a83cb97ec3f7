"""Where a producer may ask its result to be: never out of the output path."""

import json
from pathlib import PurePosixPath
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rejoinder.schemas.envelope import Beside, Options, Response, parse_request, wrap_response, write_response
from rejoinder.schemas.wire import WireError, write_json


def parse(**options):
    return parse_request(json.dumps({"metadata": {"a": 1}, "body": 1, "options": options}).encode()).options


@pytest.mark.parametrize(
    "value",
    ["a", "a/b/c", "2026-11-22/run 1", "é/ü", "a.b/..c/...", ".hidden", "%2e%2e/x", "s3/x", "gs:x", "~", "x" * 255],
)
def test_an_extension_is_taken_as_it_is(value):
    assert parse(output_path_extension=value).output_path_extension == value


@pytest.mark.parametrize("value", ["a", "a.json", ".x", "a.", "é ü.out", "a:b", "x" * 32])
def test_a_filename_is_taken_as_it_is(value):
    assert parse(filename=value).filename == value


BAD_PARTS = ["", ".", "..", "a\\b", "\\", "a\x00", "a\nb", "\x7f", "\x85", "\u2028", "\ud800"]
EXTENSIONS = [
    *BAD_PARTS,
    *(
        "/",
        "/a",
        "a/",
        "a//b",
        "a/../b",
        "../a",
        "a/..",
        "./a",
        "a/.",
        "s3:/a",
        "s3://b/k",
        "https://h/p",
        "S3:x",
        "HTTPS:x",
    ),
    *("x" * 256, "é" * 128, "x" * 513, "/".join("x" * 300)),
]


@pytest.mark.parametrize("value", EXTENSIONS)
def test_an_extension_that_could_lead_elsewhere_is_refused_by_name(value):
    with pytest.raises(
        WireError, match=r"^options\.output_path_extension: it should|at (least|most)|valid string"
    ) as caught:
        parse(output_path_extension=value)
    assert caught.value.param == "options.output_path_extension"
    assert caught.value.metadata == '{"a": 1}'
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [*BAD_PARTS, "a/b", "/", "a.b.c", "..", "a..", "x" * 33, 5, None])
def test_a_filename_that_is_none_is_refused_by_name(value):
    if value is None:
        assert parse(filename=value).filename is None
        return
    with pytest.raises(WireError, match=r"^options\.filename: ") as caught:
        parse(filename=value)
    assert caught.value.param == "options.filename"


ODD = st.text(st.sampled_from("./\\:s3 \x00\n%é~") | st.characters(), max_size=40)


@given(ODD, ODD)
def test_no_name_leads_out(extension, filename):
    """Whatever passes is a key of the store's contract, and stays below on a file system and in a URL."""
    try:
        options = parse(output_path_extension=extension, filename=filename)
    except WireError:
        return
    key = f"{options.output_path_extension}/name/{options.filename}"
    assert all(part not in {"", ".", ".."} and len(part.encode()) <= 255 for part in key.split("/"))
    assert not any(char < " " or char in "\\\x7f" for char in key)
    assert len(key.encode()) <= 1024 * 3
    assert PurePosixPath("/root", key).parts == ("/", "root", *key.split("/"))
    assert urlsplit(f"s3://bucket/{key}").netloc == "bucket"


def test_the_schema_says_so():
    properties = Options.model_json_schema()["properties"]
    for name in ("output_path_extension", "filename"):
        assert properties[name]["description"]


PLACE = 's3://b/k "é\ufffe\n'


@pytest.mark.parametrize(
    ("places", "more"),
    [
        ({}, {}),
        ({"output_location": PLACE}, {"output_location": PLACE}),
        ({"failure_location": PLACE}, {"failure_location": PLACE}),
        ({"output_location": "a", "failure_location": "b"}, {"output_location": "a", "failure_location": "b"}),
    ],
)
def test_a_response_says_where_it_is_stored(places, more):
    written = write_response(200, '{"a": 1}', None, Beside(**places))
    assert json.loads(written) == {"status_code": 200, "metadata": {"a": 1}, "body": None, **more}
    assert Response.model_validate_json(written).output_location == more.get("output_location")
    assert not any(ord(char) < 0x20 or char in "\ufffe\uffff" for char in written.decode())


def test_a_body_that_is_written_already_stands_as_it_is():
    body = {"b": [1, "é\uffff"], "a": None}
    assert wrap_response(200, None, write_json(body)) == write_response(200, None, body)
    assert (
        wrap_response(200, "{}", "1", Beside("x"))
        == b'{"status_code":200,"metadata":{},"body":1,"output_location":"x"}'
    )
