"""One multipart upload to S3: parts in parallel, completed unless an object stands, aborted on any failure."""

import asyncio
import base64
import contextlib
import zlib
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

from botocore.exceptions import ClientError

from rejoinder.adapters import aws_errors, blobs
from rejoinder.adapters.aws import Connections
from rejoinder.adapters.errors import AdapterError, TooLarge

if TYPE_CHECKING:
    from types_aiobotocore_s3 import S3Client

PART: Final = 8 << 20
"""Bytes. S3 takes 5 MiB and more; with larger ones each put holds more, and a short one is no faster."""
PARTS: Final = 10_000
"""S3 takes no more: 78 GiB in all. Parts that grew to reach S3's 50 TB would be held in memory, too."""
AT_ONCE: Final = 2
"""Parts on their way while the next one is gathered."""
COMPLETING: Final = 600.0
"""Seconds beyond those of any call: S3 takes "several minutes" for many parts, and sends blanks meanwhile."""
PUT: Final = "s3:PutObject"


@dataclass(frozen=True, slots=True)
class Clients:
    """Connections by what they are for, so that none waits for another kind."""

    reading: "Connections[S3Client]"
    writing: "Connections[S3Client]"
    asking: "Connections[S3Client]"


@dataclass(frozen=True, slots=True)
class Target:
    """The object that is to be."""

    bucket: str
    name: str
    location: str

    @property
    def named(self) -> dict[str, Any]:
        """The object as the SDK's calls name it."""
        return {"Bucket": self.bucket, "Key": self.name}


async def unless_there(call: Awaitable[Any]) -> bool:
    """Make a write that is meant not to happen if an object stands; gives whether it happened."""
    try:
        await call
    except ClientError as exc:
        if aws_errors.status_of(exc) == 412:
            return False
        raise
    return True


def _checks(s3: "S3Client") -> bool:
    """Whether to send checksums: as the SDK does, unless AWS_REQUEST_CHECKSUM_CALCULATION says otherwise."""
    config: Any = s3.meta.config
    return bool(config.request_checksum_calculation == "when_supported")


def checksum(s3: "S3Client", body: bytes) -> Any:
    """Return the setting that has S3 compare what arrives.

    The SDK's own would come after the body, in a stream that cannot be sent again when a connection turns out closed.
    """
    return {"ChecksumCRC32": base64.b64encode(zlib.crc32(body).to_bytes(4, "big")).decode()} if _checks(s3) else {}


class Upload:
    """An upload, which its first part begins. Left without `complete` having written the object, it is aborted.

    `upload_id` names one that was begun by somebody else, for `abort`.
    """

    def __init__(self, clients: Clients, target: Target, upload_id: str | None = None) -> None:
        self._clients = clients
        self._target = target
        self.id = upload_id
        self._parts: list[asyncio.Task[Any]] = []
        self._under_way: set[asyncio.Task[Any]] = set()
        self._written = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._parts:
            task.cancel()
        await blobs.to_its_end(asyncio.gather(*self._parts, return_exceptions=True))
        if self.id is not None and not self._written:
            # The first fault is what the caller is told, and the next put of this key aborts this upload too.
            with contextlib.suppress(AdapterError):
                await blobs.to_its_end(self.abort())

    async def begin(self, new: dict[str, Any]) -> None:
        """Begin it; `new` are the object's settings. Raises as `BlobStore.put`."""

        async def call(s3: "S3Client") -> None:
            # A checksum of the whole object, and not of its parts, is one that readers can compare.
            whole: Any = {"ChecksumAlgorithm": "CRC32", "ChecksumType": "FULL_OBJECT"} if _checks(s3) else {}
            answer = await s3.create_multipart_upload(**new, **whole)
            self.id = answer["UploadId"]

        # A step that no cancellation parts: what was begun can be aborted only by its id.
        await blobs.to_its_end(self._clients.asking.run(PUT, self._target.location, call))

    async def add(self, piece: bytes) -> None:
        """Send a part, as soon as fewer than `AT_ONCE` are on their way. Raises what an earlier one raised, too."""
        if len(self._parts) == PARTS:
            raise TooLarge(f"{self._target.location} is longer than {PARTS} parts of {PART} bytes")
        await self._wait(AT_ONCE - 1)
        task = asyncio.create_task(self._part(len(self._parts) + 1, piece))
        self._parts.append(task)
        self._under_way.add(task)

    async def _wait(self, count: int) -> None:
        """Wait until at most `count` parts are on their way."""
        while len(self._under_way) > count:
            done, self._under_way = await asyncio.wait(self._under_way, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()

    async def _part(self, number: int, piece: bytes) -> dict[str, Any]:
        settings: Any = {**self._target.named, "UploadId": self.id, "PartNumber": number, "Body": piece}
        answer = await self._clients.writing.run(
            PUT, self._target.location, lambda s3: s3.upload_part(**settings, **checksum(s3, piece))
        )
        checksums = {name: value for name, value in answer.items() if name.startswith("ChecksumCRC")}
        return {"PartNumber": number, "ETag": answer["ETag"], **checksums}

    async def complete(self) -> bool:
        """Make an object of the parts unless one stands; gives whether it did. Raises as `BlobStore.put`."""
        await self._wait(0)
        parts: Any = {"Parts": [task.result() for task in self._parts]}
        self._written = await self._clients.writing.run(
            PUT,
            self._target.location,
            lambda s3: unless_there(
                s3.complete_multipart_upload(
                    **self._target.named, UploadId=str(self.id), MultipartUpload=parts, IfNoneMatch="*"
                )
            ),
            seconds=COMPLETING,
        )
        return self._written

    async def abort(self) -> None:
        """Remove what was written. Raises Denied, Transient."""

        async def call(s3: "S3Client") -> None:
            try:
                await s3.abort_multipart_upload(**self._target.named, UploadId=str(self.id))
            except ClientError as exc:
                if aws_errors.status_of(exc) != 404:  # somebody else has, or it was completed after all
                    raise

        await self._clients.asking.run("s3:AbortMultipartUpload", self._target.location, call)
