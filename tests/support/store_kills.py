"""SIGKILL of a real worker while it stores a result, and between storing and publishing: what must be true then.

Each round kills one worker in the midst of one request; the next worker answers that request and is killed in turn.
"""

import asyncio
import contextlib
import json
import os
import sqlite3
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from aiobotocore.session import get_session
from pairs import LIMIT, End, Queues
from worker_process import WorkerProcess

from rejoinder.adapters import Message

KILLS = int(os.environ.get("REJOINDER_TEST_KILLS", "4"))
"""Rounds of each test. 50 take some minutes for each."""
LARGE = 24 << 20
"""Bytes of a result that a file system takes a while to store."""
PARTS = 9 << 20
"""Bytes of a result that S3 gets in two parts."""


class Watched(Protocol):
    """A store, seen from outside."""

    url: str

    async def unfinished(self, pid: int) -> bool:
        """Whether this process is writing an object just now."""

    async def stands(self, name: str) -> bool:
        """Whether this result can be read."""

    async def objects(self) -> dict[str, bytes]:
        """All results that can be read, by their names."""

    async def left_over(self) -> list[str]:
        """All else that is there."""


@dataclass
class Files:
    folder: Path

    @property
    def url(self) -> str:
        return f"file://{self.folder}"

    async def unfinished(self, pid: int) -> bool:
        # A file without a name, which only its writer's descriptors lead to.
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if entry.readlink().is_relative_to(self.folder) and entry.stat().st_size > 0:
                    return True
        return False

    async def stands(self, name: str) -> bool:
        return (self.folder / "outputs" / name).exists()

    async def objects(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.folder.glob("outputs/*.out")}

    async def left_over(self) -> list[str]:
        objects = set(self.folder.glob("outputs/*.out"))
        return [str(path) for path in self.folder.rglob("*") if path.is_file() and path not in objects]


@dataclass
class Bucket:
    name: str

    @property
    def url(self) -> str:
        return f"s3://{self.name}/p"

    async def unfinished(self, pid: int) -> bool:
        return bool(await self.left_over())

    async def stands(self, name: str) -> bool:
        async with get_session().create_client("s3") as s3:
            found = await s3.list_objects_v2(Bucket=self.name, Prefix=f"p/outputs/{name}")
            return found["KeyCount"] > 0

    async def objects(self) -> dict[str, bytes]:
        async with get_session().create_client("s3") as s3:
            keys = [one["Key"] for one in (await s3.list_objects_v2(Bucket=self.name)).get("Contents", [])]
            assert all(key.startswith("p/outputs/") for key in keys), keys
            found = {}
            for key in keys:
                answer = await s3.get_object(Bucket=self.name, Key=key)
                found[key.rpartition("/")[2]] = await answer["Body"].read()
            return found

    async def left_over(self) -> list[str]:
        async with get_session().create_client("s3") as s3:
            return [one["Key"] for one in (await s3.list_multipart_uploads(Bucket=self.name)).get("Uploads", [])]


@contextlib.asynccontextmanager
async def bucket() -> AsyncIterator[Bucket]:
    name = f"t-{uuid.uuid4().hex}"
    async with get_session().create_client("s3") as s3:
        region = os.environ["AWS_DEFAULT_REGION"]
        where = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
        await s3.create_bucket(Bucket=name, **where)
    yield Bucket(name)


class Killing:
    """Requests whose workers are killed, one after the other."""

    def __init__(
        self, store: Watched, folder: Path, size: int, *more: str, env: Mapping[str, str] | None = None
    ) -> None:
        self.store = store
        self._folder = folder
        self._size = size
        self._more = more
        self._env = env
        self._answers = folder / "answers.db"
        ends = [f"sqlite:///{folder / 'requests.db'}?queue=r&lease=3", f"sqlite:///{self._answers}?queue=a"]
        self.queues = Queues(End(ends[0], ends[0]), End(ends[1], ends[1]), lease=3)
        self.sent = 0
        self.got: list[Message] = []

    async def send(self) -> None:
        text = f"{self.sent:08d}" + "x" * self._size
        options = {"inference_id": f"i{self.sent}"}
        await self.queues.send(
            json.dumps({"path": "/echo", "metadata": {"n": self.sent}, "body": text, "options": options}).encode()
        )
        self.sent += 1

    @contextlib.contextmanager
    def worker(self) -> Iterator[WorkerProcess]:
        arguments = ["--blobs", self.store.url, "--max-inline-bytes", "1000", "--max-attempts", "1000"]
        arguments += ["--max-request-bytes", str(60 << 20), *self._more]
        with WorkerProcess(self.queues, self._folder / "worker.log", *arguments, env=self._env) as worker:
            yield worker

    @contextlib.contextmanager
    def responses_closed(self) -> Iterator[None]:
        """Nobody can publish a response meanwhile."""
        connection = sqlite3.connect(self._answers, isolation_level=None, timeout=LIMIT)
        try:
            connection.execute("BEGIN IMMEDIATE")
            yield
        finally:
            connection.close()

    async def until(self, condition: Callable[[], Awaitable[bool]]) -> None:
        deadline = time.monotonic() + LIMIT
        while not await condition():
            assert time.monotonic() < deadline, (self._folder / "worker.log").read_text()[-4000:]
            await asyncio.sleep(0)

    async def finish(self) -> None:
        """Let the last worker's requests be answered, then look at everything."""
        with self.worker() as worker:
            await self.queues.receive(self.sent, got=self.got)
            await self.queues.until_settled()
            assert worker.stop() == 0
        self.got += await self.queues.receive_some()
        await self.check()

    async def check(self) -> None:
        """One object and one answer for each request, and nothing else."""
        objects = await self.store.objects()
        assert sorted(objects) == sorted(f"i{n}.out" for n in range(self.sent))
        for n in range(self.sent):
            assert json.loads(objects[f"i{n}.out"]) == f"{n:08d}" + "x" * self._size
        answers = [json.loads(message.body) for message in self.got]
        assert sorted(answer["metadata"]["n"] for answer in answers) == list(range(self.sent)), "each answered once"
        for answer in answers:
            n = answer["metadata"]["n"]
            location = f"{self.store.url}/outputs/i{n}.out"
            assert answer == {
                "status_code": 200, "metadata": {"n": n}, "body": None, "output_location": location
            }  # fmt: skip
        assert await self.store.left_over() == []


async def kill_during_upload(killing: Killing, kills: int) -> None:
    """Kill workers while they write an object. Those that were quicker than the test do not count."""
    hits = 0
    while hits < kills:
        with killing.worker() as worker:
            await killing.queues.receive(killing.sent, got=killing.got)  # what the last one left
            await killing.send()
            name = f"i{killing.sent - 1}.out"

            async def seen(pid: int = worker.process.pid, name: str = name) -> bool:
                return await killing.store.unfinished(pid) or await killing.store.stands(name)

            await killing.until(seen)
            worker.kill()
            hits += not await killing.store.stands(name)
    await killing.finish()


async def kill_before_publishing(killing: Killing, kills: int) -> None:
    """Kill workers that have written the object and cannot publish its response."""
    for _ in range(kills):
        with killing.worker() as worker:
            await killing.queues.receive(killing.sent, got=killing.got)
            await killing.queues.until_settled()
            with killing.responses_closed():
                await killing.send()
                name = f"i{killing.sent - 1}.out"
                await killing.until(lambda name=name: killing.store.stands(name))
                worker.kill()
    await killing.finish()
