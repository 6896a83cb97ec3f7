"""Chunks of a stream in OpenAI's shape: several as one that says the same, and everything else as it is."""

import copy
import json
from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk

from rejoinder.schemas.chunks import Merged, json_size, merged


def chat(delta: dict[str, Any], index: int = 0, **fields: Any) -> dict[str, Any]:
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **fields}
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 7, "model": "m", "choices": [choice]}


def text(value: str, index: int = 0, **fields: Any) -> dict[str, Any]:
    choice = {"index": index, "text": value, "logprobs": None, "finish_reason": None, **fields}
    return {"id": "cmpl-1", "object": "text_completion", "created": 7, "model": "m", "choices": [choice]}


TEXTS = st.text(alphabet=st.sampled_from(["a", "é", "😀", '"', "\\", "\n", "\uffff", " "]), max_size=4)
REASON = st.sampled_from([None, None, None, "stop"])


@st.composite
def chat_choice(draw: st.DrawFn) -> dict[str, Any]:
    delta = draw(
        st.fixed_dictionaries(
            {}, optional={"role": st.sampled_from(["assistant", None]), "content": TEXTS | st.none(), "refusal": TEXTS}
        )
    )
    places = st.lists(st.fixed_dictionaries({"token": TEXTS, "logprob": st.floats(-9, 0)}), max_size=2)
    logprobs = draw(st.none() | st.fixed_dictionaries({"content": places | st.none(), "refusal": st.none()}))
    return {"delta": delta, "logprobs": logprobs, "finish_reason": draw(REASON)}


@st.composite
def text_choice(draw: st.DrawFn) -> dict[str, Any]:
    lists = st.lists(TEXTS, max_size=2)
    logprobs = draw(st.none() | st.fixed_dictionaries({"tokens": lists, "text_offset": st.lists(st.integers(0, 9))}))
    return {"text": draw(TEXTS), "logprobs": logprobs, "finish_reason": draw(REASON)}


def chunks_of(choice: st.SearchStrategy[dict[str, Any]], make: Any) -> st.SearchStrategy[list[Any]]:
    @st.composite
    def one(draw: st.DrawFn) -> dict[str, Any]:
        indices = draw(st.lists(st.integers(0, 2), min_size=1, max_size=3))
        whole = make
        made = {**whole, "choices": [{"index": index, **draw(choice)} for index in indices]}
        return made | draw(st.sampled_from([{}, {}, {"model": "other"}]))

    foreign = st.sampled_from([{"object": make["object"], "choices": []}, {**make, "choices": [], "usage": {}}, "x", 1])
    return st.lists(one() | one() | one() | foreign, max_size=12)


STREAMS = chunks_of(chat_choice(), chat({})) | chunks_of(text_choice(), text(""))


def told(chunks: list[Any]) -> Any:
    """What a stream says, choice by choice: a reader's view, which knows nothing of how it was cut."""
    said: dict[Any, list[Any]] = defaultdict(list)
    for chunk in chunks:
        if not isinstance(chunk, dict) or not chunk["choices"]:
            said["others"].append(chunk)
            continue
        head = json.dumps({name: value for name, value in chunk.items() if name != "choices"})
        for choice in chunk["choices"]:
            spoken = said[head, choice["index"]]
            for name, value in (choice.get("delta") or {"text": choice.get("text")}).items():
                if name == "role":
                    continue
                spoken += [(name, character) for character in value or ""]
            for name, values in (choice["logprobs"] or {}).items():
                spoken += [(f"logprobs.{name}", json.dumps(value)) for value in values or []]
            if choice["finish_reason"]:
                spoken.append(("finish", choice["finish_reason"]))
    # Of one choice, up to its end, each kind is told in order; kinds stand side by side.
    return {key: spoken if key == "others" else by_kind(spoken) for key, spoken in said.items()}


def by_kind(spoken: list[Any]) -> list[Any]:
    parts: list[dict[str, list[Any]]] = [defaultdict(list)]
    for name, value in spoken:
        if name == "finish":
            parts.append(defaultdict(list))
        parts[-1][name].append(value)
    return [dict(part) for part in parts]


