"""Logs: structured lines on stderr, with the ids of messages and answers, never with what they say."""

import logging
import sys
import traceback
from typing import Literal

import structlog
from structlog.typing import Processor


def places(exc: BaseException) -> list[str]:
    """Where an exception came from, innermost last, without what it says: that may quote a request."""
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(exc.__traceback__)]


def configure(
    log_format: Literal["auto", "console", "json"], level: Literal["debug", "info", "warning", "error"]
) -> None:
    """Send the program's logs and those of its libraries to stderr.

    Args:
        log_format: `auto` is console on a terminal, else JSON lines.
        level: The least severe level that is written.
    """
    console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    number = logging.getLevelNamesMapping()[level.upper()]
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    rendering: list[Processor] = (
        # The plain formatter: rich's shows local variables, and with them what requests say.
        [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)]
        if console
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[*shared, *rendering],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    # Libraries speak only when something is wrong; their chatter is theirs.
    logging.basicConfig(handlers=[handler], level=max(number, logging.WARNING), force=True)
