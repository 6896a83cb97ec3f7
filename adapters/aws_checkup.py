"""What the checkups of SQS and SNS share: calls that are meant to be refused, and what it means to get nowhere."""

import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from rejoinder.adapters import aws_errors
from rejoinder.adapters.aws import Connections, Traffic
from rejoinder.adapters.checkup import CALL_SECONDS, Finding, ask, fail, ok, unknown
from rejoinder.adapters.errors import AdapterError, Denied, NotFound, Transient

ASKING: Final = Traffic(4, CALL_SECONDS)
Call = Callable[[Any], Awaitable[Any]]


async def probe(connections: Connections[Any], check: str, action: str, arn: str, call: Call) -> Finding:
    """Make a call that changes nothing since nothing in it is valid, and see whether it is refused for who calls.

    A batch whose entries fail one by one has passed authorization as a whole. Where a call fails as a whole over its
    parameters, it is nowhere promised that the permission was looked at first.
    """
    try:
        await ask(connections.run(action, arn, call))
    except Denied as exc:
        return fail(
            check,
            str(exc),
            f"allow {action} on {arn} to this role or user (from another account, in the resource's policy too)",
        )
    except Transient as exc:
        return unknown(check, str(exc))
    except AdapterError:
        fact = f"{action} was not refused, but only using it proves that it is allowed"
        return unknown(check, fact, f"the policy needs {action} on {arn}")
    return ok(check, f"{action} is allowed")


def unreachable(exc: AdapterError, service: str, action: str, create: str) -> Finding:
    """Say what to do where the first call failed. `create` makes what was not found."""
    if isinstance(exc, NotFound):
        return fail("reachable", str(exc), f"check name, account and region, or make it: {create}")
    if isinstance(exc, Denied) and aws_errors.is_forbidden(exc):
        return fail(f"permission to look ({action})", str(exc), f"allow {action}: without, its settings are not known")
    if isinstance(exc, Denied):
        return fail(
            "credentials", str(exc), "`aws sts get-caller-identity` shows what they are; AWS_PROFILE, `aws sso login`"
        )
    endpoint = endpoint_of(service)
    where = (
        f"is it running, and is the endpoint right? It is set to {endpoint}"
        if endpoint
        else "is there a way to the network, and is the region right?"
    )
    return fail("reachable", str(exc), where)


def endpoint_of(service: str) -> str | None:
    """Return the endpoint that the environment names for `service` (`sqs`, `sns`)."""
    return os.environ.get(f"AWS_ENDPOINT_URL_{service.upper()}") or os.environ.get("AWS_ENDPOINT_URL")


def reached(what: str, service: str) -> Finding:
    """Say that the first call was answered."""
    endpoint = endpoint_of(service)
    return ok("reachable", f"{what} at {endpoint}" if endpoint else what)


def encryption(attributes: Mapping[str, str], actions: str) -> list[Finding]:
    """Judge the encryption of a queue or topic; `actions` are what its key must allow."""
    key = attributes.get("KmsMasterKeyId")
    if key:
        fact = f"with the KMS key {key}, which must allow {actions}: that cannot be seen from here"
        return [unknown("encryption", fact, f"allow {actions} on the key, in its policy and in the role's")]
    return []
