"""Chunks of a whole stream as one body: what the `openai` package makes of them, and what it types."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from rejoinder.schemas.assembly import assemble, chunks_of
from rejoinder.schemas.chunks import merged
from rejoinder.schemas.envelope import Stream

USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


def chunk(kind: str, choices: Sequence[Any], **more: Any) -> dict[str, Any]:
    return {"id": "c-1", "object": kind, "created": 7, "model": "m", "choices": list(choices), **more}


def chat(*choices: Any, **more: Any) -> dict[str, Any]:
    return chunk("chat.completion.chunk", choices, **more)


def text(*choices: Any, **more: Any) -> dict[str, Any]:
    return chunk("text_completion", choices, **more)


def said(index: int, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def written(index: int, text_: str, finish: str | None = None, logprobs: Any = None) -> dict[str, Any]:
    return {"index": index, "text": text_, "logprobs": logprobs, "finish_reason": finish}


def place(token: str) -> dict[str, Any]:
    return {"token": token, "logprob": -0.5, "bytes": list(token.encode()), "top_logprobs": []}


def test_a_chat_of_two_choices() -> None:
    chunks = [
        chat(said(1, {"role": "assistant", "content": ""})),
        chat(said(0, {"role": "assistant", "content": "On"}, logprobs={"content": [place("On")], "refusal": None})),
        chat(said(1, {"content": "Two"})),
        chat(said(0, {"content": "ce"}, logprobs={"content": [place("ce")], "refusal": None})),
        chat(said(0, {}, "stop"), said(1, {"content": " more"}, "length")),
        chat(usage=USAGE),
    ]
    assert assemble(chunks) == {
        "id": "c-1",
        "object": "chat.completion",
        "created": 7,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Once", "refusal": None},
                "logprobs": {"content": [place("On"), place("ce")], "refusal": None},
                "finish_reason": "stop",
            },
            {
                "index": 1,
                "message": {"role": "assistant", "content": "Two more", "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
            },
        ],
        "usage": USAGE,
    }


def test_a_text_of_two_choices() -> None:
    first = {"tokens": ["a"], "token_logprobs": [-1], "top_logprobs": [{"a": -1, "index": 0}], "text_offset": [0]}
    second = {"tokens": ["b"], "token_logprobs": [-2], "top_logprobs": [{"b": -2}], "text_offset": [1]}
    chunks = [text(written(0, "a", logprobs=first)), text(written(1, "x")), text(written(0, "b", logprobs=second))]
    chunks += [text(written(1, "", "length")), text(written(0, "", "stop")), text(usage=USAGE)]
    body = assemble(chunks)
    Completion.model_validate(body, strict=True)
    assert [(choice["text"], choice["finish_reason"]) for choice in body["choices"]] == [
        ("ab", "stop"),
        ("x", "length"),
    ]
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["a", "b"],
        "token_logprobs": [-1, -2],
        "top_logprobs": [{"a": -1, "index": 0}, {"b": -2}],
        "text_offset": [0, 1],
    }
    assert body["choices"][1]["logprobs"] is None
    assert body["usage"] == USAGE


def test_tool_calls_are_put_together_by_their_index() -> None:
    def call(index: int, arguments: str, **more: Any) -> dict[str, Any]:
        named = {"name": more.pop("name")} if "name" in more else {}
        return {"tool_calls": [{"index": index, "function": {**named, "arguments": arguments}, **more}]}

    chunks = [
        chat(said(0, {"role": "assistant", "content": None})),
        chat(said(0, call(1, "", id="b", type="function", name="g"))),
        chat(said(0, call(0, '{"x"', id="a", type="function", name="f"))),
        chat(said(0, call(1, "{}"))),
        chat(said(0, call(0, ": 1}"))),
        chat(said(0, {}, "tool_calls")),
    ]
    body = assemble(chunks)
    ChatCompletion.model_validate(body, strict=True)
    assert body["choices"][0]["message"] == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
            {"id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
        ],
    }


def test_other_fields_are_kept() -> None:
    chunks = [
        chat(said(0, {"reasoning_content": "be"}) | {"stop_reason": None}, system_fingerprint="f", obfuscation="xy"),
        chat(said(0, {"reasoning_content": "cause", "content": "A"}, "stop") | {"stop_reason": 2}, usage=None),
        chat(usage=USAGE, service_tier="flex"),
    ]
    body = assemble(chunks)
    assert (body["system_fingerprint"], body["service_tier"]) == ("f", "flex")
    assert "obfuscation" not in body
    (choice,) = body["choices"]
    assert choice["stop_reason"] == 2
    assert choice["message"] == {
        "role": "assistant",
        "content": "A",
        "refusal": None,
        "reasoning_content": "because",
    }


def test_nothing_said_is_an_empty_text_and_a_refusal_is_none() -> None:
    silent = assemble([chat(said(0, {"role": "assistant"})), chat(said(0, {}, "stop"))])
    assert silent["choices"][0]["message"] == {"role": "assistant", "content": "", "refusal": None}
    refused = assemble([chat(said(0, {"refusal": "I "})), chat(said(0, {"refusal": "won't"}, "stop"))])
    assert refused["choices"][0]["message"] == {"role": "assistant", "content": None, "refusal": "I won't"}


@pytest.mark.parametrize(
    "chunks",
    [
        [],
        ["a", {"b": 1}, None],
        [chat(said(0, {"content": "a"})), "b"],
        [chat(said(0, {"content": "a"})), text(written(0, "b"))],
        [chat(said(0, {"content": "a"})), chat(said(0, {"content": "b"})) | {"id": "c-2"}],
        [chat({"index": 0})],
        [chat({"index": True, "delta": {}})],
        [chat(said(0, {}, logprobs=[1]))],
        [text({"index": 0, "text": None})],
        [{"object": "text_completion", "choices": None}],
        [{"object": ["text_completion"], "choices": []}],
        [{"object": "chat.completion", "choices": []}],
    ],
)
def test_other_chunks_are_a_list(chunks: list[Any]) -> None:
    before = copy.deepcopy(chunks)
    assert assemble(chunks) is chunks
    assert chunks == before


def test_the_chunks_of_a_message() -> None:
    def stream(chunks: int) -> Stream:
        return Stream(index=0, done=False, attempt=1, chunks=chunks)

    assert chunks_of(stream(1), [1, 2]) == [[1, 2]]
    assert chunks_of(stream(2), [1, 2]) == [1, 2]
    assert chunks_of(stream(0), None) == []
    for body in ([1], "ab", None):
        with pytest.raises(ValueError, match=r"stream\.chunks is 2"):
            chunks_of(stream(2), body)


words = st.text(st.sampled_from("aé😀 \n"), max_size=3)
places = st.lists(words.map(place), max_size=2)
deltas = st.fixed_dictionaries({}, optional={"content": words, "refusal": st.none()})
finishes = st.sampled_from(["stop", "length"])


@st.composite
def chats(draw: st.DrawFn) -> list[dict[str, Any]]:
    """The chunks of a whole chat, its choices one through the other; the package wants them to begin in order."""
    chunks = []
    waiting = []
    for index in range(draw(st.integers(1, 3))):
        told = draw(st.booleans())
        chunks.append(chat(said(index, {"role": "assistant", "content": ""})))
        middle = [
            said(index, delta, logprobs={"content": draw(places), "refusal": None} if told else None)
            for delta in draw(st.lists(deltas, max_size=4))
        ]
        waiting.append([*middle, said(index, {}, draw(finishes))])
    while waiting:
        which = draw(st.integers(0, len(waiting) - 1))
        chunks.append(chat(waiting[which].pop(0)))
        waiting = [one for one in waiting if one]
    return [*chunks, chat(usage=USAGE)]


@settings(max_examples=200, deadline=None)
@given(chats(), st.data())
def test_any_grouping_gives_what_the_openai_package_gives(chunks: list[dict[str, Any]], data: st.DataObject) -> None:
    whole = assemble(chunks)
    state = ChatCompletionStreamState()
    for one in chunks:
        state.handle_chunk(ChatCompletionChunk.model_validate(one, strict=True))
    theirs = state.current_completion_snapshot.to_dict()
    ours = ChatCompletion.model_validate(whole, strict=True)
    assert ours.usage is not None
    assert ours.usage.to_dict() == theirs["usage"]
    for own, their in zip(ours.choices, theirs["choices"], strict=True):
        assert own.message.content == their["message"]["content"]
        assert own.finish_reason == their["finish_reason"]
        if own.logprobs is not None:
            assert own.logprobs.to_dict()["content"] == their["logprobs"]["content"]
    grouped: list[Any] = []
    rest = chunks
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        grouped += merged(rest[:size])
        rest = rest[size:]
    assert assemble(grouped) == whole
