"""What a function raised, as the contract's errors. Its own words and its traceback go to the log, to nobody else."""

import math
from typing import Any

import structlog

from rejoinder.worker.errors import Failed, RequestError, RetryableError, Unavailable

log = structlog.get_logger(__name__)


class Escaped(Exception):
    """Carries what no future and no task may: `StopIteration`, and what ends a program or cancels a task."""

    def __init__(self, original: BaseException) -> None:
        super().__init__(repr(original))
        self.original = original


def carried(exc: BaseException) -> Exception:
    """The exception, or one that carries it."""
    return exc if isinstance(exc, Exception) and not isinstance(exc, StopIteration) else Escaped(exc)


def failure(exc: BaseException, response_id: str) -> RequestError:
    """The error of the request whose function raised something."""
    if isinstance(exc, Escaped):
        exc = exc.original
    if isinstance(exc, RequestError):
        if isinstance(exc, Failed) and exc.__cause__ is not None:
            log.error("function_failed", response_id=response_id, exc_info=exc)
        return _sound(exc)
    if isinstance(exc, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(exc).__mro__):
        log.error("function_out_of_memory", response_id=response_id, exc_info=exc)
        return Unavailable("the function ran out of memory", code="out_of_memory")
    log.error("function_failed", response_id=response_id, exc_info=exc)
    return Failed(f"the function failed: {type(exc).__name__}")


def _sound(exc: RequestError) -> RequestError:
    """The error with fields of the types that they should have: a user's class or call may have left some out."""
    exc.message = _text(getattr(exc, "message", None)) or str(exc) or type(exc).__name__
    exc.param, exc.code = _text(getattr(exc, "param", None)), _text(getattr(exc, "code", None))
    if isinstance(exc, RetryableError):
        delay = getattr(exc, "delay", None)
        usable = isinstance(delay, int | float) and math.isfinite(delay) and delay >= 0
        exc.delay = float(delay) if delay is not None and usable else None
    return exc


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
