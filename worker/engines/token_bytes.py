"""The bytes that a token stands for. No torch.

A tokenizer decodes tokens to text; half a character has no text, but its bytes are known.
"""

import codecs
import json
from collections.abc import Sequence
from typing import Any


def _letters() -> dict[str, int]:
    """GPT-2's letter for each byte, as byte-level vocabularies are written."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in set(printable)]
    return {**{chr(value): value for value in printable}, **{chr(256 + n): value for n, value in enumerate(others)}}


_LETTERS = _letters()
_SPACE = "\u2581"


class TokenBytes:
    """The bytes of each token of a vocabulary. Safe to call from several threads.

    Args:
        tokenizer: One of transformers'.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._special = frozenset(token for token, known in added.items() if known.special)
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        kinds = json.dumps(json.loads(decoder.__getstate__()), ensure_ascii=False) if decoder is not None else ""
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        self._metaspace = "Metaspace" in kinds or _SPACE in kinds

    def of(self, token: int) -> bytes | None:
        """Of one token; None for a special one, which is no text, and for an id that is no token."""
        name = self.name(token)
        if name is None or token in self._special:
            return None
        if self._byte_level:
            values = [_LETTERS.get(letter) for letter in name]
            # A letter that stands for no byte: an added token, which is written as it is.
            return name.encode() if None in values else bytes(value for value in values if value is not None)
        if self._byte_fallback and len(name) == 6 and name.startswith("<0x"):
            return bytes([int(name[3:5], 16)])
        if self._metaspace:
            return name.replace(_SPACE, " ").encode()
        return str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False)).encode()

    def name(self, token: int) -> str | None:
        """As the vocabulary writes it; None for an id that is no token."""
        name = self._tokenizer.convert_ids_to_tokens(token)
        return name if isinstance(name, str) else None

    def shown(self, token: int) -> str:
        """The token as a text of its own: half a character as its bytes, a special token by its name."""
        value = self.of(token)
        if value is None:
            return self.name(token) or f"token_id:{token}"
        try:
            return value.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in value)

    def parts(self, tokens: Sequence[int], text: str) -> list[bytes | None]:
        """The bytes of each token of a sequence, which together are those of its decoded `text`."""
        parts = [self.of(token) for token in tokens]
        whole = b"".join(part or b"" for part in parts)
        # Decoding may take a sentence's first space away.
        if len(whole) - len(whole.lstrip(b" ")) > len(text) - len(text.lstrip(" ")):
            first, part = next((place, part) for place, part in enumerate(parts) if part)
            parts[first] = part[1:]
        return parts


def offsets(parts: Sequence[bytes | None]) -> list[int]:
    """Where each part begins in the text of all, in characters; inside a character: where that begins."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    places, whole = [], 0
    for part in parts:
        value = part or b""
        whole += len(decoder.decode(value[:1]))
        begun = bool(decoder.getstate()[0])  # bytes that are a character's beginning
        places.append(whole + begun - bool(value))
        whole += len(decoder.decode(value[1:]))
    return places
