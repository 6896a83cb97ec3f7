"""What S3 answers besides success, and what is sent to it."""

import asyncio
import uuid

import pytest
from aiobotocore.session import get_session
from proxy import Proxy

from rejoinder.adapters import AdapterError, Denied, TooLarge, Transient, open_blobs, s3_store, s3_upload

MIB = 1 << 20


@pytest.fixture
async def bucket(s3_gate):
    name = f"t-{uuid.uuid4().hex}"
    async with get_session().create_client("s3") as client:
        await client.create_bucket(Bucket=name)
        yield Bucket(name, client)


class Bucket:
    def __init__(self, name, client):
        self.name, self.client = name, client

    @property
    def url(self):
        return f"s3://{self.name}"

    async def uploads(self):
        return (await self.client.list_multipart_uploads(Bucket=self.name)).get("Uploads", [])

    async def head(self, key):
        return await self.client.head_object(Bucket=self.name, Key=key, ChecksumMode="ENABLED")


async def stream(size: int):
    for _ in range(0, size, MIB):
        yield b"x" * min(MIB, size)


async def content_of(store, key):
    async with store.read(key) as blob:
        return b"".join([chunk async for chunk in blob.chunks])


async def read_until(store, fault):
    """Read all, with a fault from the first chunk on."""
    async with store.read("k") as blob:
        await anext(blob.chunks)
        fault()
        async for _ in blob.chunks:
            pass


@pytest.mark.parametrize("size", [10, 9 * MIB])
@pytest.mark.parametrize(
    "refusal",
    [
        (403, "AccessDenied", Denied),
        (503, "SlowDown", Transient),
        (500, "InternalError", Transient),
        (409, "ConditionalRequestConflict", Transient),
        (400, "KMS.DisabledException", Denied),
        (400, "EntityTooLarge", TooLarge),
        (400, "XAmzContentChecksumMismatch", Transient),
    ],
)
async def test_refusals_of_a_put(s3_gate, bucket, size, refusal):
    status, code, kind = refusal
    last = "PUT" if size < 8 * MIB else "POST"

    def refuse(request):
        here = request.method == last and ("uploads" not in request.query)
        return (status, code) if here else None

    async with open_blobs(bucket.url) as store:
        s3_gate.refuse = refuse
        with pytest.raises(kind, match=code):
            await store.put("k", stream(size), "t")
        s3_gate.refuse = None
        assert not await store.exists("k")
        assert await bucket.uploads() == []
        assert await store.put("k", stream(size), "t") is True


@pytest.mark.parametrize("size", [10, 9 * MIB])
async def test_a_conflict_with_a_write_that_has_won_is_false(s3_gate, bucket, size):
    async with open_blobs(bucket.url) as store:
        assert await store.put("k", stream(3), "t")
        s3_gate.refuse = lambda request: (
            (409, "ConditionalRequestConflict")
            if request.method in {"PUT", "POST"} and not {"uploads", "partNumber"} & set(request.query)
            else None
        )
        assert await store.put("k", stream(size), "t") is False
        assert await bucket.uploads() == []


@pytest.mark.parametrize("operation", ["read", "exists", "put"])
async def test_no_permission_is_denied_and_says_what_is_missing(s3_gate, bucket, operation):
    async with open_blobs(bucket.url) as store:
        s3_gate.refuse = lambda _: (403, "AccessDenied")
        calls = {"read": content_of(store, "k"), "exists": store.exists("k"), "put": store.put("k", stream(1), "t")}
        texts = {"read": "s3:ListBucket", "exists": "s3:ListBucket", "put": "s3:ListBucketMultipartUploads"}
        with pytest.raises(Denied, match=texts[operation]):
            await calls.pop(operation)
        for call in calls.values():
            call.close()


async def test_without_the_permission_to_list_nothing_is_written(s3_gate, bucket):
    async with open_blobs(bucket.url) as store:
        s3_gate.refuse = lambda request: (403, "AccessDenied") if request.query_string.startswith("uploads") else None
        with pytest.raises(Denied, match="ListBucketMultipartUploads"):
            await store.put("k", stream(1), "t")
        s3_gate.refuse = None
        assert not await store.exists("k")


async def test_a_part_that_fails_aborts_the_upload(s3_gate, bucket):
    async with open_blobs(bucket.url) as store:
        s3_gate.refuse = lambda request: (503, "SlowDown") if request.query.get("partNumber") == "2" else None
        with pytest.raises(Transient, match="SlowDown"):
            await store.put("k", stream(30 * MIB), "t")
        assert await bucket.uploads() == []


