"""What a module of functions may be: marks, paths, parameters, `init`; what is said of one that cannot be served."""

import subprocess
import sys

import pytest
from function_apps import DEFAULT, ask, serving

from rejoinder.worker import functions
from rejoinder.worker.errors import BadRequest, EngineGone, Missing
from rejoinder.worker.functions import Context, Deployment, generate, generate_batch, generate_stream, init


@pytest.mark.parametrize("kind", ["def", "async def"])
async def test_each_kind_of_function_sync_and_async(tmp_path, kind):
    source = f"""
        @init
        {kind} load(custom):
            return {{"scale": custom["scale"]}}

        @generate
        {kind} one(body, state):
            return body * state["scale"]

        @generate_batch("/batch")
        {kind} many(bodies, state):
            return [body + state["scale"] for body in bodies]

        @generate_stream("/stream")
        {kind} stream(body, state):
            for number in range(body):
                yield number * state["scale"]
    """
    async with serving(tmp_path, source, params={"scale": 10}) as engine:
        assert engine.paths == {DEFAULT, "/batch", "/stream"}
        assert await ask(engine, 3) == 30
        assert await ask(engine, 3, "/batch") == 13
        chunks = []
        assert await ask(engine, 4, "/stream", emit=chunks.append) is None
        assert chunks == [0, 10, 20, 30]


async def test_a_path_may_have_one_of_each_kind_and_options_stream_chooses(tmp_path):
    source = """
        @generate
        def one(body): return "one"
        @generate_batch
        def many(bodies): return ["batch"] * len(bodies)
        @generate_stream
        def stream(body): yield "stream"
        @generate("only-one")
        def only(body): return "only"
        @generate_stream("/only-stream")
        def only_stream(body): yield "only"
    """
    async with serving(tmp_path, source) as engine:
        chunks = []
        assert await ask(engine) == "batch"
        await ask(engine, emit=chunks.append)
        assert chunks == ["stream"]
        assert await ask(engine, path="/only-one") == "only"
        with pytest.raises(BadRequest, match="cannot stream") as caught:
            await ask(engine, path="/only-one", emit=chunks.append)
        assert caught.value.param == "options.stream"
        with pytest.raises(BadRequest, match="streams only") as caught:
            await ask(engine, path="/only-stream")
        assert caught.value.param == "options.stream"
        with pytest.raises(Missing, match="/only-one"):
            await ask(engine, path="/nowhere")


async def test_a_function_by_name_brings_init_and_nothing_else(tmp_path):
    source = """
        @init
        def load(): return "state"
        @generate("/a")
        @generate("/b")
        def one(body, state): return state
        @generate("/c")
        def other(body): return None
    """
    async with serving(tmp_path, source, "one") as engine:
        assert engine.paths == {"/a", "/b"}
        assert await ask(engine, path="/b") == "state"


async def test_the_context_comes_by_name_and_knows_the_request(tmp_path):
    source = """
        def told(context):
            return [context.path, context.response_id, context.created, context.get_json(), context.params,
                    context.device, context.cancelled]
        @generate
        def one(body, *, context: "Context", other=1): return told(context)
        @generate_batch("/batch")
        async def many(bodies, contexts, state): return [told(context) for context in contexts]
        @init
        def load(custom, context): custom["device"] = context.device; return custom
    """
    async with serving(tmp_path, source, params={"k": 1}) as engine:
        want = ["r9", 7, {"a": 1}, {"k": 1, "device": "cpu"}, "cpu", False]
        assert await ask(engine, {"a": 1}, response_id="r9") == [DEFAULT, *want]
        assert await ask(engine, {"a": 1}, "/batch", response_id="r9") == ["/batch", *want]


