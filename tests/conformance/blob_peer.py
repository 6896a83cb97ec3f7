"""Another process that puts and never ends: `blob_peer.py URL KEY SIZE`. It says so when SIZE bytes were taken."""

import asyncio
import sys

from rejoinder.adapters import open_blobs


async def main(url, key, size):
    async def chunks():
        for _ in range(int(size) >> 16):
            yield b"half" * (1 << 14)
        sys.stdout.write("taken\n")
        sys.stdout.flush()
        await asyncio.Event().wait()

    async with open_blobs(url) as store:
        await store.put(key, chunks(), "text/plain")


asyncio.run(main(*sys.argv[1:]))
