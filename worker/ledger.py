"""Every response under its name, so that a request that comes again is answered without being run again."""

import json
from typing import Any

import structlog

from rejoinder.adapters.driver import BlobStore
from rejoinder.schemas.envelope import response_head
from rejoinder.schemas.reading import MAX_DIGITS
from rejoinder.schemas.wire import peek_metadata
from rejoinder.worker.handler import Answer, Kept, Source
from rejoinder.worker.storing import put_once, read_whole

log = structlog.get_logger(__name__)


class Ledger:
    """The responses in one store, each written once: whoever is first decides what everybody publishes."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store

    async def read(self, key: str) -> bytes | None:
        """The response that stands under a name; None where none does."""
        return await read_whole("read ledger", self._store, key)

    async def put(self, key: str, wire: bytes) -> bytes:
        """Write a response unless one stands there; return the one that stands.

        Raises:
            AdapterError: the store refuses for good.
        """
        while not await put_once("write ledger", self._store, key, wire, "application/json"):
            if (stored := await self.read(key)) is not None:
                return stored
            # It was removed in between, as by a rule on the age of objects.
        return wire


def stored_answer(stored: bytes, metadata: str | None, response_id: str, source: Source) -> Answer | None:
    """The answer that a stored response is. None, and a line in the log, where it is no response.

    Args:
        stored: The response's bytes, as this program wrote them.
        metadata: Of the request that is answered. It is put in place of the stored response's own where they differ:
            two requests that share an `inference_id` have one answer, and each gets its own metadata back.
        response_id: Names the answer.
        source: Where it stood.
    """
    try:
        response: dict[str, Any] = json.loads(stored, parse_int=_int)
        status: int = response["status_code"]
        theirs = response_head(status, peek_metadata(stored, len(stored))).encode()
        if not stored.startswith(theirs):
            raise ValueError("it does not begin as a response does")
        wire = response_head(status, metadata).encode() + stored[len(theirs) :]
        locations = {name: response.get(name) for name in ("output_location", "failure_location")}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        log.error("stored_response_unreadable", response_id=response_id, source=source, error=str(exc))
        return None
    kept = Kept(wire, **locations, source=source)
    stream = response.get("stream")
    return Answer(status, metadata, response.get("body"), response_id, kept=kept, stream=stream)


def _int(text: str) -> int | str:
    # Those of metadata may have any length, and only their text is needed.
    return int(text) if len(text) <= MAX_DIGITS else text
