"""The bodies of /v1/embeddings and /v1/rerank: strict, and refused by name."""

from typing import Any

import pytest
from pydantic import BaseModel

from rejoinder.schemas.bodies import BODIES
from rejoinder.schemas.embeddings import MAX_INPUTS, EmbeddingRequest, RerankRequest
from rejoinder.schemas.problems import Problem, check


def refuse(model: type[BaseModel], value: Any) -> tuple[str, str]:
    with pytest.raises(Problem) as caught:
        check(model, value)
    assert caught.value.param is not None
    return str(caught.value), caught.value.param


@pytest.mark.parametrize(
    ("given", "inputs"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["a"] * MAX_INPUTS, ["a"] * MAX_INPUTS),
        ([5] * 5000, [[5] * 5000]),
    ],
)
def test_every_kind_of_input_is_a_list_of_inputs(given: Any, inputs: list[Any]) -> None:
    assert EmbeddingRequest.model_validate({"input": given}).inputs == inputs


@pytest.mark.parametrize(
    "given",
    ["", [], [""], ["a", 1], [1, "a"], [[]], [[1], "a"], [1.0], [True], [-1], [2**31], 7, None, {"a": 1}]
    + [["a"] * (MAX_INPUTS + 1), [[1]] * (MAX_INPUTS + 1)],
)
def test_an_input_of_another_kind_is_refused_with_the_kinds_there_are(given: Any) -> None:
    message, param = refuse(EmbeddingRequest, {"input": given})
    assert param.partition(".")[0] == "input"
    assert "list of token ids" in message
    assert str(MAX_INPUTS) in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("encoding_format", "int8"),
        ("encoding_format", None),
        ("dimensions", 0),
        ("dimensions", "8"),
        ("dimensions", 8.0),
        ("model", 7),
        ("user", 7),
        ("truncate", True),
    ],
)
def test_a_value_of_embeddings_that_cannot_be_honoured_is_refused_by_name(field: str, value: Any) -> None:
    message, param = refuse(EmbeddingRequest, {"input": "x", field: value})
    assert param == field
    assert field in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("query", ""),
        ("query", ["a"]),
        ("documents", "a"),
        ("documents", []),
        ("documents", [""]),
        ("documents", [{"text": ""}]),
        ("documents", [{"text": "a", "id": 1}]),
        ("documents", ["a"] * (MAX_INPUTS + 1)),
        ("top_n", 0),
        ("top_n", 1.5),
        ("return_documents", 1),
        ("max_chunks_per_doc", 1),
    ],
)
def test_a_value_of_rerank_that_cannot_be_honoured_is_refused_by_name(field: str, value: Any) -> None:
    message, param = refuse(RerankRequest, {"query": "q", "documents": ["a"], field: value})
    assert param.partition(".")[0] == field
    assert field in message


def test_documents_may_be_strings_and_objects() -> None:
    assert RerankRequest.model_validate({"query": "q", "documents": ["a", {"text": "b"}]}).texts == ["a", "b"]


def test_each_path_has_its_body() -> None:
    assert BODIES["/v1/embeddings"] is EmbeddingRequest
    assert BODIES["/v1/rerank"] is RerankRequest
    assert len(BODIES) == 4
