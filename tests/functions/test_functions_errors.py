"""What a function raises or returns becomes which error, and what of it anybody gets to read."""

import asyncio
import contextlib
import gc

import pytest
import structlog
from function_apps import ask, in_process, serving

from rejoinder.worker.errors import BadRequest, Failed, Missing, NotGiven, RequestError, RetryableError, Unavailable

RAISING = """
    import enum, dataclasses, datetime

    class Mine(RetryableError): pass
    class Careless(BadRequest):
        def __init__(self, words): self.words = words
        def __str__(self): return self.words
    class OutOfMemoryError(RuntimeError): pass
    class Deeper(OutOfMemoryError): pass

    def do(body):
        if body == "cancelled":
            import asyncio
            raise asyncio.CancelledError
        raise {
            "retry": lambda: RetryableError("later", delay=7),
            "mine": lambda: Mine("mine", delay="soon"),
            "bad": lambda: BadRequest("no text", param="text"),
            "careless": lambda: Careless("my words"),
            "value": lambda: ValueError("secret"),
            "exit": lambda: SystemExit(3),
            "interrupt": lambda: KeyboardInterrupt("secret"),
            "stop": lambda: StopIteration("secret"),
            "memory": lambda: MemoryError(),
            "cuda": lambda: Deeper("secret"),
            "timeout": lambda: TimeoutError("secret"),
            "group": lambda: ExceptionGroup("secret", [ValueError()]),
        }[body]()

    @generate("/sync")
    def sync(body): do(body)
    @generate("/async")
    async def in_loop(body): do(body)
    @generate_batch("/batch")
    def batch(bodies): do(bodies[0])
    @generate_batch("/async-batch")
    async def async_batch(bodies): do(bodies[0])
    @generate_batch("/given")
    def given(bodies):
        answers = []
        for body in bodies:
            try: do(body)
            except BaseException as exc: answers.append(exc)
        return answers
    @generate_stream("/stream")
    def stream(body):
        yield 1
        do(body)
    @generate_stream("/async-stream")
    async def async_stream(body):
        yield 1
        do(body)
    @generate("/well")
    def well(body): return "well"
"""
PATHS = ["/sync", "/async", "/batch", "/async-batch", "/given", "/stream", "/async-stream"]
KINDS = [
    ("retry", RetryableError, "later"),
    ("mine", RetryableError, "mine"),
    ("bad", BadRequest, "no text"),
    ("careless", BadRequest, "my words"),
    ("value", Failed, "the function failed: ValueError"),
    ("exit", Failed, "the function failed: SystemExit"),
    ("interrupt", Failed, "the function failed: KeyboardInterrupt"),
    ("stop", Failed, "the function failed: (StopIteration|RuntimeError)"),
    ("cancelled", Failed, "the function failed: CancelledError"),
    ("memory", Unavailable, "ran out of memory"),
    ("cuda", Unavailable, "ran out of memory"),
    ("timeout", Failed, "the function failed: TimeoutError"),
    ("group", Failed, "the function failed: ExceptionGroup"),
]


@pytest.fixture
def log():
    with structlog.testing.capture_logs() as entries:
        yield entries


@pytest.mark.parametrize("path", PATHS)
async def test_each_error_becomes_its_status_in_each_kind_of_function(tmp_path, path, log):
    async with serving(tmp_path, RAISING) as engine:
        for body, kind, message in KINDS:
            del log[:]
            emit = [].append if "stream" in path else None
            with pytest.raises(RequestError, match=f"{message}") as caught:
                await ask(engine, body, path, emit=emit)
            error = caught.value
            assert isinstance(error, kind), (body, error)
            assert error.status_code == kind.status_code
            assert "secret" not in error.message
            assert error.__cause__ is not error
            assert getattr(error, "delay", None) == (7 if body == "retry" else None)
            assert error.param == ("text" if body == "bad" else None)
            told = [entry for entry in log if entry["log_level"] == "error"]
            asked_for = body in {"retry", "mine", "bad", "careless"}
            assert [entry["response_id"] for entry in told] == ([] if asked_for else ["r1"]), (body, log)
            assert all(isinstance(entry["exc_info"], BaseException) for entry in told)
        assert await ask(engine, 1, "/well") == "well"


async def test_errors_cross_the_process_and_the_traceback_stays_in_its_log(tmp_path, capfd):
    async with in_process(tmp_path, RAISING, logs=["json", "info"]) as engine:
        for body, kind, message in KINDS:
            with pytest.raises(kind, match=message) as caught:
                await ask(engine, body, "/sync")
            assert "secret" not in caught.value.message
            assert getattr(caught.value, "delay", None) == (7 if body == "retry" else None)
        assert await ask(engine, 1, "/well") == "well"
        with pytest.raises(Missing):
            await ask(engine, 1, "/nowhere")
    said = capfd.readouterr().err
    assert said.count("ValueError: secret") == 1
    assert "Traceback (most recent call last)" in said
    assert "in sync" in said


