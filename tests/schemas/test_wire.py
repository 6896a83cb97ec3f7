"""JSON as the contract wants it."""

import json
import math
import resource
from typing import Any

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from rejoinder.schemas import envelope
from rejoinder.schemas.envelope import ParsedRequest, parse_request, write_response
from rejoinder.schemas.reading import MAX_NESTING, Document, read_plain
from rejoinder.schemas.wire import WireError, peek_metadata, read_object, write_json

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def request_bytes(**fields: Any) -> bytes:
    return json.dumps({"metadata": {}, "body": 1, **fields}).encode()


@given(metadata=st.dictionaries(st.text(), JSON, max_size=5), body=JSON)
def test_what_goes_in_comes_out(metadata: dict[str, Any], body: Any) -> None:
    data = json.dumps({"body": body, "metadata": metadata}).encode()
    parsed = parse_request(data)
    assert parsed.body == body
    response = json.loads(write_response(200, parsed.metadata, parsed.body))
    assert response["metadata"] == metadata
    assert list(response["metadata"]) == list(metadata)
    assert response["body"] == body


# Lone surrogates, escapes, and what has to be escaped.
ODD_TEXT = st.text(st.sampled_from('a/\\"\ud83d\u00e9'), max_size=4)
ENVELOPES = st.fixed_dictionaries(
    {"metadata": st.dictionaries(ODD_TEXT, ODD_TEXT | JSON, max_size=3)},
    optional={
        "path": ODD_TEXT | JSON,
        "body": JSON,
        "input_location": ODD_TEXT | JSON,
        "options": st.fixed_dictionaries({}, optional={"inference_id": ODD_TEXT | JSON, "stream": JSON}) | JSON,
        "more": JSON,
    },
)


@given(ENVELOPES, st.booleans())
def test_a_look_finds_what_pydantic_finds(values: dict[str, Any], ascii_only: bool) -> None:
    data = json.dumps(values, ensure_ascii=ascii_only).encode(errors="replace")

    def found() -> Any:
        try:
            return parse_request(data)
        except WireError as exc:
            return str(exc), exc.param, exc.metadata

    looked = found()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(envelope, "_is_plain", lambda *_: False)
        assert found() == looked


@given(st.dictionaries(ODD_TEXT, ODD_TEXT | JSON, max_size=3), st.sampled_from(["", " ", "\n\t\r ", "\0", "x"]))
def test_keys_are_read_as_json_reads_them(values: dict[str, Any], space: str) -> None:
    text = f"{space},{space}".join(
        f"{json.dumps(key)}{space}:{space}{json.dumps(value)}" for key, value in (values | {"metadata": {}}).items()
    )
    data = f"{space}{{{space}{text}{space}}}{space}".encode()
    try:
        expected = json.loads(data)
    except ValueError:
        with pytest.raises(WireError):
            read_object(data)
    else:
        assert read_object(data) == (expected, "{}")


@given(st.binary() | st.text().map(str.encode) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_request_or_a_wire_error(data: bytes) -> None:
    try:
        parse_request(data)
    except WireError as exc:
        assert str(exc)
        assert exc.metadata is None or isinstance(json.loads(exc.metadata), dict)


@given(st.text())
def test_written_text_is_legal_in_xml(text: str) -> None:
    written = write_response(200, json.dumps({"k": text}, ensure_ascii=False), text).decode()
    for character in written:
        code = ord(character)
        assert code in (9, 10, 13) or 0x20 <= code <= 0xD7FF or 0xE000 <= code <= 0xFFFD or code >= 0x10000
    assert json.loads(written) == {"status_code": 200, "metadata": {"k": text}, "body": text}


def test_metadata_is_kept_to_the_byte() -> None:
    text = '{ "a" : 1.0e5 , "b":-0, "c":0.1000000000000000055511151231257827,"d":"\\u0041\\/", "e":1E400000 }'
    with pytest.raises(WireError, match="too large"):
        parse_request(b'{"metadata":' + text.encode() + b',"body":1}')
    text = text.replace("1E400000", "1" * 5000)
    parsed = parse_request(b'{"metadata":' + text.encode() + b',"body":1}')
    assert parsed.metadata == text
    assert text.encode() in write_response(200, parsed.metadata, 1)


def test_a_lone_surrogate_survives() -> None:
    parsed = parse_request(rb'{"metadata":{"k":"\ud83d"},"body":"\ud83d"}')
    response = write_response(200, parsed.metadata, parsed.body)
    assert json.loads(response)["body"] == "\ud83d"
    assert json.loads(response)["metadata"] == {"k": "\ud83d"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"metadata":{"x":NaN},"body":1}', "NaN"),
        (b'{"body":NaN,"metadata":{}}', "NaN"),
        (b'{"metadata":{},"body":01}', "JSON"),
        (b'{"metadata":{},"body":1,}', "JSON"),
        (b'{"metadata":{},,"body":1}', "JSON"),
        (b'{"metadata":{} "body":1}', "JSON"),
        (b'{"metadata" {},"body":1}', "JSON"),
        (b"{'metadata':{},\"body\":1}", "JSON"),
        (b'{"metadata":{},"body":"\x01"}', "JSON"),
        (b'{"metadata":{},"body":"', "JSON"),
        (b'{"metadata":{},"body":', "JSON"),
        (b'{"metadata":{},"body"', "JSON"),
        (b'{"metadata":{}', "JSON"),
        (b"{", "JSON"),
        (b'{"', "JSON"),
        (b"   ", "empty"),
        (b"\xef\xbb\xbf{}", "JSON"),
        (b"[]", "object"),
        (b"null", "object"),
        (b'"x"', "object"),
        (b"{}", "metadata"),
    ],
)
def test_what_is_no_json_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(WireError, match=message) as caught:
        parse_request(data)
    assert caught.value.metadata is None


