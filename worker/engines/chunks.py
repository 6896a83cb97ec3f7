"""The chunks of a streamed answer, as the `openai` package types them. No torch.

The texts of a choice's chunks together are the text of the answer that is not streamed, to the character.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from rejoinder.worker.engines import answers
from rejoinder.worker.engines.answers import Choice
from rejoinder.worker.engines.protocol import EngineRequest

INTERVAL = 0.02
"""Seconds between two chunks of a request, but for a choice's first and last. A token that is decoded alone and is a
chunk and a message between processes of its own takes 12 us of a processor, one of eight in a chunk 3 us; a GPU makes
ten thousand a second."""

Take = Callable[[], str]
"""What can be told of a choice's text and was not yet."""


class Chunks:
    """Tells the choices of one request as they come. All methods are called on the event loop.

    Args:
        request: What is answered.
        emit: Takes each chunk.
        model: The name that the chunks carry.
        chat: Whether they are those of a chat completion.
    """

    def __init__(self, request: EngineRequest, emit: Callable[[Any], None], model: str, *, chat: bool) -> None:
        self._request = request
        self._emit = emit
        self._model = model
        self._chat = chat
        self._loop = asyncio.get_running_loop()
        self._told: dict[int, int] = {}  # characters of each choice that has begun
        self._fresh: dict[int, Take] = {}
        self._texts: dict[int, list[str]] = {}
        self._next = 0.0  # when there may be a chunk again
        self._timer: asyncio.TimerHandle | None = None
        self._error: Exception | None = None

    def more(self, index: int, take: Take) -> None:
        """A choice has more tokens. Its first text is told at once, later ones with what comes in `INTERVAL`.

        Raises:
            Exception: what emitting raised, now or when the timer did it: nothing is told after it.
        """
        self._check()
        if index not in self._told:
            self._tell({index: take})
            return
        self._fresh[index] = take
        if self._timer is None:
            if self._loop.time() >= self._next:
                self._flush()
            else:
                self._timer = self._loop.call_at(self._next, self._due)

    def text(self, index: int, text: str) -> None:
        """As `more`, of a text that is decoded already."""
        texts = self._texts.setdefault(index, [])
        texts.append(text)
        self.more(index, lambda: _drained(texts))

    def finish(self, index: int, choice: Choice) -> None:
        """A choice is complete: tell what is left of it and how it ended. Raises as `more` does."""
        self._check()
        self._fresh.pop(index, None)
        begun = index in self._told
        part = self._part(index, choice.text[self._told.get(index, 0) :], begun=begun, choice=choice)
        self._told[index] = len(choice.text)
        self._send([part])

    def last(self, prompt_tokens: int, choices: Sequence[Choice]) -> dict[str, Any]:
        """The last chunk, which has the usage; it is not emitted."""
        return {**self._chunk([]), "usage": answers.usage(prompt_tokens, choices)}

    def close(self) -> None:
        """Tell nothing more."""
        self._fresh.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _due(self) -> None:
        self._timer = None
        try:
            self._flush()
        except Exception as exc:  # noqa: BLE001  # raised to who tells more: a timer has nobody
            self._error = exc

    def _flush(self) -> None:
        fresh, self._fresh = self._fresh, {}
        self._tell(fresh)

    def _tell(self, fresh: dict[int, Take]) -> None:
        """One chunk of all of them that have something to tell."""
        self._next = self._loop.time() + INTERVAL
        parts = []
        for index, take in fresh.items():
            if text := take():
                parts.append(self._part(index, text, begun=index in self._told))
                self._told[index] = self._told.get(index, 0) + len(text)
        if parts:
            self._send(parts)

    def _part(self, index: int, text: str, *, begun: bool, choice: Choice | None = None) -> dict[str, Any]:
        places = None if choice is None else choice.places
        end = {"finish_reason": None if choice is None else choice.finish_reason}
        if not self._chat:
            logprobs = None if places is None else answers.completion_logprobs(places)
            return {"index": index, "text": text, "logprobs": logprobs, **end}
        logprobs = None if places is None else answers.chat_logprobs(places)
        delta = {} if begun else {"role": "assistant"}
        if text or not begun:
            delta["content"] = text
        return {"index": index, "delta": delta, "logprobs": logprobs, **end}

    def _send(self, parts: list[dict[str, Any]]) -> None:
        try:
            self._emit(self._chunk(parts))
        except Exception as exc:
            self._error = exc
            raise

    def _chunk(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        kind = ("chatcmpl", "chat.completion.chunk") if self._chat else ("cmpl", "text_completion")
        return {
            "id": f"{kind[0]}-{self._request.response_id}",
            "object": kind[1],
            "created": self._request.created,
            "model": self._model,
            "choices": parts,
        }


def _drained(texts: list[str]) -> str:
    told = "".join(texts)
    texts.clear()
    return told
