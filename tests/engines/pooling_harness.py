"""Tiny random models for embeddings and rerank, their engines, and what they should answer."""

import asyncio
import contextlib
import json
import threading
from pathlib import Path

from engine_harness import eventually

from rejoinder.worker.engines.protocol import EngineRequest

CONTEXT = 64
WORDS = [
    *[
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "lazy",
        "dog",
        "and",
        "runs",
    ],
    *["far", "away"],
]
TEXTS = ["the", "quick brown fox", "lazy dog runs far away and jumps over the fox " * 4, "fox fox", "over the lazy dog"]


def build_bert(directory: Path, *, labels: int | None = None, modules: dict[str, dict] | None = None, **config) -> Path:
    """Save a random Bert: a bare one, or with a classifier's head of so many labels.

    `modules` are sentence-transformers' after the model itself, each with its config.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    # As published checkpoints have it: the file itself asks for truncation and padding, which must not happen.
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    special = {name: f"[{name[:3].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(directory)
    torch.manual_seed(0)
    shape = {
        "vocab_size": len(WORDS),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.3,
        **({} if labels is None else {"num_labels": labels}),
        **config,
    }
    (BertModel if labels is None else BertForSequenceClassification)(BertConfig(**shape)).save_pretrained(directory)
    if modules is not None:
        names = ["Transformer", *modules]
        rows = [
            {"idx": at, "name": str(at), "path": f"{at}_{name}" if at else "", "type": f"sentence_transformers.{name}"}
            for at, name in enumerate(names)
        ]
        (directory / "modules.json").write_text(json.dumps(rows))
        for row, settings in zip(rows[1:], modules.values(), strict=True):
            (directory / row["path"]).mkdir(exist_ok=True)
            (directory / row["path"] / "config.json").write_text(json.dumps(settings))
    return directory


@contextlib.asynccontextmanager
async def pooling_engine(model, **config):
    from rejoinder.worker.engines.transformers.tasks import create

    engine = create({"model": str(model), "threads": 1, **config})
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def embeddings(body, response_id="r"):
    return EngineRequest("/v1/embeddings", body, response_id, 1_700_000_000)


def rerank(body, response_id="r"):
    return EngineRequest("/v1/rerank", body, response_id, 1_700_000_000)


def vectors(answer):
    return [item["embedding"] for item in answer["data"]]


def model_of(engine):
    """The model inside, for a hook."""
    return engine._loaded.model


def alone(directory, text, pooling="mean", normalized=True):
    """The embedding of one text, plainly by transformers."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    encoded = tokenizer(text, return_tensors="pt", padding=False, truncation=False)
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()(**encoded).last_hidden_state[0]
    pooled = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
    return pooled / pooled.norm() if normalized else pooled


class Gate:
    """A hook that holds every forward until it is opened, and notes the shapes of all."""

    def __init__(self, engine):
        self.inside, self.open, self.shapes = threading.Event(), threading.Event(), []
        model_of(engine).register_forward_pre_hook(self, prepend=True, with_kwargs=True)

    def __call__(self, module, args, kwargs):
        self.shapes.append(tuple(kwargs["input_ids"].shape))
        self.inside.set()
        assert self.open.wait(100)


async def gathered(engine, *requests, inputs):
    """Run requests whose so many inputs have all gathered before the first forward of theirs.

    Returns what each returned or raised, and the shapes of their forwards.
    """
    gate = Gate(engine)
    first = asyncio.create_task(engine.generate(requests[0]))
    await eventually(gate.inside.is_set)
    held = len(engine._batcher._pool)
    tasks = [asyncio.create_task(engine.generate(request)) for request in requests]
    await eventually(lambda: len(engine._batcher._pool) == held + inputs)
    before = len(gate.shapes)
    gate.open.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.wait({first})
    first.exception()
    return results, gate.shapes[before:]