def test_a_duplicate_key_in_the_body_still_gives_the_metadata_back() -> None:
    with pytest.raises(WireError, match="duplicate key: 'a'") as caught:
        parse_request(b'{"metadata":{"id":7},"body":[{"a":1,"a":2}]}')
    assert caught.value.metadata == '{"id":7}'


@pytest.mark.parametrize(
    "data",
    [
        b'{"metadata":{"id":7,"id":8},"body":1}',
        b'{"metadata":{"x":{"id":7,"id":8}},"body":1}',
        b'{"metadata":{"id":7},"body":1,"metadata":{"id":7}}',
    ],
)
def test_a_duplicate_key_in_the_metadata_makes_it_unreadable(data: bytes) -> None:
    with pytest.raises(WireError, match="duplicate") as caught:
        parse_request(data)
    assert caught.value.metadata is None


@pytest.mark.parametrize(("open_", "close"), [("[", "]"), ('{"a":', "}")])
def test_nesting_ends_at_the_limit(open_: str, close: str) -> None:
    def nested(levels: int) -> bytes:
        return f'{{"metadata":{{}},"body":{open_ * levels}1{close * levels}}}'.encode()

    body = parse_request(nested(MAX_NESTING - 1)).body
    assert write_json(body)
    with pytest.raises(WireError, match="nests deeper"):
        parse_request(nested(MAX_NESTING))
    with pytest.raises(WireError, match="nests deeper"):
        parse_request(nested(100_000))


def test_brackets_in_strings_do_not_nest() -> None:
    text = '[{"' * 1000 + "\\"
    data = json.dumps({"metadata": {"t": text}, "body": [[text]] * 500}).encode()
    assert parse_request(data).body == [[text]] * 500


def test_a_wide_document_is_not_deep() -> None:
    value = [[{}] * 50] * 500
    assert read_object(request_bytes(body=value))[0]["body"] == value


# What could mislead the reading in one scan as to where metadata stands, and what both ways must refuse alike.
ODD_STRINGS = st.sampled_from(
    [
        r'"metadata"',
        r'"met\u0061data"',
        r'"\u006Detadata"',
        r'"x\"metadata"',
        r'"\"metadata\""',
        r'"metadata\\"',
        '"\x7f"',
    ]
) | st.text(max_size=3).map(json.dumps)
ODD_NUMBERS = st.sampled_from(["-0", "01", "1e400", "1.0", "NaN", "9" * 4300, "9" * 4301, "-" + "9" * 4300])
SPACE = st.sampled_from(["", " ", "\r\n\t"])


def objects(values: st.SearchStrategy[str], first: str = "") -> st.SearchStrategy[str]:
    member = st.builds(lambda *parts: "".join(parts), SPACE, ODD_STRINGS, SPACE, st.just(":"), SPACE, values, SPACE)
    whole = st.lists(member, max_size=3).map(lambda members: [first, *members] if first else members)
    return whole.flatmap(st.permutations).map(lambda members: "{" + ",".join(members) + "}")


ODD_VALUES = st.recursive(ODD_STRINGS | ODD_NUMBERS, objects, max_leaves=6)


@given(objects(ODD_VALUES).flatmap(lambda own: objects(ODD_VALUES, f'"metadata" : {own}')))
def test_reading_in_one_scan_gives_what_the_walk_gives(text: str) -> None:
    plain = read_plain(text)
    event(f"in one scan: {plain is not None}")
    if plain is not None:
        document = Document(text)
        document.read()
        assert document.duplicate is None
        assert (repr(document.values), document.metadata) == (repr(plain[0]), plain[1])


@pytest.mark.parametrize("more", ["", ',"note":"metadata"'])  # the second cannot be read in one scan
@pytest.mark.parametrize("sign", ["", "-"])
def test_how_many_digits_an_integer_may_have(sign: str, more: str) -> None:
    longest = sign + "9" * 4300
    text = '{"metadata":{},"body":%s' + more + "}"
    assert read_object((text % longest).encode())[0]["body"] == int(longest)
    with pytest.raises(WireError, match="more than 4300 digits"):
        read_object((text % (longest + "9")).encode())


