"""The stores that the conformance suite runs against. A new one is one more `Store` in `STORES`."""

import uuid
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiobotocore.session import get_session


@dataclass(frozen=True)
class Store:
    name: str
    make: Callable[[Path, Any], Awaitable[str]]
    """Make a store that is empty, and give its URL: (a directory of the test, the service's fixture)."""
    left: Callable[[str, Any], Awaitable[list[str]]]
    """What there is besides objects, such as unfinished uploads: (its URL, the service's fixture)."""
    service: str | None = None
    """The fixture that has its service running."""
    across_processes: bool = True
    keeps_content_type: bool = True
    has_buckets: bool = True
    """Whether a store can be missing for a put, too."""
    holds_parts: bool = True
    """Whether an object is never in memory as a whole."""
    longest_part: int = 1024
    """Bytes of the longest part of a key."""


@asynccontextmanager
async def s3():
    async with get_session().create_client("s3") as client:
        yield client


async def _memory(_directory: Path, _: Any) -> str:
    return f"memory://{uuid.uuid4().hex}/a b"


async def _none(_url: str, _: Any) -> list[str]:
    return []


async def _file(directory: Path, _: Any) -> str:
    return f"file://{directory}/store é+%2F"


async def _unfinished(url: str, _: Any) -> list[str]:
    return [str(path) for path in Path(url.removeprefix("file://")).rglob("*") if path.name.startswith(".rejoinder")]


async def _s3(_directory: Path, _: Any) -> str:
    bucket = f"t-{uuid.uuid4().hex}"
    async with s3() as client:
        await client.create_bucket(Bucket=bucket)
    return f"s3://{bucket}/pre fix/é+%2F"


async def _uploads(url: str, _: Any) -> list[str]:
    async with s3() as client:
        found = await client.list_multipart_uploads(Bucket=url.split("/")[2])
    return [upload["Key"] for upload in found.get("Uploads", [])]


async def _gcs(_directory: Path, service: Any) -> str:
    return f"gs://{service.make_bucket()}/pre fix/é+%2F"


STORES = (
    Store("memory", _memory, _none, across_processes=False, has_buckets=False, holds_parts=False),
    Store("file", _file, _unfinished, keeps_content_type=False, has_buckets=False, longest_part=255),
    Store("s3", _s3, _uploads, service="s3_gate"),
    Store("gcs", _gcs, _none, service="gcs"),
)
