"""The OpenAI bodies: strict, every range checked, every refusal by name."""

from typing import Any

import pytest
from pydantic import ValidationError

from rejoinder.schemas import bodies
from rejoinder.schemas.openai import BODIES, MAX_SEQUENCES, MAX_STOPS, ChatCompletionRequest, CompletionRequest
from rejoinder.schemas.problems import Problem, check, first_problem

HELLO = [{"role": "user", "content": "hello"}]


def refuse(model: type[CompletionRequest] | type[ChatCompletionRequest], body: Any) -> tuple[str, str | None]:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    return first_problem(caught.value, model, body)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 2.1),
        ("temperature", -0.1),
        ("temperature", "0.5"),
        ("temperature", True),
        ("temperature", 10**400),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -2),
        ("top_k", 1.5),
        ("n", 0),
        ("n", MAX_SEQUENCES + 1),
        ("n", True),
        ("max_tokens", 0),
        ("max_tokens", 1.0),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["a"] * (MAX_STOPS + 1)),
        ("stop", "x" * 257),
        ("stop", 7),
        ("seed", 2**63),
        ("seed", 1.5),
        ("stream", True),
        ("min_p", -0.01),
        ("min_p", 1.01),
        ("min_p", "0.1"),
        ("repetition_penalty", 0),
        ("repetition_penalty", 2.01),
        ("repetition_penalty", True),
        ("repetition_penalty", 10**400),
        ("presence_penalty", 2.1),
        ("presence_penalty", "1"),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", float("nan")),
        ("stop_token_ids", 5),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [2**31]),
        ("stop_token_ids", [1.0]),
        ("stop_token_ids", ["a"]),
        ("stop_token_ids", list(range(MAX_STOPS + 1))),
        ("logit_bias", {"5": 1}),
        ("logprobs", "yes"),
        ("logprobs", 21),
        ("logprobs", -1),
        ("model", 7),
        ("tools", []),
        ("nonsense", 1),
    ],
)
@pytest.mark.parametrize("model", BODIES.values(), ids=list(BODIES))
def test_a_value_that_cannot_be_honoured_is_refused_by_name(
    model: type[CompletionRequest] | type[ChatCompletionRequest], field: str, value: Any
) -> None:
    body = {("prompt" if model is CompletionRequest else "messages"): HELLO if model is not CompletionRequest else "x"}
    message, param = refuse(model, {**body, field: value})
    assert param is not None
    assert param.partition(".")[0] == field
    assert field in message


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        [],
        [""],
        ["a", 1],
        [1, "a"],
        [[]],
        [[1], "a"],
        [1.0],
        [-1],
        [2**31],
        7,
        None,
        {"a": 1},
        ["a"] * 129,
        [[1]] * 129,
    ],
)
def test_a_prompt_of_another_kind_is_refused_with_the_kinds_there_are(prompt: Any) -> None:
    message, param = refuse(CompletionRequest, {"prompt": prompt})
    assert param is not None
    assert param.partition(".")[0] == "prompt"
    assert "list of token ids" in message


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_every_kind_of_prompt_is_a_list_of_prompts(prompt: Any, prompts: list[Any]) -> None:
    assert CompletionRequest.model_validate({"prompt": prompt}).prompts == prompts


def test_prompts_times_n_is_bounded() -> None:
    message, _ = refuse(CompletionRequest, {"prompt": ["a"] * 65, "n": 2})
    assert "130" in message
    assert "128" in message


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hello", "messages"),
        ([{"role": "user"}], "messages.0.content"),
        ([{"content": "x"}], "messages.0.role"),
        ([{"role": "tool", "content": "x"}], "messages.0.role"),
        ([{"role": "user", "content": []}], "messages.0.content"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages.0.content.0.type",
        ),
        ([*HELLO, {"role": "user", "content": "x", "nope": 1}], "messages.1.nope"),
    ],
)
def test_a_message_s_fault_is_located(messages: Any, param: str) -> None:
    assert refuse(ChatCompletionRequest, {"messages": messages})[1] == param


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (["x"], "the body: it should be a JSON object"),
        ({"messages": ["x"]}, "messages.0: it should be a JSON object"),
        ({"messages": {"role": "user"}}, "messages: it should be a list"),
        ({"messages": [{"role": "user", "content": [1]}]}, "messages.0.content.0: it should be a JSON object"),
    ],
)
def test_what_it_should_be_is_said_in_words_of_json(body: Any, message: str) -> None:
    assert refuse(ChatCompletionRequest, body)[0] == message


