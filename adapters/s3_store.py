"""`s3://bucket/prefix`: a bucket of Amazon S3, or of whoever `AWS_ENDPOINT_URL` names, as a store.

    s3://bucket/prefix?region=REGION&kms_key_id=KEY

An object shorter than `PART` is one PutObject, a longer one a multipart upload; both end in `If-None-Match: *`. What
killed uploads of a key have left is listed by the next put of that key, beside a PutObject and before an upload of its
own, and aborted after it, when an object is sure to stand: an upload that somebody still works on is then as useless as
one that nobody does.

Reading needs `s3:GetObject`, and `s3:ListBucket` on the bucket, without which S3 says of a missing object that it is
forbidden. Putting needs `s3:PutObject` and `s3:AbortMultipartUpload`, and on the bucket
`s3:ListBucketMultipartUploads`. Removing needs `s3:DeleteObject`, listing `s3:ListBucket` on the bucket.
"""

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote_plus

from botocore.exceptions import ClientError

from rejoinder.adapters import aws_errors, blobs
from rejoinder.adapters.aws import POOL, Traffic, Vendor
from rejoinder.adapters.driver import Blob, Listed
from rejoinder.adapters.errors import AdapterError, BadURL, NotFound, Transient
from rejoinder.adapters.s3_upload import PART, PUT, Clients, Target, Upload, checksum, unless_there

if TYPE_CHECKING:
    from types_aiobotocore_s3 import S3Client

OPTIONS: Mapping[str, str] = {
    "region": "the bucket's region; by default that of the AWS configuration",
    "kms_key_id": "id, ARN or alias of the KMS key that new objects are encrypted with; by default as the bucket says",
}
READING: Final = Traffic(64, 30.0)
"""Each is an object that is being read, perhaps for hours. Its body may be silent as long as an answer may take."""
WRITING: Final = Traffic(POOL, 60.0)
"""Each is an object or a part of up to 8 MiB: within the minute also at 1 Mbit/s."""
ASKING: Final = Traffic(POOL, 10.0)
PAGE: Final = 1000
"""Objects in one answer to a listing: S3 gives no more."""
READ: Final = "s3:GetObject (and s3:ListBucket, without which a missing object is forbidden)"

_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]")


