"""The contract of a broker's and of a store's adapter, in words and types. `tests/conformance` executes all of it.

All times are seconds, all sizes bytes. Adapters carry bytes and never look inside them. They never retry and never
log; an error is one of `rejoinder.adapters.errors`. No call blocks the event loop. All methods may be called
concurrently from tasks of the one event loop on which the adapter was opened.
"""

from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol

from rejoinder.adapters.errors import AdapterError


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """One delivery of one message. A redelivery is another `Message` with the same `id`."""

    id: str
    """The broker's id of the message: the same on every delivery, unique in its subscription for ever."""
    body: bytes
    attributes: Mapping[str, str]
    attempt: int | None
    """This delivery's number, from 1; None where the broker does not count."""
    sent_at: float | None
    """When the broker took the message, seconds since the epoch; None where the broker does not say."""
    lease: object
    """The adapter's handle of this delivery, opaque to everyone else."""
    ordering_key: str | None = None
    """What the sender gave as `Outgoing.ordering_key`; None where it gave none or the broker does not carry it."""
    stored_at: str | None = None
    """Where the body is, such as `s3://bucket/key`, if the message is only a pointer to it; `body` is empty then."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One message to publish."""

    body: bytes
    attributes: Mapping[str, str] = field(default_factory=dict)
    """At most 9. Names of 1 to 200 ASCII letters, digits, `_`, `-` and `.`; values of 1 to 1,024 bytes of UTF-8,
    without control characters but tab and newline. `publish` raises ValueError for what its broker cannot carry, such
    as, on some, neither body nor attributes."""
    ordering_key: str | None = None
    """Messages of one key are delivered in the order of publishing, where the broker can: Pub/Sub's ordering key, SQS's
    message group (on a standard queue, the tenant of fair queues). 1 to 128 printable ASCII characters."""
    deduplication_id: str | None = None
    """Another message with the same one is the same message. Brokers that know no such thing deliver both."""
    stored_at: str | None = None
    """Where the body is, such as `s3://bucket/key`, if the message is only a pointer to it, as `Message.stored_at`:
    `body` is empty then. Only SQS carries such a pointer; `publish` of every other broker raises ValueError."""
    stored_size: int = 0
    """How many bytes are stored there."""


NO_POINTERS = "only awssqs:// carries a message whose body is stored elsewhere (stored_at)"
"""The ValueError of every other broker's `publish`."""


@dataclass(frozen=True, slots=True)
class Backlog:
    """How much a subscription holds, as far as its broker says. None: it does not say."""

    waiting: int | None
    """Messages that can be received now."""
    held: int | None
    """Messages that are leased or delayed."""
    dead: int | None = None
    """Messages in the dead-letter queue; None where there is none or it cannot be asked."""


class Subscription(Protocol):
    """Where requests come from: messages are received under a lease and settled, or they come back."""

    @property
    def name(self) -> str:
        """What identifies the subscription: the same for every process and every spelling of its URL's options."""

    @property
    def lease_seconds(self) -> float:
        """How long a received message is hidden from everybody else before it must be renewed."""

    @property
    def max_attempts(self) -> int | None:
        """After how many deliveries the broker's dead-letter policy takes a message away; None without a policy."""

    @property
    def max_receive(self) -> int:
        """The most messages that one `receive` returns. Who wants more at once calls it several times at once."""

    @property
    def keeps_order(self) -> bool:
        """Whether messages of one ordering key come in order, and must therefore be settled in order.

        They do so over several receives under way at once, too: the one that returns first has the earlier ones.
        If one is let go, those of its key that were received after it are to be let go too, unsettled, or they would
        overtake it.
        """

    async def receive(self, limit: int, wait: float) -> list[Message]:
        """Lease up to `limit` messages (at least 1), oldest available first.

        Returns as soon as there is any message, without waiting for `limit`; an empty list after `wait` seconds
        without one. May return fewer than there are, by the size of their bodies: what one receive can hold in memory
        is bounded by the adapter, and it is at least one message.

        Until its lease ends, a message is received by nobody else. When the lease ends without an ack, the message
        becomes available again with `attempt` one higher. A message delivered `max_attempts` times is not delivered
        again: it moves to the dead-letter queue, body and attributes unchanged; some brokers add attributes of theirs.

        Cancelling `receive` loses nothing: what was leased for it is let go, as soon as the broker tells of it. Closing
        the subscription waits for that.

        Raises:
            ValueError: `limit` is below 1.
            Transient, Denied, NotFound: as their names say.
        """

    async def ack(self, messages: Sequence[Message]) -> list[AdapterError | None]:
        """Settle: the messages are never delivered again. One outcome for each, in order, None for success.

        A lease that has ended but has passed to nobody else can still be acked, except on SQS FIFO queues, which take
        the end for the loss. `LeaseLost` if another delivery has happened since, or the message is gone. One failed
        entry does not fail the others.
        """

    async def set_lease(self, messages: Sequence[Message], seconds: float) -> list[AdapterError | None]:
        """Let the lease of each end `seconds` from now: renew (> 0), nack (0), delayed nack (> 0, then let go).

        One outcome for each, in order, None for success; `LeaseLost` as in `ack`. With 0 the message is available
        at once. Setting the lease does not change `attempt`; the next delivery does.

        Raises:
            ValueError: `seconds` is negative or more than the broker can hold (`max_lease_seconds`).
        """

    @property
    def max_lease_seconds(self) -> float:
        """The longest lease that `set_lease` accepts."""

    @property
    def max_hold_seconds(self) -> float:
        """How long after its receipt a message can be held at all, however often renewed; infinity where for ever.

        A lease that `set_lease` would let end later ends then.
        """

    async def backlog(self) -> Backlog:
        """Count what is waiting, held and dead, as far as the broker says. May be approximate.

        Raises:
            Transient, Denied, NotFound: the subscription cannot be reached, also where nothing is counted.
        """


