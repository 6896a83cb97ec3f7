"""The response bodies of `/v1/completions` and `/v1/chat/completions`, as the `openai` package types them. No torch.

Nothing in them depends on the time or on chance: a redelivered request's body is equal to the byte.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rejoinder.worker.engines.protocol import EngineRequest


@dataclass(frozen=True, slots=True)
class Choice:
    """One generated sequence."""

    text: str
    """Without the stop string and what follows it, and without special tokens."""
    finish_reason: Literal["stop", "length"]
    tokens: int
    """Generated, the end-of-sequence token included."""


def completion(request: EngineRequest, model: str, prompt_tokens: int, choices: Sequence[Choice]) -> dict[str, Any]:
    """The body of a text completion. `choices` in the order of the prompts, `n` for each."""
    return {
        "id": f"cmpl-{request.response_id}",
        "object": "text_completion",
        "created": request.created,
        "model": model,
        "choices": [
            {"index": index, "text": choice.text, "logprobs": None, "finish_reason": choice.finish_reason}
            for index, choice in enumerate(choices)
        ],
        "usage": _usage(prompt_tokens, choices),
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
                "logprobs": None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(choices)
        ],
        "usage": _usage(prompt_tokens, choices),
    }


def _usage(prompt_tokens: int, choices: Sequence[Choice]) -> dict[str, int]:
    completion_tokens = sum(choice.tokens for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
