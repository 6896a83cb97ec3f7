"""SageMaker's notifications of what became of a request, to topics of their own: after its response, before its ack."""

import time
from collections.abc import Callable
from typing import Any

import structlog

from rejoinder.adapters import AdapterError, LeaseLost, Message, Outgoing, TooLarge, Topic
from rejoinder.schemas.sagemaker import MAX_CONTENT, Invocation, completed, failed, region_of
from rejoinder.schemas.wire import write_json
from rejoinder.worker import carrying
from rejoinder.worker.batcher import Batcher
from rejoinder.worker.content import LINES
from rejoinder.worker.handler import NO_OPTIONS, Answer, Job
from rejoinder.worker.inputs import Lines
from rejoinder.worker.reply import Outcome, Replier
from rejoinder.worker.retry import entry_until

log = structlog.get_logger(__name__)

JSON = "application/json"


class Notices:
    """Publishes one notification for each answer, to the topic for its kind if there is one.

    Like a response, a notification may come more than once, and while its broker is away it waits.

    Args:
        success: Where answers below 400 are told of.
        error: Where all others are.
        subscription: The name of the requests' subscription.
        endpoint_name: What notifications say of whom they are from.
        include_response: Whether they have the response in them, up to `MAX_CONTENT` bytes.
    """

    def __init__(
        self,
        success: Topic | None,
        error: Topic | None,
        *,
        subscription: str,
        endpoint_name: str,
        include_response: bool,
    ) -> None:
        self._sides = [None if topic is None else _Side(topic, subscription) for topic in (success, error)]
        self._endpoint_name = endpoint_name
        self._include = include_response

    async def tell(self, message: Message, answer: Answer, job: Job | None, wanted: Callable[[], bool]) -> None:
        """Tell of an answer that was published.

        Args:
            message: The request's delivery.
            answer: What was published.
            job: The request, where it could be started.
            wanted: Asked before each try whether it is still to be told.

        Raises:
            LeaseLost: it is not.
            AdapterError: the broker refuses for good (permission, topic gone).
        """
        side = self._sides[answer.status_code >= 400]
        if side is None:
            return
        options = NO_OPTIONS if job is None else job.options
        ended = time.time()
        invocation = Invocation(
            inference_id=answer.response_id,
            endpoint_name=self._endpoint_name,
            region=side.region,
            received_at=ended if message.sent_at is None else message.sent_at,
            ended_at=ended,
            input_location=None if job is None else job.input_location,
            content_type=options.content_type,
            accept=options.accept,
        )
        kind = LINES if job is not None and isinstance(job.body, Lines) else JSON
        outcome = await side.send(message, answer, _body(invocation, answer, kind, include=self._include), wanted)
        if isinstance(outcome, TooLarge) and self._include:
            outcome = await side.send(message, answer, _body(invocation, answer, kind, include=False), wanted)
        if isinstance(outcome, TooLarge | ValueError):
            # The response itself is published: what only tells of it must not bring the request back.
            log.error("notice_refused", message_id=message.id, response_id=answer.response_id, error=str(outcome))
        elif isinstance(outcome, AdapterError):
            raise outcome

    async def abort(self) -> None:
        """Publish nothing more. What is under way may or may not arrive."""
        for side in self._sides:
            if side is not None:
                await side.batcher.abort()


class _Side:
    """One of the two topics."""

    def __init__(self, topic: Topic, subscription: str) -> None:
        self.region = region_of(topic.name)
        self._subscription = subscription
        self.batcher: Batcher[Outgoing, Outcome] = Batcher(Replier(topic, subscription).send)

    async def send(self, message: Message, answer: Answer, body: bytes, wanted: Callable[[], bool]) -> Outcome:
        """Publish, for as long as the broker is away. Returns its id, or why it was not published."""
        attributes = {
            "request_message_id": carrying.attribute(message.id),
            "response_id": carrying.attribute(answer.response_id),
        }
        outgoing = Outgoing(body, attributes)

        async def one_try() -> Outcome:
            return await self.batcher.submit(outgoing) if wanted() else LeaseLost("the notice is not wanted any more")

        return await entry_until("publish notice", one_try)


def _body(invocation: Invocation, answer: Answer, content_type: str, *, include: bool) -> bytes:
    kept, content = answer.kept, None
    if include and answer.body is not None:
        text = write_json(answer.body).encode()
        content = text if len(text) <= MAX_CONTENT else None
    if answer.status_code < 400:
        location = answer.output_location if kept is None else kept.output_location
        return completed(invocation, content_type=content_type, output_location=location, content=content)
    location = None if kept is None else kept.failure_location
    return failed(invocation, answer.status_code, _reason(answer.body), failure_location=location, content=content)


def _reason(body: Any) -> str:
    """What a failure's body says."""
    error = body.get("error") if isinstance(body, dict) else None
    return str(error.get("message", "")) if isinstance(error, dict) else ""
