"""Reading what workers have stored."""

from rejoinder.adapters import open_blobs


async def content(url: str, key: str) -> bytes:
    """An object's bytes; `url` names its store."""
    async with open_blobs(url) as store, store.read(key) as blob:
        return b"".join([chunk async for chunk in blob.chunks])


async def content_at(location: str) -> bytes:
    """The bytes of the object that a response's location names."""
    url, _, key = location.rpartition("/")
    return await content(url, key)