@given(STREAMS)
def test_merged_says_exactly_the_same(chunks: list[Any]) -> None:
    before = copy.deepcopy(chunks)
    found = merged(chunks)
    assert told(found) == told(before)
    assert chunks == before, "what the engine gave is not touched"
    assert len(found) <= len(chunks)
    assert merged(found) == found


@given(STREAMS)
def test_growth_is_never_less_than_the_bytes_that_are_added(chunks: list[Any]) -> None:
    for first, chunk in enumerate(chunks):
        if (one := Merged.of(chunk)) is None:
            continue
        size = json_size(one.value())
        assert one.value() == chunk
        for other in chunks[first + 1 :]:
            grown = one.add(other)
            size += grown
            assert json_size(one.value()) <= size
            if not grown:
                break


def test_tokens_become_one_chunk_as_openai_types_it() -> None:
    chunks = [chat({"role": "assistant", "content": ""}), *(chat({"content": part}) for part in "Hello there")]
    (one,) = merged(chunks)
    assert one == chat({"role": "assistant", "content": "Hello there"})
    assert ChatCompletionChunk.model_validate(one).choices[0].delta.content == "Hello there"
    logprobs = [{"tokens": [c], "token_logprobs": [-1.0], "top_logprobs": None, "text_offset": [0]} for c in "ab"]
    (whole,) = merged([text("a", logprobs=logprobs[0]), text("b", logprobs=logprobs[1], finish_reason="stop")])
    assert Completion.model_validate(whole).choices[0].text == "ab"
    assert whole["choices"][0]["logprobs"]["tokens"] == ["a", "b"]
    assert whole["choices"][0]["finish_reason"] == "stop"


def test_choices_side_by_side() -> None:
    found = merged([chat({"content": "a"}), chat({"content": "x"}, 1), chat({"content": "b"}), chat({}, 1)])
    assert [(one["index"], one["delta"]) for one in found[0]["choices"]] == [
        (0, {"content": "ab"}),
        (1, {"content": "x"}),
    ]
    assert len(found) == 1


def test_nothing_goes_across_an_end() -> None:
    chunks = [chat({"content": "a"}, finish_reason="stop"), chat({"content": "b"})]
    assert merged(chunks) == chunks


@pytest.mark.parametrize(
    "other",
    [
        chat({"content": "b", "tool_calls": []}),
        chat({"content": ["b"]}),
        chat({"content": "b"}, seen=1),
        chat({"content": "b"}) | {"usage": {"total_tokens": 1}},
        chat({"content": "b"}) | {"model": "n"},
        chat({"content": "b"}) | {"choices": [{"index": "0", "delta": {"content": "b"}}]},
        chat({"content": "b"}, logprobs=[]),
        chat({"content": "b"}, finish_reason=1),
        chat({"role": "user", "content": "b"}),
        text("b"),
        {"object": "chat.completion.chunk"},
        {"object": ["chat.completion.chunk"], "choices": []},
        "b",
        None,
    ],
)
def test_what_is_not_known_stands_as_it_is(other: Any) -> None:
    chunks = [chat({"role": "assistant", "content": "a"}), other, chat({"content": "c"})]
    found = merged(chunks)
    assert found[0] == chunks[0]
    assert found == [chunks[0], *merged(chunks[1:])]


def test_what_is_no_json_is_not_merged() -> None:
    one = Merged.of(chat({"content": "a"}))
    assert one is not None
    with pytest.raises(ValueError, match="JSON"):
        one.add(chat({"content": "b"}, logprobs={"content": [float("nan")]}))
    assert one.value() == chat({"content": "a"})


def test_room_bounds_what_is_merged() -> None:
    one = Merged.of(text("a"))
    assert one is not None
    assert not one.add(text("b" * 100), room=100)
    assert one.add(text("b" * 100), room=200)
    assert one.value() == text("a" + "b" * 100)
