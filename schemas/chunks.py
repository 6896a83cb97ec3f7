"""Chunks of a streamed answer in OpenAI's shape: several of them as one that says the same.

Source: `ChatCompletionChunk` and `Completion` as the `openai` package types them. What has anything else in it, such as
tool calls or usage, is left as it is: it stands between those before and those after it.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from rejoinder.schemas.wire import write_json

CHAT_CHUNK = "chat.completion.chunk"
TEXT_CHUNK = "text_completion"

# Of a chat's delta, what goes on from chunk to chunk. `reasoning` and `reasoning_content` are vLLM's and others' own.
_TEXTS = frozenset({"content", "refusal", "reasoning", "reasoning_content"})
_CHAT_FIELDS = frozenset({"index", "delta", "logprobs", "finish_reason"})
_TEXT_FIELDS = frozenset({"index", "text", "logprobs", "finish_reason"})
# What a merged chunk has beside what was merged: commas, and the name of a field that the first one did not have.
_AROUND = 24


def json_size(value: Any) -> int:
    """Bytes of a value as JSON. Raises as `write_json`."""
    text = write_json(value)
    return len(text) if text.isascii() else len(text.encode())


def text_size(text: str) -> int:
    """The same for a string."""
    plain = text.isascii() and text.isprintable() and '"' not in text and "\\" not in text
    return len(text) + 2 if plain else json_size(text)


def merged(chunks: Iterable[Any]) -> list[Any]:
    """The same stream in as few chunks as say the same: those of OpenAI's shape are merged, all others stand.

    Of each choice, texts and log-probabilities are those of its chunks one after the other, and nothing is merged with
    what comes after its finish_reason.

    Args:
        chunks: JSON values.
    """
    found: list[Any] = []
    last: Merged | None = None
    for chunk in chunks:
        if last is not None and last.add(chunk):
            continue
        last = Merged.of(chunk)
        found.append(chunk if last is None else last)
    return [one.value() if isinstance(one, Merged) else one for one in found]


class Merged:
    """Chunks as one. Keeps nothing that their maker may change but the items of log-probabilities."""

    def __init__(self, chunk: Mapping[str, Any]) -> None:
        """Begin with a chunk; `of` finds out whether that can be done."""
        self._head = dict(chunk)
        self._chat = chunk["object"] == CHAT_CHUNK
        self._choices: dict[int, _Choice] = {one["index"]: _Choice(one, chat=self._chat) for one in chunk["choices"]}

    @classmethod
    def of(cls, chunk: Any) -> "Merged | None":
        """A chunk with which others may be merged; None: with this one nothing is."""
        return cls(chunk) if _can_be_merged(chunk) else None

    def add(self, chunk: Any, room: float = math.inf) -> int:
        """Merge one more, if it can be; return by how many bytes of JSON that makes it longer at most, 0 if it was not.

        Args:
            chunk: A JSON value.
            room: One that would make it longer by more is not merged.

        Raises:
            ValueError, TypeError: what would be merged is not JSON.
        """
        if (usual := self._usual(chunk)) is not None:
            parts, text = usual
            growth = text_size(text) + _AROUND
            if growth > room:
                return 0
            parts.append(text)
            return growth
        if not self._goes_on(chunk):
            return 0
        choices = chunk["choices"]
        known = self._choices
        growth = len(choices) + sum(
            _length(one, chat=self._chat) if one["index"] in known else json_size(one) for one in choices
        )
        if growth > room:
            return 0
        for choice in choices:
            own = known.get(choice["index"])
            if own is None:
                known[choice["index"]] = _Choice(choice, chat=self._chat)
            else:
                own.add(choice)
        return growth

    def _usual(self, chunk: Any) -> tuple[list[str], str] | None:
        """Of a chunk that has only one choice's next piece of text in it, as nearly all have, where that goes."""
        if type(chunk) is not dict or len(chunk) != len(self._head):
            return None
        for name, value in self._head.items():
            other = chunk.get(name, self)
            if other is not value and other != value and name != "choices":
                return None
        choices = chunk.get("choices")
        if type(choices) is not list or len(choices) != 1 or type(choice := choices[0]) is not dict:
            return None
        index = choice.get("index")
        return self._choices[index].usual(choice) if type(index) is int and index in self._choices else None

    def _goes_on(self, chunk: Any) -> bool:
        if not _can_be_merged(chunk) or chunk.keys() != self._head.keys():
            return False
        if any(value != self._head[name] for name, value in chunk.items() if name != "choices"):
            return False
        choices = ((self._choices.get(one["index"]), one) for one in chunk["choices"])
        return all(own is None or own.goes_on(one) for own, one in choices)

    def value(self) -> dict[str, Any]:
        """The one chunk."""
        return {**self._head, "choices": [choice.value() for choice in self._choices.values()]}


