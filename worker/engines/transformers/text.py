"""Text to tokens and back: chat templates, stop strings. Tokenizers release the GIL: threads do it beside the loop."""

from collections.abc import Collection, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rejoinder.schemas.openai import ChatMessage
from rejoinder.worker.errors import BadRequest

_BYTES = [f"<0x{value:02X}>" for value in range(256)]
"""How vocabularies that fall back on bytes write them."""


class Text:
    """A model's tokenizer, as the engine needs it. Safe to call from several threads.

    Args:
        tokenizer: The model's.
        eos: The tokens that end a sequence; they are no part of its text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._eos = eos
        ids: Any = tokenizer.convert_tokens_to_ids(_BYTES)
        special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        byte_tokens = {token for name, token in zip(_BYTES, ids, strict=True) if _is(tokenizer, token, name)}
        known = frozenset(tokenizer.get_vocab().values())
        self._size = 1 + max(known)
        self._open = frozenset(special | byte_tokens | (set(range(self._size)) - known))
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

    def open(self, token: int) -> bool:
        """Whether what follows a token may change the text that ends with it.

        A run of byte tokens is a text only if all of it is one; special tokens, and those that only the model knows,
        say nothing and do not part a run.
        """
        return token in self._open or token >= self._size

    def decode(self, tokens: Sequence[int], stop_tokens: Collection[int] = ()) -> str:
        """The text of generated tokens, without special ones and without the one that ended them."""
        if self.ended(tokens, stop_tokens):
            tokens = tokens[:-1]
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _is(tokenizer: PreTrainedTokenizerBase, token: int | None, name: str) -> bool:
    return token is not None and tokenizer.convert_ids_to_tokens(token) == name


def cut(text: str, stops: Sequence[str]) -> str | None:
    """The text before the first of the stop strings; None where none of them is in it."""
    places = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    return text[: min(places)] if places else None
