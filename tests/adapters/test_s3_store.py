"""What S3 answers besides success, and what is sent to it."""

import asyncio
import uuid

import pytest
from aiobotocore.session import get_session
from proxy import Proxy

from rejoinder.adapters import (
    AdapterError,
    Denied,
    NotFound,
    TooLarge,
    Transient,
    aws,
    open_blobs,
    s3_store,
    s3_upload,
)

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


async def first_of(store):
    return await anext(store.list())


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
        (200, "InternalError", Transient),  # so S3 ends a call that it has begun to answer
        (307, "TemporaryRedirect", Transient),
        (400, "InvalidToken", Denied),
        (501, "NotImplemented", AdapterError),
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
        with pytest.raises(AdapterError, match=code) as found:
            await store.put("k", stream(size), "t")
        assert found.type is kind
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


@pytest.mark.parametrize("operation", ["read", "exists", "put", "remove", "list"])
async def test_no_permission_is_denied_and_says_what_is_missing(s3_gate, bucket, operation):
    async with open_blobs(bucket.url) as store:
        s3_gate.refuse = lambda _: (403, "AccessDenied")
        calls = {"read": content_of(store, "k"), "exists": store.exists("k"), "put": store.put("k", stream(1), "t")}
        calls |= {"remove": store.remove("k"), "list": first_of(store)}
        texts = {"read": "s3:ListBucket", "exists": "s3:ListBucket", "put": "s3:ListBucketMultipartUploads"}
        texts |= {"remove": "s3:DeleteObject", "list": "s3:ListBucket"}
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


async def test_an_upload_is_not_begun_before_it_is_known_what_others_have_left(s3_gate, bucket):
    async with open_blobs(bucket.url) as store:
        assert await store.put("first", stream(1), "t")
        s3_gate.refuse = lambda request: (503, "SlowDown") if request.query_string.startswith("uploads&") else None
        with pytest.raises(Transient, match="SlowDown"):
            await store.put("k", stream(9 * MIB), "t")
        assert not any(seen.startswith("POST") for seen in s3_gate.seen)


async def test_a_short_put_does_not_wait_for_the_list_of_uploads(s3_gate, bucket):
    came = asyncio.Event()

    async def before(request):
        if request.method == "PUT":
            came.set()
        elif "uploads" in request.query:
            await came.wait()

    await bucket.client.create_multipart_upload(Bucket=bucket.name, Key="k")
    async with open_blobs(bucket.url) as store:
        assert await store.put("first", stream(1), "t")
        s3_gate.before = before
        async with asyncio.timeout(60):
            assert await store.put("k", stream(1), "t")
    s3_gate.before = None
    assert await bucket.uploads() == []


@pytest.mark.parametrize(
    "refusal",
    [(400, "ExpiredToken", Denied), (403, "RequestTimeTooSkewed", Transient), (404, "NoSuchBucket", NotFound)],
)
async def test_why_it_cannot_be_told_whether_an_object_stands(s3_gate, bucket, refusal):
    status, code, kind = refusal
    async with open_blobs(bucket.url) as store:
        s3_gate.refuse = lambda _: (status, code)
        with pytest.raises(kind, match="404" if status == 404 else code):
            await store.exists("k")


async def test_a_head_that_fails_and_a_get_that_does_not(s3_gate, bucket):
    async with open_blobs(bucket.url) as store:
        for key, size in {"some": 3, "empty": 0}.items():
            assert await store.put(key, stream(size), "t")
        s3_gate.refuse = lambda request: (403, "AccessDenied") if request.method == "HEAD" else None
        assert [await store.exists(key) for key in ("some", "empty", "none")] == [True, True, False]


async def test_a_bucket_of_another_region_is_found(s3_gate, bucket):
    s3_gate.region = "eu-west-1"
    s3_gate.refuse = lambda request: (
        None if "/eu-west-1/s3/" in request.headers["Authorization"] else (301, "PermanentRedirect")
    )
    async with open_blobs(f"{bucket.url}?region=us-east-1") as store:
        assert await store.exists("k") is False
        assert await store.put("k", stream(3), "t") is True
        assert await store.put("long", stream(9 * MIB), "t") is True
        assert await content_of(store, "long") == b"x" * 9 * MIB


async def test_an_endpoint_that_only_redirects_says_so(s3_gate, bucket):
    s3_gate.refuse = lambda _: (301, "Moved")
    async with open_blobs(bucket.url) as store:
        for call in (lambda: store.exists("k"), lambda: content_of(store, "k"), lambda: store.put("k", stream(1), "t")):
            with pytest.raises(AdapterError, match="AWS_ENDPOINT_URL") as found:
                await call()
            assert found.type is AdapterError


async def test_a_part_that_fails_aborts_the_upload(s3_gate, bucket):
    async with open_blobs(bucket.url) as store:
        s3_gate.refuse = lambda request: (503, "SlowDown") if request.query.get("partNumber") == "2" else None
        with pytest.raises(Transient, match="SlowDown"):
            await store.put("k", stream(30 * MIB), "t")
        assert await bucket.uploads() == []


async def test_a_read_that_breaks_off_or_is_silent_is_transient(s3_gate, bucket, monkeypatch):
    monkeypatch.setattr(s3_store, "READING", s3_store.Traffic(4, 4.0))
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
    monkeypatch.setattr(s3_store, "READING", s3_store.Traffic(4, 3.0))
    async with open_blobs(bucket.url) as store:
        assert await store.put("k", stream(20 * MIB), "t")
        async with store.read("k") as blob:
            size = len(await anext(blob.chunks))
            await asyncio.sleep(4.5)  # longer than the store may be silent: that is the test
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


async def test_a_completion_may_take_longer_than_any_other_call(s3_gate, bucket, monkeypatch):
    monkeypatch.setattr(s3_store, "WRITING", s3_store.Traffic(4, 4.0))
    monkeypatch.setattr(aws, "CONNECT_SECONDS", 1.0)
    monkeypatch.setattr(aws, "SPARE_SECONDS", 0.0)
    s3_gate.blanks = 30
    async with open_blobs(bucket.url) as store:
        assert await store.put("k", stream(9 * MIB), "t") is True
        assert await bucket.uploads() == []


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


async def test_a_list_of_uploads_is_read_to_the_end_of_its_key(s3_gate, bucket, monkeypatch):
    async def page_of_two(s3, asked):
        return await list_uploads(s3, {**asked, "MaxUploads": 2})

    list_uploads = s3_store._list_uploads
    monkeypatch.setattr(s3_store, "_list_uploads", page_of_two)
    async with open_blobs(bucket.url) as store:
        for number in range(2, 7):
            key = f"k{number}"  # encoded, LocalStack would take the encoded key alone for a marker
            for one in [key] * number + [f"{key}/more"] * 3:
                await bucket.client.create_multipart_upload(Bucket=bucket.name, Key=one)
            assert await store.put(key, stream(1), "t")
            assert [one["Key"] for one in await bucket.uploads()] == [f"{key}/more"] * 3
            for one in await bucket.uploads():
                await bucket.client.abort_multipart_upload(Bucket=bucket.name, Key=one["Key"], UploadId=one["UploadId"])


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
