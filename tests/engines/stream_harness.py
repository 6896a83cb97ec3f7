"""What the tests of streams share: chunks put together again, and held to the types of the `openai` package."""

import asyncio
from typing import Any, Literal

from engine_conformance import streamed
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk
from openai.types.completion_choice import CompletionChoice


class TextChoice(CompletionChoice):
    """As OpenAI's API streams it: the reason is null until the end, though the package's type does not say so."""

    finish_reason: Literal["stop", "length", "content_filter"] | None


class TextChunk(Completion):
    """A chunk of a text completion."""

    choices: list[TextChoice]


async def stream(engine, request) -> tuple[list[Any], Any]:
    """The chunks, and what `generate` returned."""
    chunks: list[Any] = []
    last = await engine.generate(streamed(request, chunks.append))
    return chunks, last


async def streams(engine, requests):
    return await asyncio.gather(*[stream(engine, request) for request in requests])


def joined(chunks, last):
    """The answer that is not streamed, out of the chunks of one that is."""
    chat = last["object"] == "chat.completion.chunk"
    head = {name: last[name] for name in ("id", "object", "created", "model")}
    assert last["choices"] == []
    choices: dict[int, Any] = {}
    for chunk in chunks:
        (ChatCompletionChunk if chat else TextChunk).model_validate(chunk, strict=True)
        assert {name: chunk[name] for name in head} == head
        assert "usage" not in chunk
        assert chunk["choices"]
        for part in chunk["choices"]:
            put_together(choices, part, chat)
    (ChatCompletionChunk if chat else TextChunk).model_validate(last, strict=True)
    assert all(choice["finish_reason"] for choice in choices.values())
    if chat:
        head["object"] = "chat.completion"
    return {**head, "choices": [choices[index] for index in sorted(choices)], "usage": last["usage"]}


def put_together(choices, part, chat):
    index = part["index"]
    begun = index in choices
    if not begun:
        empty = {"message": {"role": "assistant", "content": "", "refusal": None}} if chat else {"text": ""}
        choices[index] = {"index": index, **empty}
    whole = choices[index]
    assert "finish_reason" not in whole, "nothing follows the end of a choice"
    if chat:
        assert part["delta"].get("role") == (None if begun else "assistant")
        whole["message"]["content"] += part["delta"].get("content", "")
    else:
        whole["text"] += part["text"]
    if part["finish_reason"] is None:
        assert part["logprobs"] is None
        assert part["delta"]["content"] if chat else part["text"], "a chunk that tells nothing"
    else:
        whole |= {"logprobs": part["logprobs"], "finish_reason": part["finish_reason"]}