async def test_a_read_that_breaks_off_or_is_silent_is_transient(s3_gate, bucket, monkeypatch):
    monkeypatch.setattr(s3_store, "READING", s3_store.Traffic(4, 1.0))
    async with open_blobs(bucket.url) as store, Proxy(s3_gate.url) as proxy:
        assert await store.put("k", stream(20 * MIB), "t")
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        async with open_blobs(bucket.url) as through:
            for fault in (proxy.cut, proxy.hang):
                with pytest.raises(Transient):
                    await read_until(through, fault)
                proxy.restore()
            assert len(await content_of(through, "k")) == 20 * MIB


async def test_a_slow_reader_is_not_a_silent_store(s3_gate, bucket, monkeypatch):
    monkeypatch.setattr(s3_store, "READING", s3_store.Traffic(4, 0.2))
    async with open_blobs(bucket.url) as store:
        assert await store.put("k", stream(20 * MIB), "t")
        async with store.read("k") as blob:
            size = len(await anext(blob.chunks))
            await asyncio.sleep(0.7)  # longer than the store may be silent: that is the test
            async for chunk in blob.chunks:
                size += len(chunk)
        assert size == 20 * MIB


async def test_garbled_content_is_noticed(s3_gate, bucket, monkeypatch):
    async with open_blobs(bucket.url) as store:
        assert await store.put("k", stream(9 * MIB), "t")
    async with Proxy(s3_gate.url) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        async with open_blobs(bucket.url) as store:
            with pytest.raises(Transient):
                await read_until(store, lambda: proxy.corrupt(answers_only=True))


async def test_a_store_that_is_away_is_transient(aws, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    async with open_blobs("s3://bucket/x") as store:
        for call in (store.exists("k"), store.put("k", stream(1), "t"), content_of(store, "k")):
            with pytest.raises(Transient):
                await call


@pytest.mark.parametrize("size", [10, 17 * MIB])
async def test_content_type_checksum_and_key_of_what_is_written(s3_gate, bucket, size):
    async with open_blobs(f"{bucket.url}?region=us-east-1&kms_key_id=alias/mine") as store:
        assert await store.put("k", stream(size), "application/jsonl")
    head = await bucket.head("k")
    assert head["ContentType"] == "application/jsonl"
    assert head["ServerSideEncryption"] == "aws:kms"
    assert "alias/mine" in head["SSEKMSKeyId"]
    assert head["ChecksumCRC32"]
    assert head["ChecksumType"] == "FULL_OBJECT"


async def test_checksums_can_be_switched_off_as_in_the_sdk(s3_gate, bucket, monkeypatch):
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    async with open_blobs(bucket.url) as store:
        assert await store.put("big", stream(17 * MIB), "t")
    assert "ChecksumCRC32" not in await bucket.head("big")


async def test_more_parts_than_there_may_be(s3_gate, bucket, monkeypatch):
    monkeypatch.setattr(s3_upload, "PARTS", 2)
    async with open_blobs(bucket.url) as store:
        with pytest.raises(TooLarge, match="longer than 2 parts"):
            await store.put("k", stream(25 * MIB), "t")
        assert await bucket.uploads() == []


async def test_uploads_of_a_key_that_died_are_all_removed_and_no_others(s3_gate, bucket):
    for key in ["k"] * 3 + ["kk", "other"]:
        await bucket.client.create_multipart_upload(Bucket=bucket.name, Key=key)
    async with open_blobs(bucket.url) as store:
        assert await store.put("k", stream(1), "t")
        assert [one["Key"] for one in await bucket.uploads()] == ["kk", "other"]
        await bucket.client.create_multipart_upload(Bucket=bucket.name, Key="k")
        assert await store.put("k", stream(1), "t") is False
    assert [one["Key"] for one in await bucket.uploads()] == ["kk", "other"]


async def test_a_name_of_the_endpoint_is_not_put_before_it(s3_gate, bucket, monkeypatch):
    """`bucket.HOST` is a name that nobody resolves where HOST is a local one."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_gate.url.replace("127.0.0.1", "localhost"))
    async with open_blobs(bucket.url) as store:
        assert await store.put("k", stream(1), "t")
    assert f"PUT /{bucket.name}/k" in s3_gate.seen


async def test_errors_are_one_line(s3_gate, bucket):
    async with open_blobs(bucket.url) as store:
        s3_gate.refuse = lambda _: (418, "Teapot")
        with pytest.raises(AdapterError) as found:
            await store.exists("k")
        assert "\n" not in str(found.value)
