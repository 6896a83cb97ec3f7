"""The cancel marks of one store: looking for them, knowing them, and removing those that are done with.

Marks that no request needed lie there for a month, perhaps many thousand. So each second only what is new is listed, as
keys begin with the time at which they were left. Everything is listed beside that, at the start and then rarely: it
tells what others removed of the old ones, and finds what clocks that are far behind have left. Whatever goes wrong,
requests go on.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import structlog

from rejoinder.adapters import AdapterError, BlobStore, Transient
from rejoinder.adapters.cancel_marks import before, name_of
from rejoinder.adapters.driver import Listed
from rejoinder.worker.logs import places
from rejoinder.worker.retry import bounded, call_until

log = structlog.get_logger(__name__)

EVERY = 1.0
"""Seconds from the beginning of one listing to that of the next."""
DENIED_EVERY = 30.0
"""The same after a refusal for good, which somebody may cure while the worker runs."""
NEAR = 20.0
"""Seconds before the last listing's beginning whose marks are listed once more: a clock may be that far behind, and
leaving a mark may take that long."""
FAR = 600.0
"""The same for clocks that are far behind, as often as `RATE` allows."""
ALL_EVERY = 300.0
"""Seconds from the end of a listing of everything to the next, at least."""
RATE = 200.0
"""Marks a second that may be listed for nothing but clocks and what others removed. S3's client takes 0.1 ms of the
event loop's time for each: this is 2 % of it."""
BATCH = 1000
"""Marks that come before a listing is waited for anew: what one call brings."""
OLD = 32 * 86_400.0
"""The age of marks whose requests will not come any more: Pub/Sub keeps a message for 31 days at most, SQS for 14."""
SWEPT = 10_000
"""Old marks that are removed, one after the other, after a listing of everything, at most."""
REMOVALS = 16
"""Calls at once."""
REMOVE_LIMIT = 60.0
"""Seconds after which a mark is left to its age."""
LAST_SECONDS = 3.0
"""The same for all that are being removed when the worker ends."""


