"""Text that is told while its tokens come is the beginning of the whole, for vocabularies of every kind."""

import functools

import pytest
from engine_harness import build_tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from rejoinder.worker.engines.transformers.deltas import Deltas, Pieces
from rejoinder.worker.engines.transformers.text import Text, cut

WORDS = ["the", "lazy", "dog", "日本", "é", "a"]


def byte_level(directory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(build_tiny(directory))


def byte_fallback(_):
    """As Llama's of sentencepiece: words with their spaces, and bytes for all other characters."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", *(f"<0x{n:02X}>" for n in range(256)), "▁", *(f"▁{word}" for word in WORDS), *WORDS]
    tokenizer = Tokenizer(models.BPE({name: n for n, name in enumerate(names)}, [], byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def word_pieces(_):
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    names = ["[UNK]", *WORDS, *(f"##{word}" for word in WORDS), ".", "'"]
    tokenizer = Tokenizer(models.WordPiece({name: n for n, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens([AddedToken("[CLS]", special=True), AddedToken("[SEP]", special=True)])
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, cls_token="[CLS]", eos_token="[SEP]")


def metaspace(_):
    """As T5's."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "▁", *(f"▁{word}" for word in WORDS), *WORDS]
    tokenizer = Tokenizer(models.Unigram([(name, -1.0) for name in names], 0))
    tokenizer.add_special_tokens([AddedToken("<pad>", special=True), AddedToken("</s>", special=True)])
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


@pytest.fixture(scope="module", params=[byte_level, byte_fallback, word_pieces, metaspace])
def vocabulary(request, tmp_path_factory):
    tokenizer = request.param(tmp_path_factory.mktemp("tokenizer"))
    return Text(tokenizer, frozenset({tokenizer.eos_token_id})), len(tokenizer)


@functools.cache
def texts():
    """Texts of many kinds of characters, and tokens in any order."""
    words = st.text(st.sampled_from("aé日🦊👩‍🚀ﷺ thelazydog\n")) | st.text(max_size=8)
    return words | st.lists(st.integers(0, 10**6), max_size=40) | st.lists(st.integers(0, 7), max_size=60)


def tokens_of(text, size, drawn, ended):
    tokens = text.encode(drawn) if isinstance(drawn, str) else [token % (size + 2) for token in drawn]
    tokens = [token for token in tokens if not text.ended([token])]
    return [*tokens, *text._eos] if ended else tokens


@settings(deadline=None, max_examples=300)
@given(texts=st.lists(texts(), min_size=1, max_size=3), ended=st.booleans(), data=st.data())
def test_the_pieces_are_the_beginning_of_the_whole(vocabulary, texts, ended, data):
    text, size = vocabulary
    tokens = [token for drawn in texts for token in tokens_of(text, size, drawn, False)]
    tokens += text._eos if ended else []
    whole = text.decode(tokens)
    ends = data.draw(st.sets(st.integers(1, len(tokens)))) if tokens and data.draw(st.booleans()) else None
    pieces, told = Pieces(text), ""
    for end in range(1, len(tokens) + 1):
        if ends is None or end in ends:
            told += pieces.read(tokens[:end])
            assert whole.startswith(told), (told, whole)


@settings(deadline=None, max_examples=300)
@given(drawn=texts(), ended=st.booleans(), data=st.data())
def test_what_is_told_has_no_beginning_of_a_stop_string(vocabulary, drawn, ended, data):
    text, size = vocabulary
    tokens = tokens_of(text, size, drawn, ended)
    whole = text.decode(tokens)
    parts = st.tuples(st.integers(0, len(whole)), st.integers(1, 6)).map(lambda at: whole[at[0] : sum(at)])
    stops = data.draw(st.lists((parts | st.text(st.sampled_from("ab日 "))).filter(bool), min_size=1, max_size=3))
    deltas, told = Deltas(text, stops), ""
    for end in range(1, len(tokens) + 1):
        if deltas.push(tokens[:end]):
            tokens = tokens[:end]
            assert cut(text.decode(tokens), stops) is not None
            break
        if data.draw(st.booleans()):
            told += deltas.take()
    whole = text.decode(tokens)
    before = cut(whole, stops)
    assert (whole if before is None else before).startswith(told)


def test_a_stop_string_of_byte_tokens_ends_the_text_at_once(tmp_path):
    """Where line breaks are bytes, as in Llama 2's vocabulary: no token is made to be sure of one."""
    tokenizer = byte_fallback(tmp_path)
    text = Text(tokenizer, frozenset())
    line, half, dog = tokenizer.convert_tokens_to_ids(["<0x0A>", "<0xE6>", "dog"])
    tokens = [dog, line, line]
    for stop, end in (("\n", len(tokens) - 1), ("g\n\n", len(tokens))):
        deltas = Deltas(text, [stop])
        assert [deltas.push(tokens[:n]) for n in range(1, end + 1)] == [False] * (end - 1) + [True]
        assert "\n" not in deltas.take()
    assert not Deltas(text, ["\n", "\ufffd"]).push([dog, line, half])


def test_tokens_without_a_text_do_not_part_a_run_of_bytes(tmp_path):
    """A model's vocabulary can be larger than its tokenizer's."""
    tokenizer = byte_fallback(tmp_path)
    text = Text(tokenizer, frozenset())
    line, half, dog = tokenizer.convert_tokens_to_ids(["<0x0A>", "<0x80>", "dog"])
    for silent in (len(tokenizer), len(tokenizer) + 9, tokenizer.bos_token_id):
        tokens = [line, silent, half, dog]
        pieces = Pieces(text)
        assert "".join(pieces.read(tokens[:end]) for end in range(1, len(tokens) + 1)) == text.decode(tokens)


def test_all_but_what_must_wait_is_told_with_each_token(vocabulary):
    text, _ = vocabulary
    tokens = text.encode("aaa") * 3
    pieces = Pieces(text)
    assert "".join(pieces.read(tokens[:end]) for end in range(1, len(tokens) + 1)) == text.decode(tokens)


def test_a_token_that_ends_a_sequence_is_not_told(vocabulary):
    text, _ = vocabulary
    tokens = text.encode("aaa")
    deltas = Deltas(text, (), stop_tokens={tokens[-1]})
    deltas.push(tokens)
    assert deltas.take() == text.decode(tokens, {tokens[-1]}) != text.decode(tokens)


def test_tokens_without_a_text_are_no_context(vocabulary):
    """A model's vocabulary can be larger than its tokenizer's."""
    text, size = vocabulary
    begun = [*text.encode("a"), *[size + 1] * 6]
    tokens = [*begun, *text.encode("\u2581a")]
    pieces = Pieces(text)
    assert pieces.read(begun) + pieces.read(tokens) == text.decode(tokens)
