"""From an answer to a durable response."""

from collections.abc import Callable, Sequence

import structlog

from rejoinder.adapters import AdapterError, LeaseLost, Message, Outgoing, TooLarge, Topic, Transient
from rejoinder.schemas.envelope import NOTHING, Beside, write_response
from rejoinder.schemas.errors import ErrorBody, ErrorDetail
from rejoinder.worker import carrying
from rejoinder.worker.batcher import Batcher
from rejoinder.worker.errors import NotGiven
from rejoinder.worker.handler import Answer, in_place_of, response_id, without_chunk
from rejoinder.worker.retry import bounded, entry_until

log = structlog.get_logger(__name__)

Outcome = str | AdapterError | ValueError
"""Of publishing one response: its broker id, or what went wrong. A ValueError says that the broker cannot carry it."""


# Messages in calls that are as full as they can be, at once. A call to a service takes some tens of milliseconds: these
# are some thousand a second, about as many as an event loop makes of single calls. Of the 100 calls that a connection
# to Google carries, and the 16 connections to SQS, they leave others some; what is more than all waits in the client.
UNDER_WAY = 64


class Replier:
    """Publishes answers. While the response broker is away, it waits and tries again.

    Args:
        topic: Where the answers go.
        subscription: The name of the requests' subscription: half of what tells one request from all others.
    """

    def __init__(self, topic: Topic, subscription: str) -> None:
        self.max_keys = topic.max_keys
        """What of one `send` the topic takes in one call, where each has an ordering key of its own."""
        self.calls = max(2, UNDER_WAY // topic.max_keys)
        """How many such calls may be under way at once."""
        self._topic = topic
        self._subscription = subscription
        self._again: Batcher[Outgoing, Outcome] = Batcher(self.send)

    async def publish_again(
        self, message: Message, answer: Answer, failure: AdapterError | ValueError | None, wanted: Callable[[], bool]
    ) -> None:
        """Make an answer durable that could not be published at first. When it returns, the message may be acked.

        Args:
            message: The request's delivery.
            answer: What to publish.
            failure: The outcome of the first try; None: there was none.
            wanted: Asked before each further try whether the answer is still to be given.

        Raises:
            LeaseLost: it is not wanted any more; it was not published, or not that one knows.
            ValueError: the broker cannot carry even an error in its place.
            AdapterError: the broker refuses the response for good (permission, topic gone).
        """
        outcome: Outcome | None = failure
        if outcome is None or isinstance(outcome, Transient):
            outcome = await self._submit(message, answer, wanted, first=outcome)
        if isinstance(outcome, TooLarge):
            log.error("response_too_large", message_id=message.id, response_id=answer.response_id, error=str(outcome))
            outcome = await self._submit(message, _too_large(answer, str(outcome)), wanted)
        if isinstance(outcome, TooLarge):
            # The sender's metadata alone is too large for the response broker: response_id still names the request.
            outcome = await self._submit(message, _too_large(answer, str(outcome), bare=True), wanted)
        if isinstance(outcome, ValueError):
            log.error("response_not_carried", message_id=message.id, response_id=answer.response_id, error=str(outcome))
            outcome = await self._submit(message, _not_carried(answer), wanted)
        if isinstance(outcome, AdapterError | ValueError):
            raise outcome

    async def abort(self) -> None:
        """Publish nothing more. What is under way may or may not arrive."""
        await self._again.abort()

    async def _submit(
        self, message: Message, answer: Answer, wanted: Callable[[], bool], *, first: Transient | None = None
    ) -> Outcome:
        outgoing = self.outgoing(message, answer)
        known: list[Outcome] = [] if first is None else [first]

        async def one_try() -> Outcome:
            if known:
                return known.pop()
            return await self._again.submit(outgoing) if wanted() else LeaseLost("the answer is not wanted any more")

        return await entry_until("publish", one_try)

    async def send(self, batch: Sequence[Outgoing]) -> list[Outcome]:
        """Publish once. Returns one outcome for each.

        Raises:
            AdapterError: the broker refuses all of them for good (permission, topic gone).
        """
        try:
            return [*await bounded(self._topic.publish(batch))]
        except Transient as exc:
            return [exc] * len(batch)
        except ValueError as exc:
            if len(batch) == 1:
                return [exc]
        # One of them cannot be carried: each by itself, so that it fails alone.
        return [outcome for outgoing in batch for outcome in await self.send([outgoing])]

    def outgoing(self, message: Message, answer: Answer) -> Outgoing:
        """The answer to `message` as it is published. One whose body is no JSON becomes an error."""
        attributes = _attributes(message, answer.response_id)
        kept = answer.kept
        body = written(message, answer)[1] if kept is None else kept.wire
        key = message.ordering_key
        if key is None and answer.stream is not None:
            key = answer.response_id
        key = None if key is None else carrying.name(key)
        # Of the message, not of an inference_id: two requests that share one are both answered.
        own = answer.named_by_message
        identity = answer.response_id if own else response_id(self._subscription, message.id, None)
        if kept is not None and kept.pointer is not None:
            size = len(body)
            return Outgoing(b"", attributes, key, identity, stored_at=kept.pointer, stored_size=size)
        return Outgoing(body, attributes, ordering_key=key, deduplication_id=identity)

    def addressed(self, message: Message, name: str) -> Outgoing:
        """What the messages of a stream have in common: without a body, and with what their deduplication ids begin by.

        Args:
            message: The request's delivery.
            name: The response id.
        """
        key = carrying.name(message.ordering_key or name)
        return Outgoing(b"", _attributes(message, name), key, response_id(self._subscription, message.id, None))


def _attributes(message: Message, name: str) -> dict[str, str]:
    attributes = {"request_message_id": carrying.attribute(message.id), "response_id": carrying.attribute(name)}
    if message.attempt is not None:
        attributes["attempt"] = str(message.attempt)
    if traceparent := carrying.traceparent(message.attributes.get("traceparent")):
        attributes["traceparent"] = traceparent
    return attributes


def written(message: Message, answer: Answer) -> tuple[Answer, bytes]:
    """An answer and its response's bytes: those of an error where the engine's result is no JSON, such as NaN."""
    try:
        return answer, write_response(answer.status_code, answer.metadata, answer.body, beside(answer))
    except (ValueError, TypeError) as exc:
        log.error("result_not_json", message_id=message.id, response_id=answer.response_id, error=str(exc))
        error = NotGiven(f"the result cannot be written as JSON: {exc}")
        answer = in_place_of(answer, error)
        return answer, write_response(500, answer.metadata, answer.body, beside(answer))


def beside(answer: Answer, **locations: str | None) -> Beside:
    """What an answer's response has beside its body; `locations` are where it is stored."""
    if not locations and answer.headers is None and answer.stream is None:
        return NOTHING
    return Beside(headers=answer.headers, stream=answer.stream, **locations)


def _not_carried(answer: Answer) -> Answer:
    detail = ErrorDetail(message="the response cannot be carried by its broker", type="engine_error")
    return Answer(500, None, ErrorBody.of(detail), answer.response_id, stream=without_chunk(answer))


def _too_large(answer: Answer, reason: str, *, bare: bool = False) -> Answer:
    detail = ErrorDetail(
        message=f"the response is too large for its broker: {reason}", type="engine_error", code="response_too_large"
    )
    metadata = None if bare else answer.metadata
    return Answer(500, metadata, ErrorBody.of(detail), answer.response_id, stream=without_chunk(answer))