class S3Store:
    """A prefix of a bucket."""

    def __init__(self, bucket: str, prefix: str, encryption: Mapping[str, str], clients: Clients) -> None:
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._bucket = bucket
        self._prefix = prefix
        self._encryption = encryption
        self._clients = clients
        self._bucket_seen = False
        self._may_list = False

    def location(self, key: str) -> str:
        """See `rejoinder.adapters.driver.BlobStore.location`."""
        blobs.check_key(key, self._prefix)
        return f"{self.url}/{key}"

    @asynccontextmanager
    async def read(self, key: str) -> AsyncIterator[Blob]:
        """See `rejoinder.adapters.driver.BlobStore.read`."""
        name, location, reading = blobs.check_key(key, self._prefix), self.location(key), self._clients.reading
        async with reading.slots:
            answer = await reading.run_held(READ, location, lambda s3: s3.get_object(Bucket=self._bucket, Key=name))
            body: Any = answer["Body"]

            async def chunks() -> AsyncIterator[bytes]:
                while True:
                    # Within the body's own timeout of silence. It checks length and checksum at the end.
                    with reading.mapped(READ, location):
                        chunk: bytes = await body.read(blobs.PIECE)
                    if not chunk:
                        return
                    yield chunk

            try:
                yield Blob(int(answer["ContentLength"]), answer.get("ContentType"), chunks())
            finally:
                body.close()

    async def exists(self, key: str) -> bool:
        """See `rejoinder.adapters.driver.BlobStore.exists`."""
        return await self._stands(Target(self._bucket, blobs.check_key(key, self._prefix), self.location(key)))

    async def _stands(self, target: Target) -> bool:
        asking = self._clients.asking
        try:
            await asking.run(READ, target.location, lambda s3: s3.head_object(**target.named))
        except NotFound:
            # An answer without a body: of a missing object, or of a missing bucket. Who hears it may list.
            if not self._bucket_seen:
                await asking.run("s3:ListBucket", self.url, lambda s3: s3.head_bucket(Bucket=self._bucket))
                self._bucket_seen = True
            return False
        except Transient:
            raise
        except AdapterError:
            # An answer to HEAD has no body that would say why: expired credentials, a wrong clock, a wrong region.
            return await asking.run(READ, target.location, partial(_first_byte, named=target.named))
        return True

    async def remove(self, key: str) -> None:
        """See `rejoinder.adapters.driver.BlobStore.remove`."""
        target = Target(self._bucket, blobs.check_key(key, self._prefix), self.location(key))
        await self._clients.asking.run("s3:DeleteObject", target.location, lambda s3: s3.delete_object(**target.named))

    async def list(self, after: str = "") -> AsyncGenerator[Listed, None]:
        """See `rejoinder.adapters.driver.BlobStore.list`."""
        asked: Any = {"Bucket": self._bucket, "MaxKeys": PAGE}
        if self._prefix:
            asked["Prefix"] = f"{self._prefix}/"
        if after:
            asked["StartAfter"] = asked.get("Prefix", "") + after
        while True:
            # The SDK asks for percent-encoded keys and decodes them: XML has no way to write some characters.
            page = await self._clients.asking.run("s3:ListBucket", self.url, partial(_list_objects, asked=asked))
            for one in page.get("Contents", ()):
                if (key := blobs.key_of(one["Key"], self._prefix)) is not None:
                    yield Listed(key, one["LastModified"].timestamp())
            if not page.get("IsTruncated"):
                return
            if page["NextContinuationToken"] == asked.get("ContinuationToken"):
                raise Transient(f"s3:ListBucket on {self.url}: the service gives the same page again")
            asked["ContinuationToken"] = page["NextContinuationToken"]

    async def put(self, key: str, chunks: AsyncIterable[bytes], content_type: str) -> bool:
        """See `rejoinder.adapters.driver.BlobStore.put`. `TooLarge` above `s3_upload.PARTS` parts, 78 GiB."""
        target = Target(self._bucket, blobs.check_key(key, self._prefix), self.location(key))
        new = {**target.named, "ContentType": content_type, **self._encryption}
        listing = asyncio.create_task(self._left(target))
        try:
            if not self._may_list:  # so that nothing is written without the permission
                await listing
                self._may_list = True
            written = await self._put(target, chunks, new, listing)
            left = await listing
        finally:
            listing.cancel()
            await asyncio.gather(listing, return_exceptions=True)
        for upload_id in left:
            await Upload(self._clients, target, upload_id).abort()
        return written

    async def _put(
        self, target: Target, chunks: AsyncIterable[bytes], new: dict[str, Any], listing: Awaitable[Sequence[str]]
    ) -> bool:
        try:
            async with aclosing(blobs.pieces(chunks, PART)) as pieces, Upload(self._clients, target) as upload:
                async for piece in pieces:
                    if upload.id is None:
                        if len(piece) < PART:
                            return await self._put_object(target, new, piece)
                        await listing  # which must not find this upload
                        await upload.begin(new)
                    await upload.add(piece)
                return await upload.complete()
        except Transient as exc:
            # Another put of this key has won, and perhaps aborted what it found.
            if aws_errors.is_lost_race(exc) and await self._stands(target):
                return False
            raise

    async def _put_object(self, target: Target, new: dict[str, Any], body: bytes) -> bool:
        return await self._clients.writing.run(
            PUT,
            target.location,
            lambda s3: unless_there(s3.put_object(**new, **checksum(s3, body), Body=body, IfNoneMatch="*")),
        )

    async def _left(self, target: Target) -> Sequence[str]:
        """List the uploads of this key that nobody has completed or aborted."""
        asked: Any = {"Bucket": self._bucket, "Prefix": target.name, "EncodingType": "url"}
        found: list[str] = []
        while True:
            page = await self._clients.asking.run(
                "s3:ListBucketMultipartUploads", self.url, partial(_list_uploads, asked=asked)
            )
            # In the order of their keys: those of the key itself come before those that only begin with it. LocalStack
            # leaves keys as they are, which is what they cannot be else: they would not begin with the prefix.
            uploads: Any = page.get("Uploads", [])
            ours = [one["UploadId"] for one in uploads if target.name in {one["Key"], unquote_plus(one["Key"])}]
            found += ours
            if not page.get("IsTruncated") or len(ours) < len(uploads) or not ours:
                return found
            asked |= {"KeyMarker": target.name, "UploadIdMarker": page["NextUploadIdMarker"]}


async def _first_byte(s3: "S3Client", named: dict[str, Any]) -> bool:
    """Whether there is an object, of a GET, whose errors are told from each other."""
    try:
        (await s3.get_object(**named, Range="bytes=0-0"))["Body"].close()
    except ClientError as exc:
        code = exc.response.get("Error", {}).get("Code")
        if code not in {"InvalidRange", "NoSuchKey"}:  # the first says that it is empty
            raise
        return code == "InvalidRange"
    return True


async def _list_uploads(s3: "S3Client", asked: Any) -> Any:
    return await s3.list_multipart_uploads(**asked)


async def _list_objects(s3: "S3Client", asked: Any) -> Any:
    return await s3.list_objects_v2(**asked)


def parse(url: str) -> tuple[str, str, dict[str, str]]:
    """Return the bucket, the prefix and the options that `url` names. Raises BadURL."""
    form = "s3://BUCKET/PREFIX"
    bucket, prefix, query = blobs.parse(url, form, OPTIONS)
    if not _BUCKET.fullmatch(bucket):
        raise BadURL(f"{url!r} must be {form}: {bucket!r} is no bucket's name")
    return bucket, prefix, query


@asynccontextmanager
async def open_blobs(url: str) -> AsyncIterator[S3Store]:
    """Open the bucket that `url` names. Whether it is there, its first use shows. Raises BadURL, Denied, Transient."""
    bucket, prefix, query = parse(url)
    key = query.get("kms_key_id")
    encryption = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": key} if key else {}
    async with AsyncExitStack() as stack:
        vendor = Vendor(url, query.get("region"), stack)
        clients = Clients(*[await vendor.connect("s3", traffic) for traffic in (READING, WRITING, ASKING)])
        yield S3Store(bucket, prefix, encryption, clients)
