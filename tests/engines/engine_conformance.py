"""The engines that the conformance suite runs against, and what it may ask of each.

A new engine is one more `Subject` in `SUBJECTS`: how to build one, what it answers and what it refuses.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine_harness import CONTEXT, FAMILIES, KINDS, SMALL, build_tiny, chat, completion
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion
from pooling_harness import CONTEXT as BERT_CONTEXT
from pooling_harness import WORDS, build_bert, embeddings, rerank

from rejoinder.worker.engines.echo import EchoEngine
from rejoinder.worker.engines.factory import FUNCTIONS_FACTORY, create_functions, create_vllm
from rejoinder.worker.engines.host import EngineProcess, HostSettings
from rejoinder.worker.engines.pool import EnginePool
from rejoinder.worker.engines.protocol import Engine, EngineRequest
from rejoinder.worker.engines.quarantine import Suspects
from rejoinder.worker.engines.transformers import tasks
from rejoinder.worker.engines.transformers.engine import create
from rejoinder.worker.errors import BadRequest, Missing, RequestError, RequestTooLarge


@dataclass(frozen=True)
class Bad:
    """A request that is refused."""

    request: EngineRequest
    error: type[RequestError]
    param: str | None


@dataclass(frozen=True)
class Subject:
    """An engine, and what it may be asked."""

    name: str
    build: Callable[[Callable[[str], str]], Engine]
    """Build one that is not started, from the directory of a tiny model, given by its family's name."""
    good: Callable[[int], EngineRequest]
    """A request that is answered; of several kinds, with the number in its response id."""
    bad: Sequence[Bad] = ()
    long: Callable[[int], EngineRequest] | None = None
    """A request that takes hundreds of steps. None: there is nothing to cancel."""
    process: bool = False
    """Whether it runs in a process that can be killed."""
    same: Callable[[Any, Any], bool] = operator.eq
    """Whether two bodies are what one request should get."""
    shapes: Mapping[str, Any] = field(default_factory=lambda: {"/v1/completions": Completion})
    """For each path the type of its response, where it is OpenAI's."""
    streams: bool = False
    """Whether it streams, in OpenAI's chunks."""
    fixture: str | None = None
    """Of pytest, what it needs."""


MODELS = {
    **{family: functools.partial(build_tiny, family=family) for family in FAMILIES},
    "bert": build_bert,
    "cross-encoder": functools.partial(build_bert, labels=1),
}
"""How to make the tiny models, by their families' names."""


def text(number: int) -> EngineRequest:
    """A completion of one of many kinds."""
    body = {"prompt": f"fox {number} jumps" * (1 + number % 4), "max_tokens": 4 + 5 * (number % 4)}
    more = ({}, {"n": 3}, {"frequency_penalty": 1.0}, {"stop": ["a"]}, {"prompt": ["dog", "fox"]})
    return completion({**body, **KINDS[number % len(KINDS)], **more[number % len(more)]}, f"good-{number}")


def text_or_chat(number: int) -> EngineRequest:
    """As `text`, and a conversation now and then."""
    if number % 4:
        return text(number)
    turns = [{"role": "user", "content": f"hi {number}"}]
    return chat({"messages": turns, "max_tokens": 6, "temperature": number % 8 / 4}, f"good-{number}")


def long_text(number: int) -> EngineRequest:
    """Several sequences, so that one that ends early does not end the request."""
    return completion({"prompt": "the lazy", "n": 4, "max_tokens": 200, "temperature": 1}, f"long-{number}")


def refused(body: Any, error: type[RequestError], param: str | None, make: Any = completion) -> Bad:
    """A bad request, by default a completion."""
    return Bad(make(body, f"bad-{param}"), error, param)


def streamed(request: EngineRequest, emit: Callable[[Any], None] | None = None) -> EngineRequest:
    """The request as one that asks for a stream."""
    return dataclasses.replace(request, emit=emit or [].append)


def words(number: int) -> str:
    """Texts of many lengths."""
    return " ".join(WORDS[4 + (number * number + at) % 12] for at in range(1 + 5 * number % 17))