async def test_answers_that_are_json_and_those_that_are_not(tmp_path):
    source = """
        import array, collections, dataclasses, datetime, decimal, enum, uuid
        import numpy
        from pydantic import BaseModel, Field

        class Color(enum.Enum): RED = "red"
        class Word(enum.StrEnum): YES = "yes"
        class Model(BaseModel):
            day: datetime.date
            other: int = Field(serialization_alias="alias")
        @dataclasses.dataclass
        class Data:
            model: Model
            vector: object
        loop = []
        loop.append(loop)
        day = datetime.date(2026, 11, 22)
        values = {
            "model": Model(day=day, other=1),
            "data": Data(Model(day=day, other=1), numpy.float32(0.5)),
            "numpy": {"a": numpy.arange(3), "b": numpy.float64(0.5), "c": [numpy.int64(2), numpy.bool_(True)]},
            "keys": {1: "a", None: "b", True: "c", 1.5: "d", Word.YES: "e"},
            "mixed": (Color.RED, Word.YES, decimal.Decimal("1.5"), {3}, b"x", collections.OrderedDict(a=(1,))),
            "object": object(),
            "inner": {"a": [1, {"b": object()}]},
            "key": {(1, 2): 3},
            "loop": loop,
            "function": len,
        }
        @generate
        def one(body): return values[body]
        @generate_batch("/batch")
        def many(bodies): return [values[body] for body in bodies]
        @generate_batch("/array")
        def vectors(bodies): return numpy.ones((len(bodies), 2))
    """
    good = {
        "model": {"day": "2026-11-22", "alias": 1},
        "data": {"model": {"day": "2026-11-22", "alias": 1}, "vector": 0.5},
        "numpy": {"a": [0, 1, 2], "b": 0.5, "c": [2, True]},
        "keys": {"1": "c", "null": "b", "1.5": "d", "yes": "e"},
        "mixed": ["red", "yes", "1.5", [3], "x", {"a": [1]}],
    }
    async with serving(tmp_path, source) as engine:
        for name, want in good.items():
            assert await ask(engine, name) == want
        for name in ("object", "inner", "key", "loop", "function"):
            with pytest.raises(NotGiven, match="cannot be written as JSON"):
                await ask(engine, name)
        names = [*good, "object", "inner"]
        outcomes = await asyncio.gather(*(ask(engine, name, "/batch") for name in names), return_exceptions=True)
        assert outcomes[: len(good)] == list(good.values())
        assert {type(outcome) for outcome in outcomes[len(good) :]} == {NotGiven}
        assert await asyncio.gather(*(ask(engine, n, "/array") for n in range(3))) == [[1.0, 1.0]] * 3


async def test_answers_of_a_batch_are_counted(tmp_path):
    source = """
        @generate_batch
        def many(bodies): return bodies[0] if len(bodies) == 1 else []
    """
    async with serving(tmp_path, source) as engine:
        assert await ask(engine, ["one answer"]) == "one answer"
        with pytest.raises(Failed, match="returned 2 answers for 1 requests"):
            await ask(engine, [1, 2])
        with pytest.raises(Failed, match="returned int, not a list"):
            await ask(engine, 5)


async def test_in_a_batch_of_64_three_poisonous_items_fail_alone(tmp_path):
    source = """
        calls = []
        @generate_batch(max_batch_size=64)
        def many(bodies):
            calls.append(len(bodies))
            for body in bodies:
                if body in (5, 31, 60):
                    raise ValueError(f"poison {body}")
            return [2 * body for body in bodies]
        @generate("/calls")
        def told(body): return calls
    """
    async with serving(tmp_path, source, max_wait_ms=1000) as engine:
        outcomes = await asyncio.gather(*(ask(engine, n) for n in range(64)), return_exceptions=True)
        bad = [n for n, outcome in enumerate(outcomes) if isinstance(outcome, BaseException)]
        assert bad == [5, 31, 60]
        assert all(type(outcomes[n]) is Failed for n in bad)
        assert [outcomes[n] for n in range(64) if n not in bad] == [2 * n for n in range(64) if n not in bad]
        assert (await ask(engine, path="/calls"))[0] == 64


@pytest.mark.parametrize("path", ["/sync", "/async", "/batch", "/stream"])
async def test_a_failure_is_freed_with_its_frames_at_once(tmp_path, path):
    source = """
        import weakref
        refs = []
        def made():
            error = ValueError("large locals hang on it")
            refs.append(weakref.ref(error))
            return error
        @generate("/sync")
        def sync(body, context): raise made()
        @generate("/async")
        async def in_loop(body, context): raise made()
        @generate_batch("/batch")
        def batch(bodies, contexts): raise made()
        @generate_stream("/stream")
        def stream(body, context):
            yield 1
            raise made()
        @generate("/alive")
        def alive(body): return sum(ref() is not None for ref in refs)
    """
    gc.collect()
    gc.disable()
    try:
        async with serving(tmp_path, source) as engine:
            for _ in range(5):
                with contextlib.suppress(Failed):
                    await ask(engine, path=path, emit=[].append if path == "/stream" else None)
            assert await ask(engine, path="/alive") == 0
    finally:
        gc.enable()
