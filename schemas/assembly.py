"""From the chunks of a whole stream to the one body that the request would have got without one.

Chunks in OpenAI's shape (`chat.completion.chunk`, `text_completion`), all of one completion, become that completion:
its texts, tool calls and log-probabilities in one piece each, the last usage and the last finish reason. How many
tokens stood in each chunk makes no difference. Any other chunks become the list of them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rejoinder.schemas.envelope import Stream

WHOLE = {"chat.completion.chunk": "chat.completion", "text_completion": "text_completion"}
"""What chunks of an object are the parts of."""

# Of a delta, told once and not in pieces; some servers repeat them in each chunk.
_TOLD_ONCE = frozenset({"id", "index", "role", "type"})
# Random characters against those who measure packets. They say nothing.
_PADDING = "obfuscation"


def chunks_of(stream: Stream, body: Any) -> list[Any]:
    """The chunks that one message of a stream carries, with success.

    Raises:
        ValueError: the body is not the list that `stream.chunks` says.
    """
    if stream.chunks == 1:
        return [body]
    if not stream.chunks:
        return []
    if not isinstance(body, list) or len(body) != stream.chunks:
        raise ValueError(f"stream.chunks is {stream.chunks}, but the body is not a list of so many")
    return body


def assemble(chunks: Sequence[Any]) -> Any:
    """The body that all chunks of one attempt, in order, are together. A list that is not OpenAI's is returned itself.

    Args:
        chunks: JSON values.
    """
    kind = _kind(chunks)
    if kind is None:
        return chunks
    whole: dict[str, Any] = {}
    choices: dict[int, list[Mapping[str, Any]]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            choices.setdefault(choice["index"], []).append(choice)
        _tell(whole, chunk)
    whole.pop(_PADDING, None)
    assembled = _chat_choice if kind == "chat.completion.chunk" else _text_choice
    return whole | {"object": WHOLE[kind], "choices": [assembled(index, choices[index]) for index in sorted(choices)]}


def _kind(chunks: Sequence[Any]) -> str | None:
    """The object that all of `chunks` are, where all are OpenAI's and of one completion."""
    first = chunks[0] if chunks else None
    kind = first.get("object") if isinstance(first, dict) else None
    if not isinstance(kind, str) or kind not in WHOLE:
        return None
    name = first["id"] if isinstance(first, dict) and "id" in first else None
    return kind if all(_is_chunk(chunk, kind, name) for chunk in chunks) else None


def _is_chunk(chunk: Any, kind: str, name: Any) -> bool:
    return (
        isinstance(chunk, dict)
        and chunk.get("object") == kind
        and chunk.get("id") == name
        and isinstance(chunk.get("choices"), list)
        and all(_is_choice(choice, kind) for choice in chunk["choices"])
    )


def _is_choice(choice: Any, kind: str) -> bool:
    if not isinstance(choice, dict) or type(choice.get("index")) is not int:
        return False
    if not isinstance(choice.get("logprobs"), dict | None):
        return False
    return isinstance(choice.get("delta"), dict) if kind == "chat.completion.chunk" else _is_text(choice.get("text"))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _chat_choice(index: int, choices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    told = _merged(choice["delta"] for choice in choices)
    message = {"role": told.pop("role", None) or "assistant", "content": told.pop("content", None), "refusal": None}
    message |= told
    if message["content"] is None and not any(message[name] for name in message if name not in ("role", "content")):
        message["content"] = ""  # it said nothing at all, which is a text
    for call in message.get("tool_calls") or ():
        call.pop("index", None)  # of the pieces; a whole message has the calls in order
    return _choice({"index": index, "message": message}, choices, "delta")


def _text_choice(index: int, choices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return _choice({"index": index, "text": "".join(choice["text"] for choice in choices)}, choices, "text")


def _choice(whole: dict[str, Any], choices: Sequence[Mapping[str, Any]], content: str) -> dict[str, Any]:
    """What a choice has beside its content: log-probabilities in one piece, and of anything else what was said last."""
    whole["logprobs"] = _merged(choice["logprobs"] for choice in choices if choice.get("logprobs")) or None
    whole["finish_reason"] = None
    for choice in choices:
        _tell(whole, {key: value for key, value in choice.items() if key not in ("index", "logprobs", content)})
    return whole


def _tell(whole: dict[str, Any], part: Mapping[str, Any]) -> None:
    """Let `whole` have the values of `part`, but for null in place of one that it has."""
    for key, value in part.items():
        if value is not None or key not in whole:
            whole[key] = value


def _merged(deltas: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    pieces: dict[str, list[Any]] = {}
    for delta in deltas:
        for key, value in delta.items():
            pieces.setdefault(key, []).append(value)
    return {key: _joined(key, [value for value in values if value is not None]) for key, values in pieces.items()}


def _joined(key: str, pieces: list[Any]) -> Any:
    """The pieces of one value put together, in time that grows with their length and not with its square."""
    if not pieces:
        return None
    if key in _TOLD_ONCE:
        return pieces[0]
    if all(isinstance(piece, str) for piece in pieces):
        return "".join(pieces)
    if all(isinstance(piece, dict) for piece in pieces):
        return _merged(pieces)
    if all(isinstance(piece, list) for piece in pieces):
        entries = [entry for piece in pieces for entry in piece]
        return _by_index(entries) if key == "tool_calls" else entries
    return pieces[-1]


def _by_index(entries: list[Any]) -> list[Any]:
    """Tool calls, each of which comes in pieces that have its index."""
    if not all(isinstance(entry, dict) and type(entry.get("index")) is int for entry in entries):
        return entries
    calls: dict[int, list[dict[str, Any]]] = {}
    for entry in entries:
        calls.setdefault(entry["index"], []).append(entry)
    return [_merged(calls[index]) for index in sorted(calls)]
