"""/v1/embeddings on tiny random models: right, whatever the batch, and safe for neighbours."""

import asyncio
import base64
import math
import struct

import pytest
import structlog
import torch
from engine_harness import eventually
from openai.types import CreateEmbeddingResponse
from pooling_harness import (
    CONTEXT,
    TEXTS,
    WORDS,
    Gate,
    alone,
    build_bert,
    embeddings,
    gathered,
    model_of,
    pooling_engine,
    vectors,
)

from rejoinder.worker.errors import BadRequest, EngineGone, Failed, Missing, RequestTooLarge, Unavailable

# float32 with about 2**-24 an operation: a batch's shape changes the order of sums, and nothing else.
CLOSE = {"abs": 1e-5}
MEAN = {"Pooling": {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return build_bert(tmp_path_factory.mktemp("bert"))


async def test_an_encoder_is_pooled_by_the_mean_and_answers_as_openai_does(bert):
    async with pooling_engine(bert, served_names=["e", "f"]) as engine:
        assert engine.paths == {"/v1/embeddings"}
        assert engine.capacity > 0
        answer = await engine.generate(embeddings({"input": TEXTS, "model": "f", "user": "u"}))
        assert set(answer) == set(CreateEmbeddingResponse.model_fields)
        parsed = CreateEmbeddingResponse.model_validate(answer, strict=True)
        assert [item.index for item in parsed.data] == list(range(len(TEXTS)))
        assert parsed.model == "f"
        assert parsed.usage.prompt_tokens == sum(len(text.split()) + 2 for text in TEXTS) == parsed.usage.total_tokens
        for text, item in zip(TEXTS, parsed.data, strict=True):
            assert item.embedding == pytest.approx(alone(bert, text).tolist(), **CLOSE)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
async def test_each_pooling_in_a_padded_batch_is_what_it_is_alone(bert, pooling):
    async with pooling_engine(bert, pooling=pooling, normalize=False) as engine:
        got = vectors(await engine.generate(embeddings({"input": TEXTS})))
        for text, vector in zip(TEXTS, got, strict=True):
            assert vector == pytest.approx(alone(bert, text, pooling, normalized=False).tolist(), **CLOSE)


async def test_a_decoder_is_pooled_by_its_last_token(tiny):
    texts = ["the quick", "the", "brown fox jumps over the lazy dog"]
    async with pooling_engine(tiny, task="embed") as engine:
        got = vectors(await engine.generate(embeddings({"input": texts})))
        for text, vector in zip(texts, got, strict=True):
            assert vector == pytest.approx(alone(tiny, text, "last").tolist(), **CLOSE)


@pytest.mark.parametrize(
    ("modules", "pooling", "normalized"),
    [
        ({"Pooling": {"pooling_mode_cls_token": True}, "Normalize": {}}, "cls", True),
        ({"Pooling": {"pooling_mode_lasttoken": True, "pooling_mode_cls_token": False}}, "last", False),
        ({"Pooling": {"pooling_mode": "cls", "embedding_dimension": 32}}, "cls", False),
        ({"Pooling": {"pooling_mode": ["mean"]}, "Normalize": {}}, "mean", True),
    ],
)
async def test_the_checkpoint_says_how_it_is_pooled(tmp_path, modules, pooling, normalized):
    build_bert(tmp_path, modules=modules)
    async with pooling_engine(tmp_path) as engine:
        [vector] = vectors(await engine.generate(embeddings({"input": TEXTS[1]})))
        assert vector == pytest.approx(alone(tmp_path, TEXTS[1], pooling, normalized).tolist(), **CLOSE)


@pytest.mark.parametrize("labels", [None, 1])
async def test_a_model_that_does_not_run_does_not_start(tmp_path, monkeypatch, labels):
    from transformers import BertModel

    def forward(*arguments, **named):
        raise RuntimeError("no kernel for this\nmore")

    monkeypatch.setattr(BertModel, "forward", forward)
    with pytest.raises(EngineGone, match=r"does not run: no kernel for this$"):
        async with pooling_engine(build_bert(tmp_path, labels=labels)):
            pass


async def test_what_is_loaded_is_logged_and_time_without_work_is_counted(bert):
    with structlog.testing.capture_logs() as logs:
        async with pooling_engine(bert) as engine:
            assert engine.stats.idle_seconds == 0
            await engine.generate(embeddings({"input": "fox"}))
            before = engine.stats
            assert before.idle_seconds > 0
            await engine.generate(embeddings({"input": "fox"}))
            assert engine.stats.idle_seconds > before.idle_seconds
    [line] = [line for line in logs if line["event"] == "model_loaded"]
    assert (line["model"], line["device"], line["dtype"], line["attn"]) == (str(bert), "cpu", "float32", "sdpa")


async def test_settings_beat_the_checkpoint(tmp_path):
    build_bert(tmp_path, modules=MEAN)
    async with pooling_engine(tmp_path, pooling="cls", normalize=True) as engine:
        [vector] = vectors(await engine.generate(embeddings({"input": TEXTS[1]})))
        assert vector == pytest.approx(alone(tmp_path, TEXTS[1], "cls").tolist(), **CLOSE)


async def test_a_default_prompt_goes_before_each_text_and_no_token_ids(tmp_path):
    build_bert(tmp_path, modules=MEAN)
    (tmp_path / "config_sentence_transformers.json").write_text(
        '{"prompts": {"query": "", "document": "the lazy "}, "default_prompt_name": "document"}'
    )
    async with pooling_engine(tmp_path, normalize=True) as engine:
        [text] = vectors(await engine.generate(embeddings({"input": "dog"})))
        assert text == pytest.approx(alone(tmp_path, "the lazy dog").tolist(), **CLOSE)
        ids = [2, WORDS.index("dog"), 3]
        [plain] = vectors(await engine.generate(embeddings({"input": ids})))
        assert plain == pytest.approx(alone(tmp_path, "dog").tolist(), **CLOSE)


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        ({**MEAN, "Dense": {"in_features": 32}}, "Dense"),
        ({"Pooling": {"pooling_mode_max_tokens": True}}, "pooling_mode_max_tokens"),
        ({"Pooling": {"pooling_mode": ["mean", "cls"]}}, "mean and cls"),
    ],
)
async def test_a_checkpoint_whose_vectors_would_be_others_is_refused(tmp_path, modules, said):
    build_bert(tmp_path, modules=modules)
    with pytest.raises(EngineGone, match=said):
        async with pooling_engine(tmp_path):
            pass