def test_what_clients_send_unasked_is_taken() -> None:
    neutral = {
        "stream": False,
        "n": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "user": "u",
        "temperature": 1,
        "stop": None,
        "top_k": -1,
    }
    CompletionRequest.model_validate({"prompt": "a", "echo": False, "best_of": 1, "suffix": None, **neutral})
    chat = ChatCompletionRequest.model_validate(
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
            "logprobs": False,
            "top_logprobs": 0,
            "response_format": {"type": "text"},
            "max_completion_tokens": 5,
            **neutral,
        }
    )
    assert chat.messages[0].text == "ab"
    assert chat.max_new_tokens == 5
    message, _ = refuse(ChatCompletionRequest, {"messages": HELLO, "max_tokens": 1, "max_completion_tokens": 1})
    assert "max_completion_tokens" in message


@pytest.mark.parametrize("value", [-1, 21, 1.5, "3", True])
def test_alternatives_have_a_range(value: Any) -> None:
    message, param = refuse(ChatCompletionRequest, {"messages": HELLO, "logprobs": True, "top_logprobs": value})
    assert param == "top_logprobs"
    assert "0 to 20" in message


def test_log_probabilities_are_asked_for_in_two_ways() -> None:
    for body, alternatives in (({}, None), ({"logprobs": 0}, 0), ({"logprobs": 20}, 20), ({"logprobs": None}, None)):
        assert CompletionRequest.model_validate({"prompt": "x", **body}).alternatives == alternatives
    for body, alternatives in (
        ({}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 20}, 20),
        ({"logprobs": False, "top_logprobs": 0}, None),
    ):
        assert ChatCompletionRequest.model_validate({"messages": HELLO, **body}).alternatives == alternatives


@pytest.mark.parametrize(
    "body",
    [
        {"min_p": 0, "repetition_penalty": 2, "presence_penalty": -2, "frequency_penalty": 2, "stop_token_ids": []},
        {"min_p": 1, "repetition_penalty": 1e-300, "presence_penalty": 2, "frequency_penalty": -2.0},
        {"presence_penalty": None, "frequency_penalty": None, "stop_token_ids": None},
        {"stop_token_ids": list(range(MAX_STOPS))},
    ],
)
def test_the_ranges_ends_are_taken(body: Any) -> None:
    CompletionRequest.model_validate({"prompt": "x", **body})
    ChatCompletionRequest.model_validate({"messages": HELLO, **body})


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [1.5] * 1_000_000},
        {"prompt": [[1.5] * 1_000_000]},
        {"prompt": "x", "stop_token_ids": ["a"] * 1_000_000},
        {"prompt": "x", **{f"k{n}": n for n in range(1_000_000)}},
    ],
    ids=["items", "nested", "stops", "fields"],
)
def test_a_million_faults_are_one_error(body: Any) -> None:
    with pytest.raises(Problem) as caught:
        check(CompletionRequest, body)
    cause = caught.value.__cause__
    assert not isinstance(cause, ValidationError) or cause.error_count() < 10


MANY = {f"k{n}": n for n in range(1000)}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {"messages": [{**HELLO[0], **MANY}]}, "messages.0.k0"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", **MANY}]}]},
            "messages.0.content.0.k0",
        ),
        (
            "/v1/chat/completions",
            {
                "messages": HELLO,
                "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}, **MANY}},
            },
            "response_format.json_schema.k0",
        ),
        ("/v1/rerank", {"query": "q", "documents": [{"text": "a", **MANY}]}, "documents.0.k0"),
        ("/v1/embeddings", {"input": "a", **MANY}, "k0"),
    ],
)
def test_many_unknown_fields_of_any_object_are_one_error(path: str, body: Any, param: str) -> None:
    with pytest.raises(Problem) as caught:
        check(bodies.BODIES[path], body)
    assert isinstance(caught.value.__cause__, ValidationError)
    assert caught.value.__cause__.error_count() < 10
    assert caught.value.param == param
