"""What can go wrong with one request, as the contract's statuses.

    RequestError             answered at once, never retried: carries status_code, message, type, param, code
    ├── BadRequest       400
    ├── Forbidden        403
    ├── Missing          404
    ├── Expired          408
    ├── RequestTooLarge  413
    ├── Cancelled        499
    ├── NotGiven         500  the result cannot be written, stored or carried
    └── TimedOut         504
    RetryableError           comes back later; answered with its status after the last attempt
    ├── Failed           500  the engine failed on this request alone
    └── Unavailable      503  out of memory, engine restarting, store or broker away
    EngineGone               the engine died too often to be started again: the worker must end

An engine raises these; nothing else decides a status.
"""

from rejoinder.schemas.errors import ErrorDetail


class RequestError(Exception):
    """A request that is answered with an error at once."""

    status_code = 400
    type = "invalid_request_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code

    def detail(self) -> ErrorDetail:
        """The error as the response's body carries it."""
        return ErrorDetail(message=self.message, type=self.type, param=self.param, code=self.code)


class BadRequest(RequestError):
    """Malformed envelope or body, or an unsupported field or value: `param` names it."""


class Forbidden(RequestError):
    """The location that the request names is not allowed."""

    status_code = 403
    type = "permission_error"


class Missing(RequestError):
    """Unknown path, model or input object."""

    status_code = 404
    type = "not_found_error"


class Expired(RequestError):
    """The request's deadline or time to live passed before it was started."""

    status_code = 408
    type = "expired_error"


class RequestTooLarge(RequestError):
    """The request, its input or its prompt is larger than the limits."""

    status_code = 413
    type = "request_too_large_error"


class Cancelled(RequestError):
    """Its sender does not want the answer any more."""

    status_code = 499
    type = "cancelled_error"


class NotGiven(RequestError):
    """The result cannot be written as JSON, or nobody takes it as large as it is: another attempt makes the same."""

    status_code = 500
    type = "engine_error"


class TimedOut(RequestError):
    """`invocation_timeout_seconds` passed during inference."""

    status_code = 504
    type = "timeout_error"


class RetryableError(RequestError):
    """An error that another attempt may cure.

    Args:
        message: Answered after the last attempt.
        param: See `RequestError`.
        code: See `RequestError`.
        delay: Seconds until the next attempt; None: as long as the settings say, longer with each.
    """

    status_code = 503
    type = "unavailable_error"

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, delay: float | None = None
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.delay = delay


class Failed(RetryableError):
    """The engine failed on this request alone."""

    status_code = 500
    type = "engine_error"


class Unavailable(RetryableError):
    """Out of memory, engine restarting, store or broker away."""


class EngineGone(Exception):
    """The engine died too often to be started again."""
