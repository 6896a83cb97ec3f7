"""What can be found out about a Pub/Sub subscription or topic without pulling or publishing."""

import os
from contextlib import AsyncExitStack
from typing import Any

import grpc
from google.iam.v1.iam_policy_pb2 import TestIamPermissionsRequest, TestIamPermissionsResponse
from google.pubsub_v1.types import pubsub as types

from rejoinder.adapters.checkup import CALL_SECONDS, Checkup, Finding, ask, fail, ok, unknown
from rejoinder.adapters.errors import AdapterError, Denied, NotFound, Transient
from rejoinder.adapters.pubsub import parse
from rejoinder.adapters.pubsub_policies import subscription_policies, topic_policies, undeliverable
from rejoinder.adapters.pubsub_topic import MAX_BODY
from rejoinder.adapters.pubsub_wire import (
    EMULATOR,
    GET_SUBSCRIPTION,
    GET_TOPIC,
    GetSubscriptionRequest,
    GetTopicRequest,
    Method,
    cause,
    connect,
)

ListRequest: Any = types.ListTopicSubscriptionsRequest.pb()
ListResponse: Any = types.ListTopicSubscriptionsResponse.pb()
LIST = Method("/google.pubsub.v1.Publisher/ListTopicSubscriptions", ListRequest, ListResponse, "topic")
TEST = Method(
    "/google.iam.v1.IAMPolicy/TestIamPermissions", TestIamPermissionsRequest, TestIamPermissionsResponse, "resource"
)
READ = "roles/pubsub.viewer on the subscription (pubsub.subscriptions.get)"
READ_TOPIC = "roles/pubsub.viewer on the topic (pubsub.topics.get)"
SHOWN = 3
ROLES = {
    "pubsub.subscriptions.consume": ("permission to receive, renew and acknowledge", "roles/pubsub.subscriber"),
    "pubsub.topics.publish": ("permission to publish", "roles/pubsub.publisher"),
}


class Service:
    """Asks the service one thing at a time, each within `CALL_SECONDS`."""

    ready = False
    """Whether there are credentials."""

    def __init__(self, endpoint: str | None, stack: AsyncExitStack) -> None:
        self._endpoint = endpoint
        self._stack = stack

    async def open(self) -> None:
        """Find credentials, and prepare the connection. Raises Denied, Transient."""
        connection = await ask(connect(self._endpoint))
        self._stack.push_async_callback(connection.close)
        self._channel = connection.channel()
        self.ready = True

    async def call(self, method: Method, request: Any, resource: str, permission: str = "") -> Any:
        """Make one call. Raises AdapterError."""
        return await ask(self._channel.call(method, resource, permission)(request, CALL_SECONDS))

    async def permitted(self, kind: str, resource: str, *permissions: str) -> list[Finding]:
        """Say which of `permissions` there are; `kind` is how gcloud calls what `resource` is."""
        try:
            request = TestIamPermissionsRequest(resource=resource, permissions=permissions)
            answer = await self.call(TEST, request, resource)
        except AdapterError as exc:
            if cause(exc) is grpc.StatusCode.UNIMPLEMENTED:
                return [unknown("permissions", "not here: the emulator has no IAM")]
            return [unknown("permissions", f"cannot be asked: {exc}", f"it needs {', '.join(permissions)}")]
        return [_permission(one, one in answer.permissions, kind, resource) for one in permissions]

    async def subscriptions(self, topic: str) -> list[str]:
        """Return what is subscribed to `topic`, or the first of it. Raises AdapterError."""
        answer = await self.call(LIST, ListRequest(topic=topic, page_size=10), topic, READ_TOPIC)
        return list(answer.subscriptions)


def _permission(name: str, there: bool, kind: str, resource: str) -> Finding:
    check, role = ROLES[name]
    if there:
        return ok(check, name)
    _, project, _, short = resource.split("/")
    member = f"--member=serviceAccount:NAME@{project}.iam.gserviceaccount.com"
    grant = f"gcloud pubsub {kind} add-iam-policy-binding {short} --project={project} {member} --role={role}"
    return fail(check, f"{name} is missing", grant)