class Topic(Protocol):
    """Where responses go."""

    @property
    def name(self) -> str:
        """What identifies the topic: the same for every process and every spelling of its URL's options."""

    @property
    def max_body(self) -> int:
        """The largest body that `publish` takes."""

    @property
    def max_keys(self) -> int:
        """How many messages, each of an ordering key of its own, the broker takes in one call.

        `publish` sends more of them in several calls, and returns when the slowest of these has.
        """

    async def publish(self, batch: Sequence[Outgoing]) -> list[str | AdapterError]:
        """Make each message durable. One outcome for each, in order: its broker id, or what went wrong.

        A returned id means that the message survives the death of this process and, where the broker promises so, of
        the machine. `TooLarge` for a body above `max_body`, `Refused` for what the broker finds wrong with a message
        by rules of its own, such as a topic's schema. Messages that share an `ordering_key` are delivered in the order
        of publishing where the broker can. One failed entry does not fail the others. If the call itself
        raises or is cancelled, each message may or may not have been published.
        """


@dataclass(frozen=True, slots=True)
class Blob:
    """An object that is being read."""

    size: int
    content_type: str | None
    """None where the store does not keep one."""
    chunks: AsyncIterator[bytes]
    """The object's bytes, in pieces of at most some MiB. Raises as `BlobStore.read`."""


@dataclass(frozen=True, slots=True)
class Listed:
    """An object that `BlobStore.list` found."""

    key: str
    modified: float
    """When it was written, seconds since the epoch by the store's clock; some stores keep whole seconds."""


class BlobStore(Protocol):
    """Objects below one prefix of a bucket or one directory, each written once. Keys are relative to it.

    A key is 1 to 1,024 bytes of UTF-8 in parts between slashes, none of which is empty, `.` or `..`, without control
    characters: ValueError for any other. What a link inside a directory points to outside of it is `Denied`.
    """

    @property
    def url(self) -> str:
        """The store's own URL, without options and without a slash at its end."""

    def location(self, key: str) -> str:
        """The URL of an object, such as `s3://bucket/prefix/key`: the key's characters stand as they are."""

    def read(self, key: str) -> AbstractAsyncContextManager[Blob]:
        """Open an object. Holds no more of it in memory than some chunks, however slowly it is read.

        Raises:
            NotFound: there is no such object, or no such store.
            Denied: the credentials do not allow it.
            Transient: the store is away, busy, or broke off in the middle.
        """

    async def put(self, key: str, chunks: AsyncIterable[bytes], content_type: str) -> bool:
        """Write an object unless there is one: True if it was written, False if another stands there, unchanged.

        Durable when this returns. Until then, nobody can read any of it: not while it is written, not when `chunks`
        raises, not after a cancellation or the death of this process. What such a death leaves behind in the store is
        removed by the next `put` of the same key. Holds some parts of it in memory, whatever its length.

        Raises:
            NotFound, Denied, Transient: as their names say. After Transient it may or may not have been written.
            TooLarge: it is longer than the store takes.
            Whatever `chunks` raises.
        """

    async def exists(self, key: str) -> bool:
        """Whether an object stands there. Raises as `read`, but for an object that is not there."""

    async def remove(self, key: str) -> None:
        """Remove an object; that none stands there is no error. The key may be put again.

        Durable when this returns. Who is reading the object reads on, or gets `Transient`.

        Raises:
            NotFound, Denied, Transient: as their names say; NotFound is a store that is not there, where it can be.
        """

    def list(self, after: str = "") -> AsyncGenerator[Listed, None]:
        """The objects whose keys are greater than `after`, in any order, and no more in memory than some thousand.

        Keys are compared by code points, which is by their bytes of UTF-8. `after` is a key or what one may begin with;
        nothing is left out with "". An object that is not after it costs nothing, or on `file://` to read its name.

        Each that stands from the beginning of the listing to its end comes once. One that is put or removed meanwhile
        may come or not. What stands below the prefix under a name that is no key is left out. A directory that is not
        there has no objects.

        Raises:
            NotFound, Denied, Transient: as `remove`, at any step.
        """