@pytest.mark.parametrize("value", [math.nan, math.inf, {"a": [-math.inf]}])
def test_what_json_cannot_say_is_not_written(value: Any) -> None:
    with pytest.raises(ValueError, match=r"JSON|Out of range"):
        write_json(value)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"path": 7}, "path"),
        ({"options": []}, "options"),
        ({"options": {"inference_id": ""}}, "options.inference_id"),
        ({"options": {"inference_id": "x" * 65}}, "options.inference_id"),
        ({"options": {"inference_id": "zoë"}}, "options.inference_id"),
        ({"options": {"inference_id": 7}}, "options.inference_id"),
        ({"options": {"request_ttl_seconds": 21601}}, "options.request_ttl_seconds"),
        ({"options": {"request_ttl_seconds": 60.5}}, "options.request_ttl_seconds"),
        ({"options": {"request_ttl_seconds": True}}, "options.request_ttl_seconds"),
        ({"options": {"invocation_timeout_seconds": 0}}, "options.invocation_timeout_seconds"),
        ({"options": {"invocation_timeout_seconds": 3601}}, "options.invocation_timeout_seconds"),
        ({"options": {"stream": "yes"}}, "options.stream"),
        ({"options": {"deadline": "tomorrow"}}, "options.deadline"),
        ({"options": {"deadline": "2026-11-21T12:00:00"}}, "options.deadline"),
        ({"options": {"deadline": 1795294299}}, "options.deadline"),
        ({"options": {"content_type": "x" * 1025}}, "options.content_type"),
        ({"options": {"nope": 1}}, "options.nope"),
        ({"input_location": "s3://b/k"}, "body"),
        ({"input_location": 7}, "body"),
    ],
)
def test_an_envelope_s_fault_names_its_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(WireError) as caught:
        parse_request(request_bytes(**fields))
    assert caught.value.param == param
    assert param.rpartition(".")[2] in str(caught.value)
    assert caught.value.metadata == "{}"


def test_null_options_and_locations_are_absent_ones() -> None:
    parsed = parse_request(request_bytes(options=None, input_location=None, path=None))
    assert parsed == ParsedRequest(None, 1, None, None, "{}")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("Infinity", "Infinity"),
        ("-Infinity", "-Infinity"),
        ("[NaN]", "NaN"),
        ("1e999", "too large"),
        ("-1e999", "too large"),
        ("9" * 5000, "4300 digits"),
        ("[" * 200 + "]" * 200, "nests deeper"),
        ("[" * 100_000, "nests deeper"),
    ],
)
def test_a_body_that_cannot_be_taken_still_gives_the_metadata_back(value: str, message: str) -> None:
    with pytest.raises(WireError, match=message) as caught:
        parse_request(b'{"metadata":{"id":7},"body":' + value.encode() + b"}")
    assert caught.value.metadata == '{"id":7}'


def test_metadata_that_nests_too_deeply_is_not_given_back() -> None:
    with pytest.raises(WireError, match="nests deeper") as caught:
        parse_request(b'{"metadata":{"a":' + b"[" * 200 + b"]" * 200 + b'},"body":1}')
    assert caught.value.metadata is None


def test_a_string_that_nothing_closes_costs_no_quadratic_time() -> None:
    # Quadratic, this is hours; the suite's limit for a test is the assertion.
    data = b'{"metadata":{},"body":' + b"[" * 200 + b'"' + b'\\"' * 2_000_000
    with pytest.raises(WireError):
        parse_request(data)


def test_a_million_unknown_options_are_one_error() -> None:
    options = {f"k{n}": n for n in range(1_000_000)}
    data = request_bytes(options=options)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    parse_options_only = json.loads(data)  # what reading alone costs
    reading = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    del parse_options_only
    with pytest.raises(WireError, match="k0 is not a supported option"):
        parse_request(data)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert after < 3 * reading + 100_000  # KiB; an error of each took over a gigabyte


@pytest.mark.parametrize(
    ("data", "limit", "metadata"),
    [
        (b'{"path":"/x","metadata":{"id":7},"body":"' + b"x" * 1000, 100, '{"id":7}'),
        (b'{"metadata":{"id":7},"body":"' + b"x" * 1000, 10, None),
        (b'{"body":"' + b"x" * 1000 + b'","metadata":{"id":7}}', 100, None),
        (b'{"metadata":7,"body":1}', 100, None),
        (b"\xff\xff", 100, None),
        (b"", 100, None),
    ],
)
def test_metadata_is_peeked_at_in_the_first_bytes_only(data: bytes, limit: int, metadata: str | None) -> None:
    assert peek_metadata(data, limit) == metadata
