"""/v1/rerank on a tiny random cross-encoder, and which task each checkpoint is taken for."""

import json

import pytest
import torch
from pooling_harness import CONTEXT, TEXTS, build_bert, embeddings, gathered, pooling_engine, rerank
from pydantic import ValidationError

from rejoinder.worker.errors import BadRequest, EngineGone, Failed, Missing, RequestTooLarge, Unavailable

QUERY = "quick fox"


@pytest.fixture(scope="module")
def cross(tmp_path_factory):
    return build_bert(tmp_path_factory.mktemp("cross"), labels=1)


def logits(directory, query, texts):
    """The logit of each pair, one by one, plainly by transformers."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        encoded = [tokenizer(query, text, return_tensors="pt", padding=False, truncation=False) for text in texts]
        return [model(**one).logits.item() for one in encoded]


def sigmoid(value):
    return torch.sigmoid(torch.tensor(value)).item()


async def test_scores_are_the_sigmoid_of_the_logit_best_first(cross):
    async with pooling_engine(cross, served_names=["ranker"]) as engine:
        assert engine.paths == {"/v1/rerank"}
        answer = await engine.generate(rerank({"query": QUERY, "documents": TEXTS}, "abc"))
        wanted = [sigmoid(value) for value in logits(cross, QUERY, TEXTS)]
        order = sorted(range(len(TEXTS)), key=lambda at: -wanted[at])
        assert len(set(wanted)) == len(wanted)
        assert [result["index"] for result in answer["results"]] == order
        for result in answer["results"]:
            assert result["relevance_score"] == pytest.approx(wanted[result["index"]], abs=1e-5)
            assert set(result) == {"index", "relevance_score"}
        tokens = sum(len(text.split()) + len(QUERY.split()) + 3 for text in TEXTS)
        assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
        assert answer["model"] == "ranker"
        assert answer["id"] == "rerank-abc"


async def test_top_n_and_documents(cross):
    async with pooling_engine(cross) as engine:
        everything = await engine.generate(rerank({"query": QUERY, "documents": TEXTS}))
        documents = [{"text": text} if at % 2 else text for at, text in enumerate(TEXTS)]
        body = {"query": QUERY, "documents": documents, "top_n": 2, "return_documents": True}
        answer = await engine.generate(rerank(body))
        assert [result["index"] for result in answer["results"]] == [
            result["index"] for result in everything["results"][:2]
        ]
        assert [result["document"] for result in answer["results"]] == [
            {"text": TEXTS[result["index"]]} for result in answer["results"]
        ]
        more = await engine.generate(rerank({"query": QUERY, "documents": TEXTS, "top_n": 99}))
        assert more == everything
        same = await engine.generate(rerank({"query": QUERY, "documents": ["fox"] * 3}))
        assert [result["index"] for result in same["results"]] == [0, 1, 2]  # equal ones in the sender's order


@pytest.mark.parametrize(
    ("config", "made"),
    [
        ({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, lambda value: value),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, lambda value: value),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}}, sigmoid),
    ],
)
async def test_the_checkpoint_may_say_what_a_score_is(tmp_path, config, made):
    build_bert(tmp_path, labels=1, **config)
    async with pooling_engine(tmp_path) as engine:
        answer = await engine.generate(rerank({"query": QUERY, "documents": TEXTS[:1]}))
        [logit] = logits(tmp_path, QUERY, TEXTS[:1])
        assert answer["results"][0]["relevance_score"] == pytest.approx(made(logit), abs=1e-5)


async def test_a_decoder_finds_its_last_token_in_a_padded_batch(tmp_path, tiny):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.pad_token = "<s>"
    tokenizer.save_pretrained(tmp_path)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, initializer_range=0.3, pad_token_id=None, **shape)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    async with pooling_engine(tmp_path) as engine:
        answer = await engine.generate(rerank({"query": QUERY, "documents": TEXTS}))
        wanted = logits(tmp_path, QUERY, TEXTS)
        for result in answer["results"]:
            assert result["relevance_score"] == pytest.approx(sigmoid(wanted[result["index"]]), abs=1e-5)


@pytest.mark.parametrize(
    ("body", "error", "param"),
    [
        ({"query": "fox", "documents": ["dog", "dog " * CONTEXT]}, RequestTooLarge, "documents.1"),
        ({"query": "fox " * CONTEXT, "documents": ["dog"]}, RequestTooLarge, "documents.0"),
        ({"query": "x" * (CONTEXT * 256 + 1), "documents": ["dog"]}, RequestTooLarge, "query"),
        ({"query": "fox", "documents": []}, BadRequest, "documents"),
        ({"query": "fox", "documents": ["dog", {"image": "x"}]}, BadRequest, "documents.1.text"),
        ({"query": "fox", "documents": ["dog", 7]}, BadRequest, "documents.1"),
        ({"query": "fox", "documents": ["dog"] * 2049}, BadRequest, "documents"),
        ({"query": "", "documents": ["dog"]}, BadRequest, "query"),
        ({"documents": ["dog"]}, BadRequest, "query"),
        ({"query": "fox", "documents": ["dog"], "top_n": 0}, BadRequest, "top_n"),
        ({"query": "fox", "documents": ["dog"], "model": "other"}, Missing, "model"),
        ({"query": "fox", "documents": ["dog"], "rank_fields": []}, BadRequest, "rank_fields"),
    ],
)
async def test_a_bad_request_is_told_what_is_wrong(cross, body, error, param):
    async with pooling_engine(cross) as engine:
        with pytest.raises(error) as caught:
            await engine.generate(rerank(body))
        assert type(caught.value) is error
        assert caught.value.param == param
        if error is RequestTooLarge:
            assert caught.value.code == "context_length_exceeded"


async def test_a_query_that_is_too_long_is_not_tokenized_with_each_document(cross, monkeypatch):
    from rejoinder.worker.engines.transformers import rerank as module

    tokenized = []

    def encode(loaded, texts, seconds):
        tokenized.append(len(texts))
        return real(loaded, texts, seconds)

    real = module.encode
    monkeypatch.setattr(module, "encode", encode)
    async with pooling_engine(cross) as engine:
        with pytest.raises(RequestTooLarge) as caught:
            await engine.generate(rerank({"query": "fox " * 4000, "documents": ["dog"] * 2048}))
        assert caught.value.param == "documents.0"
        assert tokenized == [1]
        await engine.generate(rerank({"query": "fox", "documents": ["dog"] * 5}))
        assert sum(tokenized) == 6


async def test_neighbours_of_one_that_cannot_run_are_served(cross):
    def hook(module, args, kwargs, output):
        if kwargs["input_ids"].shape[1] > 12:
            raise torch.OutOfMemoryError("no more memory")
        output.logits[(kwargs["input_ids"] == 15).any(1)] = float("nan")

    async with pooling_engine(cross, max_batch_tokens=1000) as engine:
        engine._loaded.model.register_forward_hook(hook, with_kwargs=True)
        documents = [["fox"], ["dog " * 10], ["the far away"], ["lazy", "dog"]]
        requests = [rerank({"query": QUERY, "documents": texts}) for texts in documents]
        answers, shapes = await gathered(engine, *requests, inputs=5)
        assert [type(answer) for answer in answers] == [dict, Unavailable, Failed, dict]
        assert shapes[0] == (5, 15)
        for texts, answer in zip(documents[::3], answers[::3], strict=True):
            wanted = [sigmoid(value) for value in logits(cross, QUERY, texts)]
            for result in answer["results"]:
                assert result["relevance_score"] == pytest.approx(wanted[result["index"]], abs=1e-5)


def changed(directory, **config):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return directory


def paths(directory, **config):
    from rejoinder.worker.engines.transformers.tasks import create

    return create({"model": str(directory), **config}).paths


@pytest.mark.parametrize(
    ("architectures", "path"),
    [
        (["BertModel"], "/v1/embeddings"),
        (["BertForMaskedLM"], "/v1/embeddings"),
        (["Qwen3Model"], "/v1/embeddings"),
        (["XLMRobertaForSequenceClassification"], "/v1/rerank"),
        (["LlamaForCausalLM"], "/v1/completions"),
        (["GPT2LMHeadModel"], "/v1/completions"),
        ([], "/v1/completions"),
        (None, "/v1/completions"),
    ],
)
def test_the_config_says_the_task(tmp_path, architectures, path):
    build_bert(tmp_path)
    assert paths(changed(tmp_path, architectures=architectures)) == {path}


def test_files_of_sentence_transformers_make_a_decoder_an_embedding_model(tmp_path):
    build_bert(tmp_path, modules={"Pooling": {"pooling_mode_lasttoken": True}})
    changed(tmp_path, architectures=["Qwen3ForCausalLM"])
    assert paths(tmp_path) == {"/v1/embeddings"}
    assert paths(tmp_path, task="generate") == {"/v1/completions"}
    assert paths(tmp_path, task="rerank") == {"/v1/rerank"}


@pytest.mark.parametrize(
    ("labels", "config", "said"),
    [
        (3, {}, "has 3 labels"),
        (None, {"task": "rerank"}, "no ForSequenceClassification"),
        (1, {"attn": "varlen"}, "varlen"),
    ],
)
async def test_a_checkpoint_that_cannot_rerank_is_refused_in_one_line(tmp_path, labels, config, said):
    build_bert(tmp_path, labels=labels)
    with pytest.raises(EngineGone, match=said) as caught:
        async with pooling_engine(tmp_path, **config):
            pass
    assert "\n" not in str(caught.value)


async def test_an_activation_that_is_not_served_is_refused(tmp_path):
    build_bert(tmp_path, labels=1, sentence_transformers={"activation_fn": "my.module.Softplus"})
    with pytest.raises(EngineGone, match="Softplus"):
        async with pooling_engine(tmp_path):
            pass


def test_no_model_is_said_so(tmp_path):
    with pytest.raises(EngineGone, match="is no directory"):
        paths(tmp_path / "nothing")
    with pytest.raises(EngineGone, match="has no weights"):
        paths(tmp_path)
    build_bert(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(EngineGone, match=r"config\.json"):
        paths(tmp_path)


async def test_a_cross_encoder_can_be_told_to_embed(cross):
    async with pooling_engine(cross, task="embed") as engine:
        answer = await engine.generate(embeddings({"input": "fox"}))
        assert len(answer["data"][0]["embedding"]) == 32


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"cache_bytes": 2**20}, "is a model for task rerank: cache_bytes has no meaning for task rerank"),
        ({"compile": "default"}, "compile has no meaning for task rerank, which generates nothing"),
        ({"pooling": "cls"}, "pooling has no meaning for task rerank, which makes no embeddings"),
    ],
)
def test_a_setting_of_another_task_is_refused(cross, config, said):
    with pytest.raises(EngineGone, match=said):
        paths(cross, **config)
    with pytest.raises(ValidationError, match=said.rpartition(": ")[2]):
        paths(cross, task="rerank", **config)


def test_a_generating_model_makes_no_embeddings(tiny):
    with pytest.raises(EngineGone, match="normalize has no meaning for task generate"):
        paths(tiny, normalize=False)