async def test_bodies_are_validated_before_the_function_or_its_batch(tmp_path):
    source = """
        from __future__ import annotations
        from datetime import date
        from typing import TYPE_CHECKING
        from pydantic import BaseModel, ConfigDict
        if TYPE_CHECKING:
            from nowhere import Unknown

        class Text(BaseModel):
            text: str
            more: list[int] = []

        class Strict(BaseModel):
            model_config = ConfigDict(strict=True, extra="forbid")
            day: date
            pair: tuple[int, int] = (0, 0)

        called = []

        @generate
        def one(body: Text, state: Unknown = None): return [type(body).__name__, body.text]
        @generate_batch("/batch", max_batch_size=4)
        def many(bodies: list[Text]): called.append(len(bodies)); return [body.text for body in bodies]
        @generate("/dict")
        def plain(body: dict[str, object]): return body
        @generate("/strict")
        def strict(body: Strict): return body
        @generate("/list")
        def numbers(body: list[int]): return sum(body)
        @generate("/called")
        def calls(body): return called
    """
    async with serving(tmp_path, source) as engine:
        assert await ask(engine, {"text": "hi"}) == ["Text", "hi"]
        assert await ask(engine, {"text": "hi"}, "/batch") == "hi"
        assert await ask(engine, {"a": None}, "/dict") == {"a": None}
        # JSON has neither dates nor tuples: a strict model takes them from what JSON has.
        assert await ask(engine, {"day": "2026-11-22", "pair": [1, 2]}, "/strict") == {
            "day": "2026-11-22",
            "pair": [1, 2],
        }
        assert await ask(engine, [1, 2], "/list") == 3
        for path, body, param, message in [
            (DEFAULT, {}, "text", "text is missing"),
            (DEFAULT, {"text": "x", "more": [1, "y"]}, "more.1", "more.1: it should be a valid integer"),
            (DEFAULT, "x", None, "the body: it should be"),
            ("/batch", {"text": 1}, "text", "text: it should be a valid string"),
            ("/dict", [], None, "the body: it should be a JSON object"),
            ("/strict", {"day": 5}, "day", "day: it should be"),
            ("/strict", {"day": "2026-11-22", "hour": 1}, "hour", "hour is not a supported field; known are day, pair"),
            ("/list", [1, None], "1", "1: it should be a valid integer"),
        ]:
            with pytest.raises(BadRequest) as caught:
                await ask(engine, body, path)
            assert (caught.value.param, caught.value.message[: len(message)]) == (param, message)
        assert await ask(engine, None, "/called") == [1]  # what was refused was in no batch


async def test_annotations_of_names_in_strings_and_in_closures(tmp_path):
    source = """
        from pydantic import BaseModel
        def made():
            class Inner(BaseModel):
                n: int
            @generate
            def one(body: "Inner"): return body.n, Inner.__name__
            return one
        one = made()
    """
    async with serving(tmp_path, source) as engine:
        assert await ask(engine, {"n": 4}) == [4, "Inner"]