async def test_what_else_is_in_the_batch_does_not_matter(bert):
    texts = [" ".join(WORDS[4 + (at * n) % 12] for n in range(1, 2 + (at * 7) % 40)) for at in range(60)]
    async with pooling_engine(bert, max_batch_tokens=1) as engine:
        one_by_one = vectors(await engine.generate(embeddings({"input": texts})))
        assert engine._batcher.stats.steps == len(texts)
    for budget in (64, 512, 100_000):
        async with pooling_engine(bert, max_batch_tokens=budget) as engine:
            answers, shapes = await gathered(
                engine, *[embeddings({"input": text}) for text in texts], inputs=len(texts)
            )
            assert len(shapes) <= len(texts) / 2
            assert all(rows * length <= budget for rows, length in shapes)
        for answer, expected in zip(answers, one_by_one, strict=True):
            assert vectors(answer)[0] == pytest.approx(expected, **CLOSE)


async def test_base64_is_the_float32_values_and_floats_lose_nothing(bert):
    async with pooling_engine(bert) as engine:
        # The very same batch, so the very same bits.
        [floats] = vectors(await engine.generate(embeddings({"input": TEXTS[2]})))
        [packed] = vectors(await engine.generate(embeddings({"input": TEXTS[2], "encoding_format": "base64"})))
        data = base64.b64decode(packed, validate=True)
        assert data == struct.pack("<32f", *floats)
        assert all(len(repr(value)) < 17 for value in floats)


async def test_dimensions_cut_and_normalize_again(bert):
    async with pooling_engine(bert) as engine:
        [whole] = vectors(await engine.generate(embeddings({"input": "fox"})))
        [cut] = vectors(await engine.generate(embeddings({"input": "fox", "dimensions": 5})))
        length = math.hypot(*whole[:5])
        assert cut == pytest.approx([value / length for value in whole[:5]], abs=1e-6)
        [all_of_it] = vectors(await engine.generate(embeddings({"input": "fox", "dimensions": 32})))
        assert all_of_it == pytest.approx(whole, abs=1e-6)
        for wrong in (33, 0, -1, 1.5):
            with pytest.raises(BadRequest) as caught:
                await engine.generate(embeddings({"input": "fox", "dimensions": wrong}))
            assert caught.value.param == "dimensions"
    async with pooling_engine(bert, normalize=False) as engine:
        [whole] = vectors(await engine.generate(embeddings({"input": "fox"})))
        [cut] = vectors(await engine.generate(embeddings({"input": "fox", "dimensions": 5})))
        assert cut == whole[:5]


