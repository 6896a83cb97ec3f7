"""What `rejoinder doctor` says of the worker's settings against its queue, and of two queues together."""

from collections.abc import Iterator

from rejoinder.adapters import Checkup, Finding
from rejoinder.worker.settings import Settings


def check_worker(settings: Settings, requests: Checkup) -> Iterator[Finding]:
    """Compare what the worker is set to with what its queue of requests allows."""
    if requests.max_attempts is not None:
        yield _attempts(settings.max_attempts, requests.max_attempts)
    if requests.max_hold is not None and requests.max_hold < settings.max_hold_seconds:
        fact = f"max_hold_seconds is {settings.max_hold_seconds:g}, and the queue lets go after {requests.max_hold:g} s"
        yield Finding("hold limit", "fail", fact, f"set --max-hold-seconds to {requests.max_hold * 0.97:.0f} or less")
    if requests.max_body is not None and settings.max_request_bytes < requests.max_body:
        fact = f"requests over {settings.max_request_bytes} bytes are answered 413; the queue takes {requests.max_body}"
        yield Finding("size of requests", "ok", fact)


def _attempts(own: int, queue: int) -> Finding:
    fact = f"max_attempts is {own}, and the queue's policy takes a request away after {queue} deliveries"
    if queue < own:
        return Finding("attempts", "advice", fact, f"let the queue allow {own} or more, or set --max-attempts {queue}")
    return Finding("attempts", "ok", fact)


def check_pair(settings: Settings, requests: Checkup, responses: Checkup) -> Iterator[Finding]:
    """Compare where requests come from with where responses go."""
    if same := requests.ends & responses.ends:
        fact = f"responses arrive where requests come from ({', '.join(sorted(same))}): answers are taken for requests"
        yield Finding("different queues", "fail", fact, "name another queue or topic for the responses")
    elif requests.ends and responses.ends:
        yield Finding("different queues", "ok", "responses go elsewhere than requests come from")
    if requests.max_body is not None and responses.max_body is not None:
        largest = min(settings.max_request_bytes, requests.max_body)
        fact = f"requests of up to {largest} bytes, responses of up to {responses.max_body}"
        if responses.max_body < largest:
            todo = "a larger response is answered as an error: keep max_tokens and echoed metadata below that"
            yield Finding("size of responses", "advice", fact, todo)
        else:
            yield Finding("size of responses", "ok", fact)