async def test_init_takes_the_custom_object_as_a_model(tmp_path):
    source = """
        from pydantic import BaseModel
        class Custom(BaseModel):
            layers: int
        @init
        async def load(settings: Custom): return settings.layers
        @generate
        def one(body, state): return state
    """
    async with serving(tmp_path, source, params={"layers": "3"}) as engine:
        assert await ask(engine) == 3
    with pytest.raises(EngineGone, match=r"^app_params do not fit init 'load': layers is missing$"):
        async with serving(tmp_path, source):
            pass


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        ("import no_such_thing", "", "importing app .* failed: ModuleNotFoundError: No module named 'no_such_thing'"),
        ("1 / 0", "", "importing app .* failed: ZeroDivisionError: division by zero"),
        ("import sys; sys.exit(3)", "", "importing app .* failed: SystemExit: 3"),
        ("def f(body): return body", "", "nothing in module .* is marked"),
        ("@init\ndef load(): return 1", "", "nothing in module .* is marked"),
        ("x = 1", "x", "'x' is no function, but of type int"),
        ("x = 1", "y", "there is no 'y' in module"),
        ("@generate\ndef f(body, model): return 1", "", "generate 'f' has a parameter 'model': .*state and context"),
        ("@generate_batch\ndef f(bodies, context): return 1", "", "'context': .*state and contexts"),
        ("@generate\ndef f(): return 1", "", "takes no body"),
        ("@generate\ndef f(context): return 1", "", "takes no body"),
        ("@generate\ndef f(body: Context): return 1", "", "takes no body"),
        ("@generate\ndef f(body: 'Nowhere'): return 1", "", "annotation 'Nowhere' cannot be resolved"),
        ("@generate_batch\ndef f(bodies: dict): return 1", "", "takes a list of bodies"),
        ("class C: pass\n@generate\ndef f(body: C): return 1", "", "cannot be checked"),
        ("@generate\ndef f(body): yield 1", "", "generate 'f' yields"),
        ("@generate\ndef f(body): return 1\n@generate\ndef g(body): return 1", "", "'f' and generate 'g' both serve"),
        ("@init\ndef a(): 1\n@init\ndef b(): 1\n@generate\ndef f(body): 1", "", "a and b are all marked @init"),
        ("@init\ndef a(x, y): 1\n@generate\ndef f(body): 1", "", "init 'a' has a parameter 'y'"),
        ("@init\ndef a():\n    raise OSError('no weights')\n@generate\ndef f(body): 1", "", "OSError: no weights"),
        (
            "@init\nasync def a():\n    raise SystemExit\n@generate\ndef f(body): 1",
            "",
            "a of app .* failed: SystemExit",
        ),
        ("@generate(concurrency=0)\ndef f(body): return 1", "", "ValueError: generate: concurrency should be"),
        ("def service(context, a): return 1", "service", r"does not take \(context, \*\*app_params\): missing a"),
        ("def service(context): return 1", "service", "returned a value of type int"),
        ("def service(context):\n    def f(context): 1\n    return f", "service", "returned f; a service returns"),
        ("def service(context): return ()", "service", "returned nothing"),
        ("def service(context):\n    def generate(a, b): 1\n    return generate", "service", "the context alone"),
        ("def service(context): raise KeyError('secret')", "service", "service of app .* failed: KeyError"),
    ],
)
async def test_what_cannot_be_served_is_said_in_one_line(tmp_path, source, name, message):
    with pytest.raises(EngineGone, match=message) as caught:
        async with serving(tmp_path, "\n" + source, name):
            pass
    assert "\n" not in str(caught.value)


async def test_a_module_or_folder_that_is_not_there(tmp_path):
    from function_apps import config

    from rejoinder.worker.engines.functions.engine import FunctionsEngine

    for app, folder, message in [
        ("no_module_of_anybody", tmp_path, "there is no module 'no_module_of_anybody'"),
        ("no_module_of_anybody.sub", tmp_path, "there is no module 'no_module_of_anybody'"),
        ("not/a/module", tmp_path, "is no name of an app"),
        ("app:", tmp_path, "is no name of an app"),
        ("app", tmp_path / "none", "is no directory"),
    ]:
        engine = FunctionsEngine(config(folder, app))
        with pytest.raises(EngineGone, match=message):
            await engine.start()
        await engine.stop()


def test_a_marked_function_is_still_itself():
    @generate("/x")
    def double(body):
        return 2 * body

    assert double(2) == 4
    assert functions.marks_of(double) == (functions.Mark("generate", "/x"),)


@pytest.mark.parametrize(
    ("mark", "arguments", "message"),
    [
        (generate, {"path": 5}, "path should be"),
        (generate, {"path": "/a b"}, "path should be"),
        (generate_stream, {"concurrency": 0}, "concurrency should be a whole number of at least 1"),
        (generate_batch, {"max_batch_size": 0}, "max_batch_size should be"),
        (generate_batch, {"max_batch_bytes": True}, "max_batch_bytes should be"),
        (generate_batch, {"max_wait_ms": -1}, "max_wait_ms should be"),
        (generate_batch, {"key": "k"}, "key should be a function"),
    ],
)
def test_arguments_of_marks_are_checked(mark, arguments, message):
    with pytest.raises(ValueError, match=message):
        mark(**arguments)


def test_what_cannot_be_marked():
    for what in (int, len):
        with pytest.raises(TypeError, match="generate"):
            generate(what)
    with pytest.raises(TypeError, match="init"):
        init(5)


def test_a_context_can_be_made_by_hand():
    context = Context({"a": 1}, Deployment({"space_id": "s"}), path="/p")
    assert (context.get_json(), context.get_space_id(), context.cancelled) == ({"a": 1}, "s", False)


def test_the_users_module_is_light():
    code = "import sys, rejoinder.worker.functions; print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for heavy in ("torch", "numpy", "aiobotocore", "google.cloud", "transformers", "rejoinder.adapters"):
        assert f"'{heavy}'" not in loaded, heavy