def vector(number: int) -> EngineRequest:
    """Embeddings of one text or of several."""
    inputs = [f"{words(number + at)} {WORDS[4 + number % 12]}" for at in range(1 + number % 3)]
    return embeddings({"input": inputs, **({"dimensions": 8} if number % 5 == 4 else {})}, f"good-{number}")


def ranking(number: int) -> EngineRequest:
    """Documents of many lengths."""
    return rerank({"query": words(number), "documents": [words(number + at) for at in range(1, 6)]}, f"good-{number}")


def near(one: Any, two: Any) -> bool:
    """Equal, but for the rounding of sums that are added up in another order."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(near(one[key], two[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(near, one, two))
    return bool(abs(one - two) < 1e-5 if isinstance(one, float) else one == two)


BAD_TEXT = (
    refused({"prompt": [10**6]}, BadRequest, "prompt"),
    refused({"prompt": []}, BadRequest, "prompt"),
    refused({"prompt": [5] * (CONTEXT + 1)}, RequestTooLarge, "prompt"),
    refused({"prompt": "x", "max_tokens": CONTEXT + 1}, BadRequest, "max_tokens"),
    refused({"prompt": "x", "temperature": -1}, BadRequest, "temperature"),
    refused({"prompt": "x", "top_k": "many"}, BadRequest, "top_k"),
    refused({"prompt": "x", "stop_token_ids": [10**6]}, BadRequest, "stop_token_ids"),
    refused({"prompt": "x", "model": "other"}, Missing, "model"),
    refused("no object", BadRequest, None),
)
BAD_VECTOR = (
    refused({"input": [[10**6]]}, BadRequest, "input", embeddings),
    refused({"input": []}, BadRequest, "input", embeddings),
    refused({"input": ["fox", [5] * (BERT_CONTEXT + 1)]}, BadRequest, "input.1", embeddings),
    refused({"input": [[5], [5] * (BERT_CONTEXT + 1)]}, RequestTooLarge, "input.1", embeddings),
    refused({"input": "fox", "dimensions": 1000}, BadRequest, "dimensions", embeddings),
    refused({"input": "fox", "model": "other"}, Missing, "model", embeddings),
    refused("no object", BadRequest, None, embeddings),
    Bad(streamed(embeddings({"input": "fox"})), BadRequest, "options.stream"),
)
BAD_RANKING = (
    refused({"query": "fox", "documents": []}, BadRequest, "documents", rerank),
    refused({"query": "fox", "documents": ["dog", "dog " * BERT_CONTEXT]}, RequestTooLarge, "documents.1", rerank),
    refused({"query": "fox", "documents": ["dog"], "top_n": 0}, BadRequest, "top_n", rerank),
    refused({"query": "fox", "documents": ["dog"], "model": "other"}, Missing, "model", rerank),
    refused("no object", BadRequest, None, rerank),
    Bad(streamed(rerank({"query": "fox", "documents": ["dog"]})), BadRequest, "options.stream"),
)
CHAT = {"/v1/completions": Completion, "/v1/chat/completions": ChatCompletion}


def transformers(name: str, family: str, good: Callable[[int], EngineRequest], **config: Any) -> Subject:
    """The transformers engine in this process."""
    settings = {**SMALL, "max_model_len": CONTEXT, **config}
    return Subject(
        name,
        lambda model: create({"model": model(family), **settings}),
        good,
        BAD_TEXT,
        long_text,
        shapes=CHAT,
        streams=True,
    )


def in_process(subject: Subject, factory: str, config: Callable[[Callable[[str], str]], dict[str, Any]]) -> Subject:
    """An engine in a process of its own, asked what `subject` is asked."""
    return dataclasses.replace(
        subject,
        name=f"{subject.name}, engine process",
        build=lambda model: EngineProcess(factory, config(model), QUICK),
        process=True,
    )


def pooled(subject: Subject, factory: str, config: Callable[[Callable[[str], str]], dict[str, Any]]) -> Subject:
    """Two engines, each in a process of its own, asked what `subject` is asked."""

    def build(model: Callable[[str], str]) -> EnginePool:
        suspects = Suspects()
        names = ("first", "second")
        return EnginePool([EngineProcess(factory, config(model), QUICK, suspects, name) for name in names], suspects)

    return dataclasses.replace(subject, name=f"{subject.name}, two engine processes", build=build, process=True)


QUICK = HostSettings(start_seconds=120, restart_backoff=0.05, restart_backoff_limit=0.2)
ENGINE = "rejoinder.worker.engines.transformers.engine:create"
CONTINUOUS = transformers("continuous", "llama", text_or_chat)


def small(model: Callable[[str], str]) -> dict[str, Any]:
    """The config of `CONTINUOUS`."""
    return {"model": model("llama"), **SMALL, "max_model_len": CONTEXT}


def one_row(name: str, family: str, good: Callable[[int], EngineRequest], bad: Sequence[Bad], **shapes: Any) -> Subject:
    """An engine that makes a row of numbers of each input."""

    def build(model: Callable[[str], str]) -> Engine:
        return tasks.create({"model": model(family), "threads": 1, "max_running": 32})

    return Subject(name, build, good, bad, same=near, **shapes)


def called(number: int) -> EngineRequest:
    """A call of one of the functions of `conforming_app`."""
    path = ("/v1/completions", "/async", "/batch")[number % 3]
    return EngineRequest(path, {"n": number, "text": f"text {number}"}, f"good-{number}", 1, size=30)


def long_call(number: int) -> EngineRequest:
    """A call that waits, in a thread or on the event loop."""
    return EngineRequest(("/long", "/async-long")[number % 2], 0.5, f"long-{number}", 1)


def functions(_: Callable[[str], str]) -> dict[str, Any]:
    """The config of `FUNCTIONS`."""
    sizes = {"concurrency": 8, "max_batch_size": 8, "max_batch_bytes": 1 << 20, "max_wait_ms": 1.0}
    where = {"app": "conforming_app", "app_dir": str(Path(__file__).parent), "default_path": "/v1/completions"}
    return {**where, **sizes, "params": {"factor": 3}, "device": "cpu"}


def bad_call(path: str, body: Any, param: str | None, **more: Any) -> Bad:
    """A body that its function does not take."""
    return Bad(EngineRequest(path, body, "bad", 1, **more), BadRequest, param)


FUNCTIONS = Subject(
    "functions",
    lambda model: create_functions(functions(model)),
    called,
    (
        bad_call("/v1/completions", {"n": "many"}, "n"),
        bad_call("/v1/completions", "no object", None),
        bad_call("/batch", {}, "n"),
        bad_call("/async", {}, "options.stream", emit=print),
    ),
    long_call,
    shapes={},
)
SUBJECTS = [
    Subject(
        "echo",
        lambda _: EchoEngine("/v1/completions"),
        lambda n: EngineRequest("/echo", {"n": n, "s": "日 \ud800", "l": [None, 0.1]}, f"r{n}", 1),
        shapes={},
    ),
    CONTINUOUS,
    in_process(CONTINUOUS, ENGINE, small),
    pooled(CONTINUOUS, ENGINE, small),
    transformers("static", "llama", text_or_chat, batching="static"),
    transformers("static, encoder-decoder", "t5", text),
    transformers("static, state-space", "mamba", text_or_chat),
    one_row("embeddings", "bert", vector, BAD_VECTOR, shapes={"/v1/embeddings": CreateEmbeddingResponse}),
    one_row("rerank", "cross-encoder", ranking, BAD_RANKING, shapes={}),
    FUNCTIONS,
    in_process(FUNCTIONS, FUNCTIONS_FACTORY, lambda model: {**functions(model), "linger": True}),
    pooled(FUNCTIONS, FUNCTIONS_FACTORY, functions),
    Subject(
        "a fake of vLLM",
        lambda model: create_vllm({"model": model("llama"), "max_running": 8, "max_model_len": CONTEXT}),
        text_or_chat,
        BAD_TEXT,
        long_text,
        shapes=CHAT,
        streams=True,
        fixture="fake",
    ),
]
