"""The text of one sequence, told while its tokens come: what was told is the beginning of the whole, whatever follows.

A token's text can depend on the one before it, a character can be several tokens, and what looks like a text can turn
out to be the beginning of a stop string. So some of it is held back, and the end is told when the whole is known.
"""

from collections.abc import Collection, Sequence

from rejoinder.worker.engines.transformers.text import Text, cut

_REPLACEMENT = "\ufffd"
_CONTEXT_TOKENS = 4
"""Decoded with new ones, and cut away again: a first token loses the space before it, and more in some vocabularies."""
_LAST_TOKENS = 8
"""Enough to see whether a text ends in half a character: one has at most four bytes, each of them a token at worst."""


class Pieces:
    """Decodes a sequence piece by piece.

    The pieces together are the beginning of what decoding all tokens at once gives. Each call decodes a few tokens
    besides the new ones, whatever they are: a thousand broken characters are not decoded anew with each one after them.
    """

    def __init__(self, text: Text, stop_tokens: Collection[int] = ()) -> None:
        self._text = text
        self._stop_tokens = stop_tokens
        self._read = 0  # tokens whose text was given
        self._begin = 0  # tokens[begin:read] are decoded again, for the new ones' sake
        self._context = 0  # characters of these

    def read(self, tokens: Sequence[int]) -> str:
        """What is sure now of the text of all tokens so far, and was not before."""
        end = len(tokens)
        if end == self._read or self._text.open(tokens[-1]):
            return ""
        if end - self._read > _CONTEXT_TOKENS and self._decode(tokens[max(self._read, end - _LAST_TOKENS) :]).endswith(
            _REPLACEMENT
        ):
            return ""
        new = self._decode(tokens[self._begin :])
        if len(new) <= self._context or new.endswith(_REPLACEMENT):
            return ""
        piece = new[self._context :]
        self._begin = max(0, end - _CONTEXT_TOKENS)
        self._context = len(self._decode(tokens[self._begin :]))
        if not self._context:  # nothing in them that could be the context
            self._begin = self._read
            self._context = len(self._decode(tokens[self._begin :]))
        self._read = end
        return piece

    def unsure(self, tokens: Sequence[int]) -> str:
        """What follows the pieces if no token follows; nothing where that is half a character, or very long."""
        if not 0 < len(tokens) - self._read <= _LAST_TOKENS:
            return ""
        new = self._decode(tokens[self._begin :])
        return "" if new.endswith(_REPLACEMENT) else new[self._context :]

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._text.decode(tokens, self._stop_tokens)


class Deltas:
    """What can be told of a sequence's text, and whether it has a stop string. Of one thread alone.

    Args:
        text: The tokenizer.
        stops: None to many strings, each of which ends the text before it.
        stop_tokens: Tokens that end it, besides the model's own.
    """

    def __init__(self, text: Text, stops: Sequence[str], stop_tokens: Collection[int] = ()) -> None:
        self._pieces = Pieces(text, stop_tokens)
        self._stops = stops
        self._tokens: Sequence[int] = ()
        self._sure = ""
        self._held = ""  # what a stop string may begin with

    def push(self, tokens: Sequence[int]) -> bool:
        """Take all tokens so far; whether their text has one of the stop strings.

        Without any nothing is decoded until it is taken: then many tokens cost as much as one.
        """
        self._tokens = tokens
        return bool(self._stops) and self._look()

    def take(self) -> str:
        """What can be told and was not yet. Only until a stop string came."""
        if not self._stops:
            return self._pieces.read(self._tokens)
        sure, self._sure = self._sure, ""
        return sure

    def _look(self) -> bool:
        held = self._held + self._pieces.read(self._tokens)
        # Where line breaks are byte tokens, to wait until one is sure would cost the tokens up to there.
        if cut(held + self._pieces.unsure(self._tokens), self._stops) is not None:
            return True
        kept = len(held) - max(_begun(held, stop) for stop in self._stops)
        self._sure, self._held = self._sure + held[:kept], held[kept:]
        return False


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of a stop string that is not in it."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
