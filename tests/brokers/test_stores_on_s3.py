"""A real worker whose results are on S3: a store that is cut off, one that is not there, and pointers on SQS."""

import asyncio
import json
from pathlib import Path

from broker_pairs import sqs
from objects import content_at
from pairs import End, Queues, sqlite
from proxy import Proxy
from store_kills import bucket
from worker_process import WorkerProcess

SIZE = 9 << 20


def request(body: str, **options: str) -> bytes:
    return json.dumps({"path": "/echo", "metadata": {"n": 1}, "body": body, "options": options}).encode()


async def test_a_store_that_is_cut_off_costs_nothing_but_time(aws: str, tmp_path: Path) -> None:
    queues, log = sqlite(tmp_path, lease=5), tmp_path / "worker.log"
    with Proxy(aws) as proxy:
        async with bucket() as store:
            env = {"AWS_ENDPOINT_URL_S3": proxy.url}
            with WorkerProcess(queues, log, "--blobs", store.url, "--max-inline-bytes", "1000", env=env) as worker:
                await asyncio.to_thread(worker.until_event, "engine_ready")
                proxy.delay(0.05)
                await queues.send(request("x" * SIZE, inference_id="cut"))
                while not await store.left_over():
                    await asyncio.sleep(0.01)
                proxy.cut()
                await asyncio.to_thread(worker.until_event, "broker_retry")
                await asyncio.sleep(1.5 * queues.lease)  # the outage itself: longer than a lease
                proxy.restore()
                (message,) = await queues.receive(1)
                await queues.until_settled()
                assert worker.stop() == 0
            assert message.attributes["attempt"] == "1", "its lease was kept"
            assert list(await store.objects()) == ["cut.out"]
            assert await store.left_over() == []


async def test_a_bucket_that_is_not_there_ends_the_start_with_one_line(aws: str, tmp_path: Path) -> None:
    queues, log = sqlite(tmp_path), tmp_path / "worker.log"
    with WorkerProcess(queues, log, "--blobs", "s3://no-such-bucket-of-anybody/p") as worker:
        assert await asyncio.to_thread(worker.process.wait, 60) == 1
        assert "s3://no-such-bucket-of-anybody" in log.read_text().strip().splitlines()[-1]
        assert "Traceback" not in log.read_text()


async def test_a_large_response_goes_to_sqs_as_a_pointer(aws: str, tmp_path: Path) -> None:
    requests = f"sqlite:///{tmp_path / 'queues.db'}?queue=requests"
    queues, log = Queues(End(requests, requests), await sqs(30, None), lease=30), tmp_path / "worker.log"
    async with bucket() as store:
        more = ["--blobs", store.url, "--extended-client"]
        with WorkerProcess(queues, log, *more) as worker:
            ids = await queues.send(request("small"), request("x" * (2 << 20)))
            got = {message.attributes["request_message_id"]: message for message in await queues.receive(2)}
            assert worker.stop() == 0
        small, large = got[ids[0]], got[ids[1]]
        assert json.loads(small.body)["body"] == "small"
        assert (large.body, large.stored_at) == (
            b"",
            f"{store.url}/responses/{large.attributes['response_id']}.json",
        )
        response = json.loads(await content_at(large.stored_at))
        assert response == {"status_code": 200, "metadata": {"n": 1}, "body": "x" * (2 << 20)}
