"""What a reader makes of a stream's chunks is the body that the request would have got in one piece, to the bit."""

import random

import pytest
import pytest_asyncio
from engine_harness import chat, completion, started
from stream_harness import stream

from rejoinder.schemas.assembly import assemble
from rejoinder.schemas.chunks import merged
from rejoinder.worker.engines import chunks as telling

pytestmark = pytest.mark.asyncio(loop_scope="module")

HOT = {"n": 3, "max_tokens": 24, "temperature": 1.5, "seed": 7}
TURNS = {**HOT, "messages": [{"role": "user", "content": "日本 🦊?"}]}
REQUESTS = [
    completion({**HOT, "prompt": ["the quick", "日本 🦊"], "logprobs": 2}),
    completion({**HOT, "prompt": "dog", "logprobs": 0, "stop": ["a", "qu"]}),
    completion({**HOT, "prompt": "dog", "stop_token_ids": list(range(60, 76))}),
    chat({**TURNS, "logprobs": True, "top_logprobs": 3}),
    chat({**TURNS, "logprobs": True, "stop": ["e", "日"]}),
    chat(TURNS),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def alone(tiny):
    """Runs one sequence at a time and computes each prompt anew: then log-probabilities are the same each time."""
    engine = await started(tiny, max_running=1, prefix_sharing=False)
    yield engine
    await engine.stop()


def groups(chunks, chance):
    """As a worker publishes them: merged with those beside them."""
    rest = list(chunks)
    while rest:
        size = chance.randint(1, min(len(rest), 8))
        yield from merged(rest[:size])
        del rest[:size]


@pytest.mark.parametrize("request_", REQUESTS, ids=[f"{one.path[4:8]}-{n}" for n, one in enumerate(REQUESTS)])
async def test_chunks_assembled_are_the_answer_in_one_piece(alone, request_, monkeypatch):
    monkeypatch.setattr(telling, "INTERVAL", 0.0)  # a chunk for each token
    chunks = await held(alone, request_)
    assert len(list(groups(chunks, random.Random(5)))) < len(chunks)


@pytest.mark.parametrize("make", [completion, chat])
async def test_an_answer_without_a_text_too(alone, make):
    body = {"n": 3, "logprobs": 1, "prompt": "dog"}
    if make is chat:
        body = {"n": 3, "logprobs": True, "messages": TURNS["messages"]}
    first = await alone.generate(make({**body, "n": 1, "temperature": 0, "max_tokens": 1}))
    text = first["choices"][0]["text"] if make is completion else first["choices"][0]["message"]["content"]
    assert text
    chunks = await held(alone, make({**body, "temperature": 0, "stop": text[0]}))
    assert len(chunks) == 3


async def held(alone, request_):
    plain = await alone.generate(request_)
    chunks, last = await stream(alone, request_)
    assert len(plain["choices"]) == (6 if isinstance(request_.body.get("prompt"), list) else 3)
    assert assemble([*chunks, last]) == plain
    chance = random.Random(5)
    for _ in range(20):
        assert assemble([*groups(chunks, chance), last]) == plain
    return chunks