@pytest.mark.parametrize(
    ("body", "error", "param"),
    [
        ({"input": ["fox", "dog " * (CONTEXT - 1)]}, RequestTooLarge, "input.1"),
        ({"input": "x" * (CONTEXT * 256 + 1)}, RequestTooLarge, "input"),
        ({"input": [4] * (CONTEXT + 1)}, RequestTooLarge, "input"),
        ({"input": [[4], [len(WORDS)]]}, BadRequest, "input.1"),
        ({"input": ""}, BadRequest, "input"),
        ({}, BadRequest, "input"),
        ({"input": "x", "encoding_format": "int8"}, BadRequest, "encoding_format"),
        ({"input": "x", "model": "other"}, Missing, "model"),
        ({"input": "x", "nonsense": 1}, BadRequest, "nonsense"),
        ([], BadRequest, None),
    ],
)
async def test_a_bad_request_is_told_what_is_wrong_and_its_neighbours_are_served(bert, body, error, param):
    async with pooling_engine(bert) as engine:
        bad, good = await asyncio.gather(
            engine.generate(embeddings(body)),
            engine.generate(embeddings({"input": [2, *[4] * (CONTEXT - 2), 3]})),  # exactly as long as may be
            return_exceptions=True,
        )
        assert type(bad) is error
        assert bad.param == param
        if error is RequestTooLarge:
            assert bad.code == "context_length_exceeded"
            assert str(CONTEXT) in bad.message
        assert good["usage"]["prompt_tokens"] == CONTEXT


async def test_the_checkpoint_s_own_limit_holds_unless_the_settings_say_otherwise(tmp_path):
    build_bert(tmp_path)
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 10, "do_lower_case": false}')
    ten = {"input": "dog " * 9}  # eleven tokens with both special ones
    async with pooling_engine(tmp_path) as engine:
        with pytest.raises(RequestTooLarge, match="at most 10 tokens"):
            await engine.generate(embeddings(ten))
    async with pooling_engine(tmp_path, max_model_len=CONTEXT) as engine:
        assert (await engine.generate(embeddings(ten)))["usage"]["total_tokens"] == 11
    with pytest.raises(EngineGone, match="max_position_embeddings"):
        async with pooling_engine(tmp_path, max_model_len=CONTEXT + 1):
            pass


async def test_roberta_s_positions_begin_behind_its_padding_token(tmp_path):
    from transformers import RobertaConfig, RobertaModel

    build_bert(tmp_path)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = RobertaConfig(vocab_size=len(WORDS), max_position_embeddings=CONTEXT, pad_token_id=0, **shape)
    RobertaModel(config).save_pretrained(tmp_path)
    async with pooling_engine(tmp_path) as engine:
        answer = await engine.generate(embeddings({"input": [4] * (CONTEXT - 1)}))
        assert answer["usage"]["total_tokens"] == CONTEXT - 1
        with pytest.raises(RequestTooLarge):
            await engine.generate(embeddings({"input": [4] * CONTEXT}))


def refusing(limit, error):
    """A hook: no forward of more tokens than `limit`, padding included."""
    shapes = []

    def hook(module, args, kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))
        if kwargs["input_ids"].numel() > limit:
            raise error("no more memory")

    return hook, shapes


async def test_out_of_memory_is_retried_in_halves_down_to_the_one_that_cannot_run(bert):
    small = [" ".join(["fox"] * (1 + at % 6)) for at in range(16)]
    large = "dog " * 8
    async with pooling_engine(bert, max_batch_tokens=1000) as engine:
        hook, shapes = refusing(9, torch.OutOfMemoryError)
        handle = model_of(engine).register_forward_pre_hook(hook, with_kwargs=True)
        requests = [embeddings({"input": text}) for text in [*small, large]]
        (*good, bad), _ = await gathered(engine, *requests, inputs=len(requests))
        assert type(bad) is Unavailable
        assert bad.code == "out_of_memory"
        assert max(rows for rows, _ in shapes) == 17  # it was tried together first
        for text, answer in zip(small, good, strict=True):
            assert vectors(answer)[0] == pytest.approx(alone(bert, text).tolist(), **CLOSE)
        handle.remove()
        assert len(vectors(await engine.generate(embeddings({"input": large})))) == 1


