"""Stop strings in a text that comes token by token."""

import pytest

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_stop_strings_across_characters_of_several_tokens(engine):
    from rejoinder.worker.engines.transformers.deltas import Deltas

    text = "a日本語b🦊c the lazy dog"
    tokens = engine._text.encode(text)
    for stop in ("日", "語b", "🦊c", "本語b🦊", "lazy dog", "g"):
        matcher = Deltas(engine._text, [stop, "zzz"])
        hits = [matcher.push(tokens[:n]) for n in range(1, len(tokens) + 1)]
        first = hits.index(True)
        assert stop in engine._text.decode(tokens[: first + 1])
        assert stop not in engine._text.decode(tokens[:first])


@pytest.mark.parametrize("broken", [b"\x80", b"\xf0", b"\xf0\x9f"])
async def test_a_run_of_broken_characters_is_decoded_in_pieces(engine, broken):
    from rejoinder.worker.engines.transformers.deltas import Deltas

    class Counting:
        decoded = 0

        def open(self, token):
            return engine._text.open(token)

        def decode(self, tokens, stop_tokens):
            self.decoded += len(tokens)
            return engine._text.decode(tokens, stop_tokens)

    letters = engine._text._tokenizer.get_vocab()
    raw = [letters[bytes_to_letter(value)] for value in broken] * 300
    tokens = [letters["a"], *raw, *engine._text.encode("the end 🦊")]
    text = Counting()
    matcher = Deltas(text, ["d 🦊"])
    hits = [matcher.push(tokens[:n]) for n in range(1, len(tokens) + 1)]
    assert hits.index(True) == len(tokens) - 1
    assert text.decoded < 24 * len(tokens)


def bytes_to_letter(value):
    """The letter that stands for a byte in byte-level vocabularies, of those that are no printable letters."""
    from tokenizers.pre_tokenizers import ByteLevel

    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    if value in printable:
        return chr(value)
    assert len(ByteLevel.alphabet()) == 256
    return chr(256 + sorted(set(range(256)) - printable).index(value))
