"""What Cloud Storage answers besides success, and what is sent to it."""

import pytest
from proxy import Proxy

from rejoinder.adapters import AdapterError, Denied, NotFound, TooLarge, Transient, gcs_wire, open_blobs

MIB = 1 << 20


async def stream(size: int):
    for _ in range(0, size, MIB):
        yield b"x" * min(MIB, size)


async def content_of(store, key):
    async with store.read(key) as blob:
        return b"".join([chunk async for chunk in blob.chunks])


@pytest.fixture
def url(gcs):
    return f"gs://{gcs.make_bucket()}/prefix"


@pytest.fixture(autouse=True)
def _willing(gcs):
    yield
    gcs.refuse = gcs.break_at = None


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, Denied),
        (401, Denied),
        (403, Denied),
        (404, NotFound),
        (408, Transient),
        (413, TooLarge),
        (418, AdapterError),
        (429, Transient),
        (503, Transient),
    ],
)
async def test_refusals(gcs, url, status, kind):
    async with open_blobs(url) as store:
        gcs.refuse = (status, "as the service says it\nin two lines")
        calls = [content_of(store, "k"), store.put("k", stream(1), "t"), store.put("k", stream(9 * MIB), "t")]
        for call in [*calls, store.exists("k"), store.remove("k"), anext(store.list())]:
            with pytest.raises(kind, match=f"storage.objects.*{status}: as the service says it in two lines") as found:
                await call
            assert type(found.value) is kind
        gcs.refuse = None
        assert not await store.exists("k")


async def test_a_bucket_that_goes_away_is_told_from_an_object_that_is_not_there(gcs, url):
    async with open_blobs(url) as store:
        await store.remove("k")
        assert not await store.exists("k")
    async with open_blobs(url.replace("t-", "u-")) as store:
        with pytest.raises(NotFound, match=r"storage\.objects\.list on gs://"):
            await store.remove("k")


async def test_a_page_may_be_empty(gcs, url, monkeypatch):
    real = gcs_wire.Wire.page

    def page(self, permission, location, prefix, token, *, size, start=""):
        return ([], "0") if token is None else real(self, permission, location, prefix, token, size=size, start=start)

    async with open_blobs(url) as store:
        await store.put("k", stream(1), "t")
        monkeypatch.setattr(gcs_wire.Wire, "page", page)
        assert [one.key async for one in store.list()] == ["k"]


@pytest.mark.parametrize("at", [0, 3 * MIB])
async def test_a_read_that_breaks_off_is_transient(gcs, url, at):
    async with open_blobs(url) as store:
        assert await store.put("k", stream(20 * MIB), "t")
        gcs.break_at = at
        with pytest.raises(Transient):
            await content_of(store, "k")
        gcs.break_at = None
        assert len(await content_of(store, "k")) == 20 * MIB


async def test_silence_and_garbling_are_transient(gcs, url, monkeypatch):
    monkeypatch.setattr(gcs_wire, "TIMEOUT", (5.0, 1.0))
    async with open_blobs(url) as store, Proxy(gcs.url) as proxy:
        assert await store.put("k", stream(20 * MIB), "t")
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        async with open_blobs(url) as through:
            for fault in (proxy.hang, proxy.cut, lambda: proxy.corrupt(answers_only=True)):
                with pytest.raises(Transient):
                    await read_until(through, fault)
                proxy.restore()


async def read_until(store, fault):
    """Read all, with a fault from the first chunk on."""
    async with store.read("k") as blob:
        await anext(blob.chunks)
        fault()
        async for _ in blob.chunks:
            pass


async def test_what_is_garbled_on_its_way_there_is_not_written(gcs, url, monkeypatch):
    async with Proxy(gcs.url) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        async with open_blobs(url) as store:

            async def garbled():
                yield b"x" * 9 * MIB
                proxy.corrupt()
                yield b"x" * MIB

            with pytest.raises(AdapterError):
                await store.put("k", garbled(), "t")
    monkeypatch.undo()
    async with open_blobs(url) as store:
        assert not await store.exists("k")


async def test_a_store_that_is_away_is_transient(monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "127.0.0.1:9")
    async with open_blobs("gs://bucket/x") as store:
        for call in (store.exists("k"), store.put("k", stream(1), "t"), content_of(store, "k")):
            with pytest.raises(Transient):
                await call


async def test_sessions_of_failed_puts_are_ended(gcs, url):
    class Fault(Exception):
        pass

    async def failing():
        yield b"x" * 17 * MIB
        raise Fault

    async with open_blobs(url) as store:
        with pytest.raises(Fault):
            await store.put("k", failing(), "t")
        # Of this bucket: other tests leave some, with processes that they kill.
        assert url.split("/")[2] not in {session.bucket for session in gcs.sessions.values()}


@pytest.mark.parametrize("size", [10, 17 * MIB])
async def test_the_key_that_encrypts(gcs, url, size):
    key = "projects/p/locations/l/keyRings/r/cryptoKeys/k"
    async with open_blobs(f"{url}?kms_key_name={key}") as store:
        assert await store.put("k", stream(size), "application/jsonl")
    made = gcs.buckets[url.split("/")[2]]["prefix/k"]
    assert (made.kms_key, made.content_type) == (key, "application/jsonl")


async def test_no_credentials_are_denied(monkeypatch, tmp_path):
    for name in ("STORAGE_EMULATOR_HOST", "GOOGLE_CLOUD_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(Denied, match="finding credentials"):
        async with open_blobs("gs://bucket/x"):
            pass