async def test_an_input_that_the_model_fails_on_fails_alone(bert):
    poison = WORDS.index("lazy")

    def hook(module, args, kwargs):
        if (kwargs["input_ids"] == poison).any():
            raise IndexError("the text is secret")

    async with pooling_engine(bert, max_batch_tokens=1000) as engine:
        model_of(engine).register_forward_pre_hook(hook, with_kwargs=True)
        texts = ["fox", "dog", "lazy", "the", "brown"]
        answers, shapes = await gathered(engine, *[embeddings({"input": text}) for text in texts], inputs=5)
        assert shapes[0] == (5, 3)
        assert [type(answer) for answer in answers] == [dict, dict, Failed, dict, dict]
        assert "IndexError" in answers[2].message
        assert "secret" not in answers[2].message


@pytest.mark.parametrize("value", [math.nan, math.inf])
async def test_a_result_that_is_no_number_is_its_own_request_s_error(bert, value):
    poison = WORDS.index("lazy")

    def hook(module, args, kwargs, output):
        output.last_hidden_state[(kwargs["input_ids"] == poison).any(1)] = value

    async with pooling_engine(bert, max_batch_tokens=1000) as engine:
        model_of(engine).register_forward_hook(hook, with_kwargs=True)
        texts = ["fox", "lazy", "the"]
        requests = [embeddings({"input": text}) for text in [*texts, ["dog", "lazy", "brown"]]]
        answers, shapes = await gathered(engine, *requests, inputs=6)
        assert [type(answer) for answer in answers] == [dict, Failed, dict, Failed]
        assert shapes == [(6, 3)]
        for text, answer in zip(texts[::2], answers[:3:2], strict=True):
            assert vectors(answer)[0] == pytest.approx(alone(bert, text).tolist(), **CLOSE)


async def test_cancelling_drops_what_waits_and_the_others_gather_meanwhile(bert):
    async with pooling_engine(bert) as engine:
        gate = Gate(engine)
        first = asyncio.create_task(engine.generate(embeddings({"input": [[4, 5]]})))
        await eventually(gate.inside.is_set)
        dropped = asyncio.create_task(engine.generate(embeddings({"input": [[6] * 9] * 5})))
        kept = [asyncio.create_task(engine.generate(embeddings({"input": [[7] * 9]}))) for _ in range(3)]
        await eventually(lambda: len(engine._batcher._pool) == 8)
        dropped.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dropped
        gate.open.set()
        await asyncio.gather(first, *kept)
        assert gate.shapes == [(1, 2), (3, 9)]


async def test_stopping_ends_what_runs_and_what_waits(bert):
    async with pooling_engine(bert) as engine:
        gate = Gate(engine)
        running = asyncio.create_task(engine.generate(embeddings({"input": [[4, 5], [4] * 60]})))
        await eventually(gate.inside.is_set)
        waiting = asyncio.create_task(engine.generate(embeddings({"input": "fox"})))
        await eventually(lambda: len(engine._batcher._pool) > 1)
        stopping = asyncio.create_task(engine.stop())
        with pytest.raises(Unavailable):
            await waiting
        with pytest.raises(Unavailable):
            await running
        gate.open.set()
        await stopping
        assert engine.capacity == 0
        with pytest.raises(Unavailable):
            await engine.generate(embeddings({"input": "fox"}))
        assert len(gate.shapes) == 1


async def test_a_device_that_is_lost_ends_the_engine(bert):
    def hook(module, args, kwargs):
        raise torch.AcceleratorError("an illegal memory access was encountered")

    async with pooling_engine(bert) as engine:
        gone = asyncio.create_task(engine.wait_gone())
        model_of(engine).register_forward_pre_hook(hook, with_kwargs=True)
        before = engine._batcher.stats.steps
        with pytest.raises(Unavailable, match="the device failed"):
            await engine.generate(embeddings({"input": ["fox", "dog", "the"]}))
        async with asyncio.timeout(60):
            await gone
        assert engine.capacity == 0
        assert engine._batcher.stats.steps == before + 1  # nothing more is tried on it
