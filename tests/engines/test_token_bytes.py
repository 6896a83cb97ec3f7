"""The bytes of tokens: half characters too, and all together the text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rejoinder.worker.engines.token_bytes import TokenBytes, offsets


@pytest.fixture(scope="module")
def tiny_tokenizer(tiny):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny)


@settings(deadline=None, max_examples=200)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_the_bytes_of_all_tokens_are_the_text(tiny_tokenizer, text):
    tokens = tiny_tokenizer.encode(text, add_special_tokens=False)
    parts = TokenBytes(tiny_tokenizer).parts(tokens, text)
    if "<s>" in text or "</s>" in text:
        return
    assert b"".join(part or b"" for part in parts) == text.encode()
    places = offsets(parts)
    done = b""
    for place, part in zip(places, parts, strict=True):
        assert place == max(0, len((done + part[:1]).decode(errors="replace")) - 1)
        done += part


@settings(deadline=None, max_examples=200)
@given(tokens=st.lists(st.integers(0, 289), max_size=12))
def test_any_tokens_bytes_read_as_they_are_decoded(tiny_tokenizer, tokens):
    text = tiny_tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    parts = TokenBytes(tiny_tokenizer).parts(tokens, text)
    assert b"".join(part or b"" for part in parts).decode(errors="replace") == text


def sentencepiece(decoder):
    """A tokenizer as Llama's: spaces as a letter of their own, bytes for what is not in the vocabulary."""
    from tokenizers import AddedToken, Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", *[f"<0x{value:02X}>" for value in range(256)], "\u2581", "\u2581fox", "x", "\u2581日"]
    tokenizer = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@settings(deadline=None, max_examples=200)
@given(tokens=st.lists(st.one_of(st.integers(0, 261), st.sampled_from([258, 259, 260, 261])), max_size=10))
def test_so_do_those_of_a_sentencepiece_vocabulary(tokens):
    from tokenizers import decoders

    llama = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = sentencepiece(llama)
    text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    whole = b"".join(part or b"" for part in TokenBytes(tokenizer).parts(tokens, text))
    if "\ufffd" not in text:  # broken characters are decoded in runs there: of how many signs differs
        assert whole.decode() == text


def test_how_a_token_reads(tiny_tokenizer):
    told = TokenBytes(tiny_tokenizer)
    halves = tiny_tokenizer.encode("🦊", add_special_tokens=False)
    assert [told.shown(token) for token in halves] == [f"bytes:\\x{value:02x}" for value in "🦊".encode()]
    assert (told.shown(1), told.of(1)) == ("</s>", None)
    assert (told.shown(10**6), told.of(10**6)) == ("token_id:1000000", None)
    assert offsets([told.of(token) for token in tiny_tokenizer.encode("a🦊b", add_special_tokens=False)]) == [
        *(0, 1, 1, 1, 1, 2)
    ]
