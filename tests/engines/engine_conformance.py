"""The engines that the conformance suite runs against, and what it may ask of each.

A new engine is one more `Subject` in `SUBJECTS`: how to build one, what it answers and what it refuses.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine_harness import CONTEXT, KINDS, SMALL, chat, completion
from openai.types import Completion
from openai.types.chat import ChatCompletion

from rejoinder.worker.engines.echo import EchoEngine
from rejoinder.worker.engines.host import EngineProcess, HostSettings
from rejoinder.worker.engines.protocol import Engine, EngineRequest
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
    shapes: Mapping[str, Any] = field(default_factory=lambda: {"/v1/completions": Completion})
    """For each path the type of its response, where it is OpenAI's."""


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


def refused(body: Any, error: type[RequestError], param: str | None) -> Bad:
    """A bad completion."""
    return Bad(completion(body, f"bad-{param}"), error, param)


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
CHAT = {"/v1/completions": Completion, "/v1/chat/completions": ChatCompletion}


def transformers(name: str, family: str, good: Callable[[int], EngineRequest], **config: Any) -> Subject:
    """The transformers engine in this process."""
    settings = {**SMALL, "max_model_len": CONTEXT, **config}
    return Subject(
        name, lambda model: create({"model": model(family), **settings}), good, BAD_TEXT, long_text, shapes=CHAT
    )


def in_process(subject: Subject, factory: str, config: Callable[[Callable[[str], str]], dict[str, Any]]) -> Subject:
    """An engine in a process of its own, asked what `subject` is asked."""
    quick = HostSettings(start_seconds=120, restart_backoff=0.05, restart_backoff_limit=0.2)
    return Subject(
        f"{subject.name}, engine process",
        lambda model: EngineProcess(factory, config(model), quick),
        subject.good,
        subject.bad,
        subject.long,
        process=True,
        shapes=subject.shapes,
    )


CONTINUOUS = transformers("continuous", "llama", text_or_chat)

SUBJECTS = [
    Subject(
        "echo",
        lambda _: EchoEngine("/v1/completions"),
        lambda n: EngineRequest("/echo", {"n": n, "s": "日 \ud800", "l": [None, 0.1]}, f"r{n}", 1),
        shapes={},
    ),
    CONTINUOUS,
    in_process(
        CONTINUOUS,
        "rejoinder.worker.engines.transformers.engine:create",
        lambda model: {"model": model("llama"), **SMALL, "max_model_len": CONTEXT},
    ),
    transformers("static", "llama", text_or_chat, batching="static"),
    transformers("static, encoder-decoder", "t5", text),
    transformers("static, state-space", "mamba", text_or_chat),
]
