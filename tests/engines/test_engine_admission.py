"""What is refused before a model sees it, and how it is said."""

from dataclasses import replace

import pytest

from rejoinder.worker.engines.admission import (
    MAX_CHARACTERS_PER_TOKEN,
    Limits,
    check_sampling,
    check_text,
    check_tokens,
    new_tokens,
    parse_body,
    served_name,
    top_k,
)
from rejoinder.worker.errors import BadRequest, Missing, RequestTooLarge

LIMITS = Limits(sequence=100, vocabulary=50, default_max_tokens=32)
CHAT = {"messages": [{"role": "user", "content": "x"}]}


def completion_body(**body):
    return parse_body("/v1/completions", {"prompt": "x", **body})


def chat_body(**body):
    return parse_body("/v1/chat/completions", {**CHAT, **body})


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": "x", "temperature": None}, "temperature"),
        ({"prompt": "x", "temperature": "0.5"}, "temperature"),
        ({"prompt": "x", "temperature": 99}, "temperature"),
        ({"prompt": "x", "top_p": 0}, "top_p"),
        ({"prompt": "x", "stream": True}, "stream"),
        ({"prompt": "x", "logit_bias": {"5": 1}}, "logit_bias"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "nonsense": 1}, "nonsense"),
        ([], None),
        (None, None),
        ("x", None),
    ],
)
def test_a_bad_body_is_refused_by_name(body, param):
    with pytest.raises(BadRequest) as caught:
        parse_body("/v1/completions", body)
    assert (caught.value.param or "").partition(".")[0] == (param or "")
    assert caught.value.message


def test_an_unknown_path():
    with pytest.raises(Missing, match="/v1/embeddings is not served"):
        parse_body("/v1/embeddings", {})


def test_model_names():
    assert served_name(None, ["a", "b"]) == "a"
    assert served_name("b", ["a", "b"]) == "b"
    with pytest.raises(Missing) as caught:
        served_name("c", ["a", "b"])
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
    assert "'a', 'b'" in caught.value.message


@pytest.mark.parametrize("tokens", [[50], [0, 1, 99], [-1], [2**31]])
def test_tokens_outside_the_vocabulary(tokens):
    with pytest.raises(BadRequest, match="0 to 49") as caught:
        check_tokens(tokens, LIMITS, "prompt")
    assert caught.value.param == "prompt"


def test_a_prompt_needs_tokens_and_room_for_one_more():
    with pytest.raises(BadRequest, match="at least one"):
        check_tokens([], LIMITS, "messages")
    check_tokens([0] * 99, LIMITS, "prompt")
    with pytest.raises(RequestTooLarge, match="100 tokens; at most 99") as caught:
        check_tokens([49] * 100, LIMITS, "prompt")
    assert (caught.value.param, caught.value.code) == ("prompt", "context_length_exceeded")


def test_a_text_that_cannot_fit_is_not_tokenized():
    check_text("x" * 100 * MAX_CHARACTERS_PER_TOKEN, LIMITS, "prompt")
    with pytest.raises(RequestTooLarge):
        check_text("x" * (100 * MAX_CHARACTERS_PER_TOKEN + 1), LIMITS, "prompt")


def test_how_many_new_tokens():
    assert new_tokens(completion_body(), 10, LIMITS) == 16
    assert new_tokens(completion_body(), 90, LIMITS) == 10
    assert new_tokens(chat_body(), 10, LIMITS) == 32
    assert new_tokens(chat_body(), 90, LIMITS) == 10
    assert new_tokens(chat_body(max_completion_tokens=5), 10, LIMITS) == 5
    assert new_tokens(completion_body(max_tokens=90), 10, LIMITS) == 90


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (completion_body(max_tokens=91), "max_tokens"),
        (chat_body(max_tokens=91), "max_tokens"),
        (chat_body(max_completion_tokens=91), "max_completion_tokens"),
    ],
)
def test_too_many_new_tokens(body, param):
    with pytest.raises(BadRequest, match="at most 90 fit") as caught:
        new_tokens(body, 10, LIMITS)
    assert caught.value.param == param


@pytest.mark.parametrize("stops", [[50], [0, 2**31 - 1, 1]])
def test_stop_tokens_outside_the_vocabulary(stops):
    check_sampling(completion_body(stop_token_ids=[0, 49]), LIMITS)
    with pytest.raises(BadRequest, match=f"id {max(stops)} is outside .* 0 to 49") as caught:
        check_sampling(chat_body(stop_token_ids=stops), LIMITS)
    assert caught.value.param == "stop_token_ids"


@pytest.mark.parametrize("name", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_penalties_where_the_engine_has_none(name):
    without = replace(LIMITS, dynamic=False)
    check_sampling(completion_body(**{name: 0.5}), LIMITS)
    check_sampling(completion_body(repetition_penalty=1, presence_penalty=0, frequency_penalty=None), without)
    with pytest.raises(BadRequest, match=f"{name} is not supported by this worker") as caught:
        check_sampling(completion_body(**{name: 0.5}), without)
    assert caught.value.param == name


@pytest.mark.parametrize(("asked", "used"), [(-1, 0), (0, 0), (1, 1), (49, 49), (50, 0), (10**9, 0)])
def test_top_k_past_the_vocabulary_is_off(asked, used):
    assert top_k(completion_body(top_k=asked), 50) == used
