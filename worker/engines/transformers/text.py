"""Text to tokens and back: chat templates, stop strings. Tokenizers release the GIL: threads do it beside the loop."""

from collections.abc import Collection, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rejoinder.schemas.openai import ChatMessage
from rejoinder.worker.errors import BadRequest

_REPLACEMENT = "\ufffd"
_HALF_TOKENS = 4
"""A character has at most four bytes, each of them a token at worst: no half of one is longer than this."""
_PENDING_TOKENS = 4 * _HALF_TOKENS
"""So many tokens without a whole character at their end are no text: they are not decoded again with each one after."""


class Text:
    """A model's tokenizer, as the engine needs it. Safe to call from several threads.

    Args:
        tokenizer: The model's.
        eos: The tokens that end a sequence; they are no part of its text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._eos = eos
        # The first call sets padding and truncation off, which no other thread may see half done.
        self.encode("x")

    @property
    def has_chat_template(self) -> bool:
        """Whether the model knows conversations."""
        return self._tokenizer.chat_template is not None

    def encode(self, prompt: str) -> list[int]:
        """The tokens of a plain prompt, with the special tokens that the model expects around it."""
        return list(self._tokenizer(prompt, add_special_tokens=True).input_ids)

    def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """The tokens of a conversation, up to where the assistant's answer begins.

        Raises:
            BadRequest: the model's template refuses the conversation.
        """
        # developer is the newer name of system; templates know the older one.
        turns = [
            {"role": "system" if message.role == "developer" else message.role, "content": message.text}
            for message in messages
        ]
        try:
            ids: Any = self._tokenizer.apply_chat_template(
                turns, tokenize=True, add_generation_prompt=True, return_dict=False
            )
        except TemplateError as exc:
            raise BadRequest(f"messages: the model's chat template refuses them: {exc}", param="messages") from exc
        return list(ids)

    def ended(self, tokens: Sequence[int], stop_tokens: Collection[int] = ()) -> bool:
        """Whether a sequence ended by itself, or at one of the tokens that its request stops at."""
        return bool(tokens) and (tokens[-1] in self._eos or tokens[-1] in stop_tokens)

    def decode(self, tokens: Sequence[int], stop_tokens: Collection[int] = ()) -> str:
        """The text of generated tokens, without special ones and without the one that ended them."""
        if self.ended(tokens, stop_tokens):
            tokens = tokens[:-1]
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))


class StopMatcher:
    """Finds the first of some strings in a text that comes token by token.

    Only the newest tokens are decoded at each step, from a few before, since a token's text can depend on the one
    before it; what ends in half a character waits for the rest. Each step decodes a bounded number of tokens, whatever
    they are.
    """

    def __init__(self, text: Text, stops: Sequence[str]) -> None:
        self._text = text
        self._stops = stops
        self._longest = max(len(stop) for stop in stops)
        self._begin = self._read = 0  # tokens[begin:read] are decoded already, and give the new ones their context
        self._context = 0  # characters of tokens[begin:read]
        self._tail = ""

    def push(self, tokens: Sequence[int]) -> bool:
        """Take all tokens so far; whether their text has one of the strings."""
        end = len(tokens)
        new = self._text.decode(tokens[self._begin : end])
        if len(new) <= self._context or new.endswith(_REPLACEMENT):
            if end - self._read < _PENDING_TOKENS:
                return False
            end -= _HALF_TOKENS
            new = self._text.decode(tokens[self._begin : end])
        self._tail = (self._tail + new[self._context :])[-(self._longest + len(new)) :]
        self._begin, self._read = self._read, end
        self._context = len(self._text.decode(tokens[self._begin : end]))
        return cut(self._tail, self._stops) is not None


def cut(text: str, stops: Sequence[str]) -> str | None:
    """The text before the first of the stop strings; None where none of them is in it."""
    places = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    return text[: min(places)] if places else None