async def check_subscription(url: str) -> Checkup:
    """See `rejoinder.adapters.urls.check_subscription`."""
    resource, endpoint = parse(url, "subscriptions")
    async with AsyncExitStack() as stack:
        service = Service(endpoint, stack)
        try:
            await service.open()
            info = await service.call(GET_SUBSCRIPTION, GetSubscriptionRequest(subscription=resource), resource, READ)
        except AdapterError as exc:
            return Checkup([_unreachable(exc, resource)])
        found = [undeliverable(info, resource) or ok("reachable", f"{resource} of {info.topic}")]
        found += await service.permitted("subscriptions", resource, "pubsub.subscriptions.consume")
        found += subscription_policies(info, resource)
        if dead := info.dead_letter_policy.dead_letter_topic:
            lost = "what is moved there is lost: nothing is subscribed to it"
            found += await _subscribed(service, dead, "dead-letter topic", lost)
        count = "see num_undelivered_messages of the subscription in Cloud Monitoring"
        found.append(unknown("messages", "Pub/Sub does not tell subscribers how many wait", count))
        attempts = info.dead_letter_policy.max_delivery_attempts or None
        return Checkup(found, frozenset({info.topic}), attempts, max_body=MAX_BODY)


async def check_topic(url: str) -> Checkup:
    """See `rejoinder.adapters.urls.check_topic`."""
    resource, endpoint = parse(url, "topics")
    async with AsyncExitStack() as stack:
        service = Service(endpoint, stack)
        try:
            await service.open()
            info = await service.call(GET_TOPIC, GetTopicRequest(topic=resource), resource, READ_TOPIC)
            found = [ok("reachable", resource), *topic_policies(info)]
        except Denied as exc:
            if not service.ready:
                return Checkup([_unreachable(exc, resource)])
            # Whoever may publish need not be allowed to look.
            found = [unknown("reachable", "these credentials may not look at the topic", f"grant {READ_TOPIC}")]
        except AdapterError as exc:
            return Checkup([_unreachable(exc, resource)])
        found += await service.permitted("topics", resource, "pubsub.topics.publish")
        lost = "responses are lost: nothing is subscribed to it"
        found += await _subscribed(service, resource, "subscriptions", lost)
        found.append(ok("size limit", f"{MAX_BODY} bytes"))
        return Checkup(found, frozenset({resource}), max_body=MAX_BODY)


def _unreachable(exc: AdapterError, resource: str) -> Finding:
    _, project, collection, name = resource.split("/")
    todo = "see the error"
    if isinstance(exc, NotFound):
        topic = " --topic=TOPIC --ack-deadline=60 --expiration-period=never" if collection == "subscriptions" else ""
        make = f"gcloud pubsub {collection} create {name} --project={project}{topic}"
        todo = f"check the name and project, or make it: {make}"
    elif isinstance(exc, Denied):
        todo = "gcloud auth application-default login, or GOOGLE_APPLICATION_CREDENTIALS; with the role that is named"
    elif isinstance(exc, Transient):
        emulator = os.environ.get(EMULATOR)
        todo = f"is the emulator running at {EMULATOR}={emulator}?" if emulator else "is there a way to the network?"
    return fail("reachable", str(exc), todo)


async def _subscribed(service: Service, topic: str, check: str, lost: str) -> list[Finding]:
    """Say whether anything is subscribed to `topic`: without, what is published to it is gone."""
    _, project, _, name = topic.split("/")
    make = f"gcloud pubsub subscriptions create {name} --project={project} --topic={name} --expiration-period=never"
    try:
        subscriptions = await service.subscriptions(topic)
    except NotFound:
        todo = f"gcloud pubsub topics create {name} --project={project}, and {make}"
        return [fail(check, f"{topic} is not there", todo)]
    except AdapterError as exc:
        return [unknown(check, f"{topic} cannot be looked at: {exc}", "it needs a subscription")]
    if not subscriptions:
        return [fail(check, f"{topic}: {lost}", make)]
    return [ok(check, f"{topic} has {', '.join(subscriptions[:SHOWN])}{' ...' if len(subscriptions) > SHOWN else ''}")]
