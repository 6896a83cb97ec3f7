"""JSON schemas: a random model under one can say nothing else, its neighbours nothing different."""

import asyncio
import json
import threading
from dataclasses import replace

import pytest
from engine_harness import KINDS, chat, started, tokens_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion
from transformers.generation.continuous_batching.requests import RequestState

from rejoinder.worker.engines.transformers import grammar
from rejoinder.worker.engines.transformers.grammar import MAX_CHARACTERS
from rejoinder.worker.engines.transformers.sampling import Sampling
from rejoinder.worker.errors import BadRequest, Failed, Unavailable

pytestmark = pytest.mark.asyncio(loop_scope="module")

PER_PAGE = 2 * 2 * 2 * 8 * 4 * 16  # both of K and V, layers, heads, size, bytes, tokens
RECORD = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["fox", "dog"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tame": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 2}, "minItems": 1, "maxItems": 2},
    },
    "required": ["kind", "count", "tame", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", autouse=True)
def _patient():
    """A check by the processor's time alone: it is the machine that may be busy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grammar, "CHECK_SECONDS", 200.0)
        yield


def asking(schema, number=0, **body):
    given = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    messages = [{"role": "user", "content": f"fox {number}"}]
    return chat({"messages": messages, "max_tokens": 150, "response_format": given, **body}, f"g-{number}")


async def said(engine, request):
    body = await engine.generate(request)
    (choice,) = ChatCompletion.model_validate(body, strict=True).choices
    return choice.message.content, choice.finish_reason


def check_record(text):
    value = json.loads(text)
    assert list(value) == ["kind", "count", "tame", "tags"]
    assert value["kind"] in {"fox", "dog"}
    assert type(value["count"]) is int
    assert 0 <= value["count"] <= 99
    assert type(value["tame"]) is bool
    assert 1 <= len(value["tags"]) <= 2
    assert all(type(tag) is str and len(tag) <= 2 for tag in value["tags"])


@pytest.mark.parametrize(
    "kind", [*KINDS, {"temperature": 0, "repetition_penalty": 1.9, "presence_penalty": 2}], ids=str
)
async def test_a_random_model_says_what_the_schema_says(engine, kind):
    requests = [asking(RECORD, number, **kind) for number in range(4)]
    for text, reason in await asyncio.gather(*[said(engine, request) for request in requests]):
        assert reason == "stop"
        check_record(text)


def mixed(number):
    """Every other one has a schema; log-probabilities and penalties come with and without."""
    return [
        asking(
            RECORD,
            i,
            **KINDS[i // 2 % len(KINDS)],
            **({} if i % 2 else {"response_format": {"type": "text"}, "max_tokens": 60}),
            **({"logprobs": True, "top_logprobs": 2} if i % 3 == 0 else {}),
            **({"frequency_penalty": 0.5} if i % 5 == 0 else {}),
        )
        for i in range(number)
    ]


async def test_neighbours_say_what_they_say_alone(engine):
    requests = mixed(16)
    alone = [await said(engine, request) for request in requests]
    assert await asyncio.gather(*[said(engine, request) for request in requests]) == alone
    for text, reason in alone[1::2]:
        assert reason == "stop"
        check_record(text)


async def test_a_preemption_takes_no_token_twice(engine, tiny, monkeypatch):
    requests = mixed(16)
    want = await asyncio.gather(*[said(engine, request) for request in requests])
    small = await started(tiny, cache_bytes=14 * PER_PAGE, max_model_len=180)
    try:
        preempted = []
        original = RequestState.create_equivalent_initial_request

        def noted(state):
            if state.generated_tokens and "progress" in state.logit_processor_kwargs:
                preempted.append(state.request_id)
            return original(state)

        monkeypatch.setattr(RequestState, "create_equivalent_initial_request", noted)
        assert await asyncio.gather(*[said(small, request) for request in requests]) == want
        assert preempted
    finally:
        await small.stop()


async def test_any_object(engine):
    for number in range(6):
        body = {"response_format": {"type": "json_object"}, "temperature": 2, "max_tokens": 200, "seed": number}
        text, reason = await said(engine, asking({}, number, **body))
        assert text.startswith("{")
        if reason == "stop":
            assert isinstance(json.loads(text), dict)
    named = {"type": "json_schema", "json_schema": {"name": "any", "strict": True, "description": "x"}}
    assert (await said(engine, asking({}, response_format=named)))[0].startswith("{")


async def test_what_is_cut_short_says_length(engine):
    text, reason = await said(engine, asking(RECORD, max_tokens=4))
    assert reason == "length"
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)


async def test_log_probabilities_stay_the_models_own(engine):
    asked = {"logprobs": True, "top_logprobs": 3, "temperature": 0}
    body = await engine.generate(asking({"const": "fox"}, **asked))
    content = body["choices"][0]["logprobs"]["content"]
    assert "".join(one["token"] for one in content) == '"fox"'
    assert any(one["token"] not in {other["token"] for other in one["top_logprobs"]} for one in content)
    assert all(one["logprob"] < 0 for one in content)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "strin"}, "Invalid type"),
        ({"type": "object", "not": {}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "contains": {}}, "contains"),
        ({"if": {}, "then": {}}, "if"),
        ({"type": "string", "format": "colour"}, "Unknown format"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}, "oneOf"),
        ({"not": {"type": "string"}, "x-guidance": {"lenient": True}}, "not"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "Unsatisfiable"),
        ({"enum": []}, "Unsatisfiable"),
        ({"$ref": "#"}, ""),
        ({"$ref": "#/$defs/none"}, ""),
        ({"$ref": "http://127.0.0.1:9/schema.json"}, "does not fetch"),
        ({"$ref": "file:///etc/passwd"}, "does not fetch"),
        ({"type": "integer", "minimum": -(10**30)}, ""),
        ({"type": "string", "const": "\ud800"}, ""),
        ({"enum": ["x" * MAX_CHARACTERS]}, "at most"),
        (
            {"$defs": {str(n): {"$ref": f"#/$defs/{n + 1}"} for n in range(1200)}, "$ref": "#/$defs/0"},
            "too complex",
        ),
        ({"allOf": [{"type": "string", "pattern": f".*{chr(97 + n)}.*"} for n in range(22)]}, "too complex"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_what_cannot_be_guaranteed_is_refused(engine, schema, reason):
    neighbour = asyncio.create_task(said(engine, asking(RECORD, 1)))
    for _ in range(2):
        with pytest.raises(BadRequest, match="response_format: ") as caught:
            await engine.generate(asking(schema))
        assert caught.value.param == "response_format"
        assert reason in str(caught.value)
    check_record((await neighbour)[0])


async def test_a_worker_of_recorded_steps_refuses_it(engine, monkeypatch):
    monkeypatch.setattr(engine, "_limits", replace(engine._limits, dynamic=False))
    with pytest.raises(BadRequest, match="CUDA graphs") as caught:
        await engine.generate(asking(RECORD))
    assert caught.value.param == "response_format"


async def test_a_schema_is_compiled_once(engine, monkeypatch):
    checked = []
    original = grammar._check
    monkeypatch.setattr(grammar, "_check", lambda text: checked.append(text) or original(text))
    schema = {"enum": ["once", "only"]}
    await asyncio.gather(*[engine.generate(asking(schema, n, n=2)) for n in range(5)])
    await engine.generate(asking(schema, 7))
    assert len(checked) == 1
    for n in range(grammar.KEPT + 3):
        engine._grammars._known[str(n)] = engine._grammars._known[next(iter(engine._grammars._known))]
    await engine.generate(asking({"const": 1}))
    assert len(engine._grammars._known) == grammar.KEPT


async def test_one_who_waits_no_longer_ends_nobodys_compilation(engine):
    schema = {"enum": ["left", "right"]}
    leaving, staying = (asyncio.create_task(engine._grammars.compiled(schema)) for _ in range(2))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.wait([leaving])
    assert leaving.cancelled()
    assert await staying is await engine._grammars.compiled(schema)


async def test_a_dead_end_fails_that_sequence_alone(engine, monkeypatch):
    """A matcher in error, as after a step that cost more than its limit: here after a token that it does not take."""
    grammar = await engine._grammars.compiled(RECORD)
    dead = grammar.begin(3)
    dead.update([5, 6, 7], [engine._text.encode("x")[0]])

    class Dead(type(grammar)):
        def begin(self, prompt_tokens):
            return dead

    stuck = Sampling(grammar=Dead(grammar._matcher, grammar._eos))
    neighbour = asyncio.create_task(tokens_of(engine._batch, [5, 6, 7], 20, Sampling()))
    with pytest.raises(Failed, match="response_format"):
        await engine._batch.run([5, 6, 7], 20, stuck)
    assert await neighbour == await tokens_of(engine._batch, [5, 6, 7], 20, Sampling())
    check_record((await said(engine, asking(RECORD)))[0])


async def test_it_fails_who_reached_the_dead_end_alone(engine):
    """A sequence that a stop string has ended may go on a little, unseen."""
    compiled = await engine._grammars.compiled({"const": "fox"})
    following = compiled.begin(3)
    following.update([5, 6, 7], [])
    following.allowed()
    following.update([5, 6, 7, 8], [])  # which it does not take
    following.allowed()
    following.update([5, 6, 7, 8], [1])
    following.allowed()
    following.check(1)
    with pytest.raises(Failed, match="response_format"):
        following.check(2)


async def test_a_matcher_is_touched_by_the_generation_thread_alone(engine):
    """It may not be asked while it computes a mask, which it does without the GIL."""
    compiled = await engine._grammars.compiled(RECORD)
    threads = set()

    class Watched:
        def __init__(self, matcher):
            self._matcher = matcher

        def __getattr__(self, name):
            threads.add(threading.get_ident())
            return getattr(self._matcher, name)

    class Watching(type(compiled)):
        def begin(self, prompt_tokens):
            following = super().begin(prompt_tokens)
            following._matcher = Watched(following._matcher)
            return following

    sampling = Sampling(grammar=Watching(compiled._matcher, compiled._eos))
    for stop in (None, lambda tokens: len(tokens) == 4):
        assert len(await tokens_of(engine._batch, [5, 6, 7], 60, sampling, stop)) >= 4
    assert threads == {engine._batch._manager._generation_thread.ident}


async def test_a_busy_machine_is_no_fault_of_the_schema(engine, monkeypatch):
    schema = {"enum": ["up", "down"]}
    with monkeypatch.context() as patch:
        patch.setattr(grammar, "CHECK_SECONDS", 1e-6)
        with pytest.raises(Unavailable, match="in time"):
            await engine.generate(asking(schema))
    assert (await said(engine, asking(schema)))[0] in {'"up"', '"down"'}


LEAVES = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.tuples(st.integers(-1000, 1000), st.integers(0, 50)).map(
        lambda pair: {"type": "integer", "minimum": pair[0], "maximum": sum(pair)}
    ),
    st.integers(0, 4).map(lambda length: {"type": "string", "maxLength": length}),
    st.lists(st.one_of(st.text(max_size=4), st.integers(-9, 9)), min_size=1, max_size=3).map(
        lambda values: {"enum": values}
    ),
)
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        inner.map(lambda items: {"type": "array", "items": items, "minItems": 1, "maxItems": 2}),
        st.dictionaries(st.text(st.sampled_from("abé"), max_size=2), inner, max_size=2).map(
            lambda properties: {
                "type": "object",
                "properties": properties,
                "required": list(properties),
                "additionalProperties": False,
            }
        ),
        st.lists(inner, min_size=1, max_size=2).map(lambda members: {"anyOf": members}),
    ),
    max_leaves=4,
)


def conforms(schema, value):
    """The definitions, for what `SCHEMAS` makes."""
    if "anyOf" in schema:
        return any(conforms(member, value) for member in schema["anyOf"])
    if "enum" in schema:
        return any(type(one) is type(value) and one == value for one in schema["enum"])
    checks = {
        "boolean": lambda: type(value) is bool,
        "null": lambda: value is None,
        "integer": lambda: type(value) is int and schema["minimum"] <= value <= schema["maximum"],
        "string": lambda: type(value) is str and len(value) <= schema["maxLength"],
        "array": lambda: (
            type(value) is list and 1 <= len(value) <= 2 and all(conforms(schema["items"], one) for one in value)
        ),
        "object": lambda: (
            type(value) is dict
            and value.keys() == schema["properties"].keys()
            and all(conforms(schema["properties"][key], value[key]) for key in value)
        ),
    }
    return checks[schema["type"]]()


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=SCHEMAS, seed=st.integers(0, 1000))
async def test_schemas_of_many_shapes(engine, schema, seed):
    text, reason = await said(engine, asking(schema, seed=seed, temperature=1.5, max_tokens=200))
    if reason == "stop":
        assert conforms(schema, json.loads(text)), (schema, text)
    else:
        assert engine._limits.sequence > 200