class _Choice:
    """One choice of all chunks."""

    def __init__(self, choice: Mapping[str, Any], *, chat: bool) -> None:
        self._chat = chat
        self._fields = dict(choice)
        self._delta: dict[str, Any] = dict(choice["delta"]) if chat else {"text": choice["text"]}
        # In parts: joined each time, a long text would be copied once for each of its words.
        self._texts = {name: [text] for name, text in self._delta.items() if name != "role" and text is not None}
        self._logprobs = _copied(choice.get("logprobs"))

    def usual(self, choice: Mapping[str, Any]) -> tuple[list[str], str] | None:
        """See `Merged._usual`."""
        fields = self._fields
        if fields.get("finish_reason") is not None or choice.keys() != fields.keys():
            return None
        if choice.get("finish_reason") is not None or choice.get("logprobs") is not None:
            return None
        if self._chat:
            delta, name = choice["delta"], "content"
            text = delta.get(name) if type(delta) is dict and len(delta) == 1 else None
        else:
            name, text = "text", choice["text"]
        return (self._texts[name], text) if type(text) is str and name in self._texts else None

    def goes_on(self, choice: Mapping[str, Any]) -> bool:
        """Whether another chunk's choice may be added."""
        if self._fields.get("finish_reason") is not None:
            return False
        if not self._chat:
            return True
        role, own = choice["delta"].get("role"), self._delta.get("role")
        return role is None or own is None or role == own

    def add(self, choice: Mapping[str, Any]) -> None:
        for name, value in choice.items():
            if name == "logprobs":
                self._add_logprobs(value)
            elif name == "delta":
                for part, text in value.items():
                    self._add_text(part, text)
            elif name == "text":
                self._texts[name].append(value)
            elif value is not None:  # finish_reason; the index is the same
                self._fields[name] = value
            else:
                self._fields.setdefault(name, value)

    def _add_text(self, name: str, text: str | None) -> None:
        self._delta.setdefault(name, text)
        if text is None:
            return
        if name == "role":
            self._delta[name] = text
        elif name in self._texts:
            self._texts[name].append(text)
        else:
            self._texts[name] = [text]

    def _add_logprobs(self, logprobs: Mapping[str, Any] | None) -> None:
        self._fields.setdefault("logprobs", None)
        if logprobs is None:
            return
        if self._logprobs is None:
            self._logprobs = _copied(logprobs)
            return
        for name, values in logprobs.items():
            own = self._logprobs.setdefault(name, None)
            if own is None:
                self._logprobs[name] = None if values is None else list(values)
            elif values is not None:
                own += values

    def value(self) -> dict[str, Any]:
        texts = {name: "".join(parts) for name, parts in self._texts.items()}
        fields = dict(self._fields)
        if self._chat:
            fields["delta"] = {**self._delta, **texts}
        else:
            fields["text"] = texts["text"]
        if "logprobs" in fields:
            fields["logprobs"] = _copied(self._logprobs)
        return fields


def _copied(logprobs: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if logprobs is None:
        return None
    return {name: None if values is None else list(values) for name, values in logprobs.items()}


def _length(choice: Mapping[str, Any], *, chat: bool) -> int:
    """Bytes that a choice adds to the one of the same index."""
    values = (*(choice["delta"].values() if chat else (choice["text"],)), choice.get("finish_reason"))
    logprobs = choice.get("logprobs")
    texts = sum(text_size(one) for one in values if one is not None)
    return texts + _AROUND + (0 if logprobs is None else json_size(logprobs))


def _can_be_merged(chunk: Any) -> bool:
    """Whether there is nothing in a chunk but what is known how to merge."""
    if not isinstance(chunk, dict) or chunk.get("usage") is not None:
        return False
    choices, kind = chunk.get("choices"), chunk.get("object")
    if not isinstance(choices, list) or not choices:
        return False
    known = all(map(_is_chat if kind == CHAT_CHUNK else _is_text, choices)) and kind in (CHAT_CHUNK, TEXT_CHUNK)
    return known and (len(choices) == 1 or len({one["index"] for one in choices}) == len(choices))


def _is_chat(choice: Any) -> bool:
    if not _is_choice(choice, _CHAT_FIELDS):
        return False
    delta = choice.get("delta")
    return isinstance(delta, dict) and all(
        (name in _TEXTS or name == "role") and (value is None or isinstance(value, str))
        for name, value in delta.items()
    )


def _is_text(choice: Any) -> bool:
    return _is_choice(choice, _TEXT_FIELDS) and isinstance(choice.get("text"), str)


def _is_choice(choice: Any, fields: frozenset[str]) -> bool:
    if not isinstance(choice, dict) or not choice.keys() <= fields or type(choice.get("index")) is not int:
        return False
    reason, logprobs = choice.get("finish_reason"), choice.get("logprobs")
    if reason is not None and not isinstance(reason, str):
        return False
    return logprobs is None or (
        isinstance(logprobs, dict) and all(values is None or isinstance(values, list) for values in logprobs.values())
    )
