"""The response bodies of `/v1/completions` and `/v1/chat/completions`, as the `openai` package types them. No torch.

Nothing in them depends on the time or on chance: a redelivered request's body is equal to the byte, but for the last
digits of log-probabilities, which a float's rounding in another batch may change.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rejoinder.worker.engines.protocol import EngineRequest

LEAST = -9999.0
"""Stands for a log-probability of minus infinity, which is no JSON: OpenAI's own way."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token that was drawn, or that could have been."""

    token: str
    """Its text; a special token's name; of half a character, its bytes as `bytes:\\xe6\\x97`."""
    logprob: float
    bytes: bytes | None
    """None for a special token, which is not in the text."""


@dataclass(frozen=True, slots=True)
class Place:
    """One place in a text: the token there, and the likeliest ones."""

    drawn: Candidate
    offset: int
    """Where it begins, in characters of the text."""
    top: Sequence[Candidate]
    """Likeliest first."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One generated sequence."""

    text: str
    """Without the stop string and what follows it, and without special tokens."""
    finish_reason: Literal["stop", "length"]
    tokens: int
    """Generated, the end-of-sequence token included."""
    places: Sequence[Place] | None = None
    """Of each token of the text, where the request asks for log-probabilities."""


def completion(request: EngineRequest, model: str, prompt_tokens: int, choices: Sequence[Choice]) -> dict[str, Any]:
    """The body of a text completion. `choices` in the order of the prompts, `n` for each."""
    return {
        "id": f"cmpl-{request.response_id}",
        "object": "text_completion",
        "created": request.created,
        "model": model,
        "choices": [
            {
                "index": index,
                "text": choice.text,
                "logprobs": None if choice.places is None else completion_logprobs(choice.places),
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(choices)
        ],
        "usage": usage(prompt_tokens, choices),
    }


def chat_completion(
    request: EngineRequest, model: str, prompt_tokens: int, choices: Sequence[Choice]
) -> dict[str, Any]:
    """The body of a chat completion."""
    return {
        "id": f"chatcmpl-{request.response_id}",
        "object": "chat.completion",
        "created": request.created,
        "model": model,
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": None if choice.places is None else chat_logprobs(choice.places),
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(choices)
        ],
        "usage": usage(prompt_tokens, choices),
    }


def completion_logprobs(places: Sequence[Place]) -> dict[str, Any]:
    """Of a choice of a text completion."""
    return {
        "tokens": [place.drawn.token for place in places],
        "token_logprobs": [_told(place.drawn.logprob) for place in places],
        "top_logprobs": [_by_token([*place.top, place.drawn]) for place in places],
        "text_offset": [place.offset for place in places],
    }


def _by_token(candidates: Sequence[Candidate]) -> dict[str, float]:
    """The first of two tokens that read the same."""
    told: dict[str, float] = {}
    for candidate in candidates:
        told.setdefault(candidate.token, _told(candidate.logprob))
    return told


def chat_logprobs(places: Sequence[Place]) -> dict[str, Any]:
    """Of a choice of a chat completion."""
    content = [{**_candidate(place.drawn), "top_logprobs": list(map(_candidate, place.top))} for place in places]
    return {"content": content, "refusal": None}


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {
        "token": candidate.token,
        "logprob": _told(candidate.logprob),
        "bytes": None if candidate.bytes is None else list(candidate.bytes),
    }


def _told(logprob: float) -> float:
    """Six decimals: what a float32 of this size knows, and what rounding in another batch seldom changes."""
    return round(logprob, 6) if logprob > LEAST else LEAST


def usage(prompt_tokens: int, choices: Sequence[Choice]) -> dict[str, int]:
    """The tokens of a request: of its prompts, and of all its choices."""
    completion_tokens = sum(choice.tokens for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