class Marks:
    """What is known of the marks in a store, 0.35 KB of memory for each.

    Args:
        store: The marks.
        learned: Called when `known` has become more.
    """

    def __init__(self, store: BlobStore, learned: Callable[[], None]) -> None:
        self._store = store
        self._learned = learned
        self.known: dict[str, Listed] = {}
        """The newest mark of each name."""
        self._others: dict[str, dict[str, Listed]] = {}
        """A name's other marks by their keys, if there are any."""
        self.paused = False
        """Whether nothing was looked for: others may have removed what is known."""
        self._since = dict.fromkeys((NEAR, FAR), time.time())
        """When the last listing began of those that go so far back."""
        self._found = {NEAR: set[str](), FAR: set[str]()}
        """What those listings found of marks, and, since the last that went far back, the others."""
        self._clock = asyncio.get_running_loop().time
        self._far_due = 0.0  # at once: the newest marks come last when everything is listed
        self._all_due = 0.0
        self._all: asyncio.Task[None] | None = None
        self._removed: set[str] = set()
        """Keys, since the listings that are under way began."""
        self._removing: dict[str, asyncio.Task[None]] = {}
        self._calls = asyncio.Semaphore(REMOVALS)
        self._ending = asyncio.Event()
        self._trouble: dict[str, str] = {}

    # ------------------------------------------------------------------ looking for marks

    async def look(self) -> float:
        """List what is new, and begin to list everything if it is time to. Returns seconds until to look again."""
        if not self._is_listing_all:
            self._removed.clear()
            if self._clock() >= self._all_due:
                self._all = asyncio.create_task(self._look_at_all())
        far = self._clock() >= self._far_due
        margin, began, found = FAR if far else NEAR, time.time(), set[str]()
        after = before(min(self._since[margin], began) - margin)  # this machine's clock may have been set back since
        try:
            count, _ = await self._list(after, found)
        except Exception as exc:  # noqa: BLE001 - whatever it is, requests go on
            return self._failed("list", exc)
        self._worked("list")
        for key in self._found[margin] - found:
            if key > after:
                self._lose(key)
        self._since[NEAR], self._found[NEAR] = began, found
        if not far:
            self._found[FAR] |= found
        else:
            self._since[FAR], self._found[FAR] = began, found
            self._far_due = self._clock() + count / RATE
        if not self._is_listing_all:
            self.paused = False
        return EVERY

    async def _look_at_all(self) -> None:
        """Learn of everything, forget what others have removed, and remove what is old."""
        began, found = self._clock(), set[str]()
        known = {one.key for one in self.known.values()}.union(*self._others.values())
        try:
            count, old = await self._list("", found)
        except Exception as exc:  # noqa: BLE001 - as above
            pause = self._failed("list all", exc)
            self._all_due = self._clock() + max(pause, self._clock() - began)
            return
        self._worked("list all")
        self._all_due = self._clock() + max(ALL_EVERY, count / RATE)
        for key in known - found:
            self._lose(key)
        try:
            for key in old:
                await bounded(self._store.remove(key))
        except Exception as exc:  # noqa: BLE001 - the next listing finds it again
            self._failed("remove", exc)

    @property
    def _is_listing_all(self) -> bool:
        return self._all is not None and not self._all.done()

    async def _list(self, after: str, found: set[str]) -> tuple[int, list[str]]:
        """Learn of the marks after that, and add their keys to `found`.

        Returns how many objects there are, and keys of old marks, at most `SWEPT`.
        """
        count, old, oldest = 0, list[str](), time.time() - OLD
        async with aclosing(self._store.list(after)) as listing:
            while some := await bounded(_next(listing)):
                count += len(some)
                learned = False
                for one in some:
                    if (name := name_of(one.key)) is None:
                        continue  # whatever it is, it is somebody else's
                    if one.modified >= oldest:
                        found.add(one.key)
                        learned |= self._learn(name, one)
                    elif len(old) < SWEPT:
                        old.append(one.key)
                if learned:
                    self._learned()
        return count, old

    def _learn(self, name: str, one: Listed) -> bool:
        """Whether that mark was not known."""
        newest = self.known.get(name)
        if one.key in self._removed or (newest is not None and one.key == newest.key):
            return False
        if newest is not None:
            others = self._others.setdefault(name, {})
            if one.key in others:
                return False
            if one.modified < newest.modified:
                others[one.key] = one
                return True
            others[newest.key] = newest
        self.known[name] = one
        return True

    def _lose(self, key: str) -> None:
        """Forget a mark that is gone, if it is known: somebody else has removed it."""
        name = name_of(key) or ""
        newest, others = self.known.get(name), self._others.get(name, {})
        if newest is None or newest.key != key:
            others.pop(key, None)
        elif others:
            self.known[name] = others.pop(max(others, key=lambda one: others[one].modified))
        else:
            self._forget(name)

    def _forget(self, name: str) -> None:
        self.known.pop(name, None)
        self._others.pop(name, None)

    # ------------------------------------------------------------------ marks that are done with

    def remove(self, name: str, linger: float) -> None:
        """Remove all marks of a name, `linger` seconds from now or as the worker ends."""
        if name not in self._removing:
            self._removing[name] = asyncio.create_task(self._remove_after(name, linger))

    async def _remove_after(self, name: str, linger: float) -> None:
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(linger):
                    await self._ending.wait()
            newest = self.known.get(name)
            for key in () if newest is None else (newest.key, *self._others.get(name, ())):
                async with self._calls:
                    await self._remove(key)
            # One that has come meanwhile is listed again.
            self._forget(name)
        except Exception as exc:  # noqa: BLE001 - what it is for has been answered
            self._failed("remove", exc)
        finally:
            del self._removing[name]

    async def _remove(self, key: str) -> None:
        await call_until("remove cancel mark", lambda: bounded(self._store.remove(key)), limit=REMOVE_LIMIT)
        self._removed.add(key)
        self._worked("remove")

    async def close(self) -> None:
        """Remove what is to be removed, for a little while. Nothing is held any more."""
        self._ending.set()
        late = set(self._removing.values())
        if late:
            _, late = await asyncio.wait(late, timeout=LAST_SECONDS)
        if self._all is not None:
            late.add(self._all)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late)

    # ------------------------------------------------------------------ what goes wrong

    def _failed(self, call: str, exc: Exception) -> float:
        """Say once what is wrong with a kind of call, and again only when something else is.

        Returns after how many seconds to try again.
        """
        kind = type(exc).__name__
        if self._trouble.get(call) != kind:
            self._trouble[call] = kind
            error = {"error": str(exc)} if isinstance(exc, AdapterError) else {"where": places(exc)}
            log.warning("cancel_marks_trouble", call=call, store=self._store.url, error_type=kind, **error)
        return EVERY if isinstance(exc, Transient) else DENIED_EVERY

    def _worked(self, call: str) -> None:
        if self._trouble.pop(call, None) is not None:
            log.info("cancel_marks_again", call=call, store=self._store.url)


async def _next(listing: AsyncGenerator[Listed, None]) -> list[Listed]:
    """The next objects of a listing, `BATCH` at most; none at its end."""
    some: list[Listed] = []
    async for one in listing:
        some.append(one)
        if len(some) == BATCH:
            break
    return some
