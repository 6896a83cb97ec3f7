"""The worker as a process: opens what the URLs name, starts the engine, works, and stops cleanly on a signal."""

import asyncio
import contextlib
import gc
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TypeVar

import structlog

from rejoinder.adapters import AdapterError, Backlog, Subscription, Topic, Transient, open_subscription, open_topic
from rejoinder.worker.accepting import Acceptor, never_stops
from rejoinder.worker.cancels import Cancels
from rejoinder.worker.consumer import Consumer
from rejoinder.worker.engines.factory import create_engine
from rejoinder.worker.engines.protocol import Engine, EngineStats
from rejoinder.worker.errors import EngineGone
from rejoinder.worker.handler import Handler
from rejoinder.worker.inputs import Inputs
from rejoinder.worker.notices import Notices
from rejoinder.worker.outputs import Outputs
from rejoinder.worker.reply import Replier
from rejoinder.worker.retry import RetryPolicy, call_until
from rejoinder.worker.s3_requests import events_of
from rejoinder.worker.settings import Settings
from rejoinder.worker.slots import Slots
from rejoinder.worker.stores import Stores, open_stores
from rejoinder.worker.streaming import Streams

log = structlog.get_logger(__name__)

Opened = TypeVar("Opened")

REPORT_SECONDS = 10.0
# A broker that is away or busy when the worker starts is waited for this long; one that is wrong is not.
START_SECONDS = 60.0
# Beyond that, for the call that is under way then.
GRACE_OF_START = 10.0


class StopSignals:
    """The first SIGTERM or SIGINT asks to stop, the second to hurry."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()

    def receive(self, name: str) -> None:
        """Take note of one signal."""
        if self.stop.is_set():
            log.warning("stopping_now", signal=name)
            self.hurry.set()
        else:
            log.info("stopping", signal=name)
            self.stop.set()

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the process's signals inside this block."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.receive, number.name)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)


async def serve(settings: Settings, signals: StopSignals | None = None, engine: Engine | None = None) -> None:
    """Run a worker until a signal stops it.

    Args:
        settings: What to run on what.
        signals: For a caller who stops the worker by other means. Default: the process's own signals.
        engine: Runs the requests in place of the one that the settings ask for. Not yet started.

    Raises:
        AdapterError: a URL is wrong, or a broker refuses for good; one line says what to fix.
        EngineGone: the engine cannot be started, or died too often.
    """
    own = signals or StopSignals()
    with contextlib.nullcontext() if signals else own.installed():
        async with contextlib.AsyncExitStack() as stack:
            ends = await _opened(settings, stack, own.stop)
            if ends is None:
                log.info("worker_stopped")
                return
            waiting = ends.backlog.waiting
            runs = {"model": settings.model} if settings.app is None else {"app": settings.app}
            log.info("worker_starting", engine=settings.engine_name, **runs, waiting=waiting)
            engine = engine or create_engine(settings)
            try:
                if await _started(engine, own):
                    if settings.default_path not in engine.paths:
                        # No reason to end: requests may all name their path. One that does not is answered 404. Where
                        # nobody asked for this path it is as it should be: an app has the paths that it names.
                        say = log.warning if "default_path" in settings.model_fields_set else log.info
                        say("default_path_not_served", default_path=settings.default_path, paths=sorted(engine.paths))
                    await _work(settings, engine, ends, own)
            finally:
                await engine.stop()
    log.info("worker_stopped", **_figures(engine.stats))


@dataclass(frozen=True, slots=True)
class _Ends:
    """What the URLs of the settings name."""

    subscription: Subscription
    backlog: Backlog
    topic: Topic
    stores: Stores
    success: Topic | None
    error: Topic | None


async def _opened(settings: Settings, stack: contextlib.AsyncExitStack, stop: asyncio.Event) -> _Ends | None:
    """Open brokers and stores before the model is loaded: what is wrong with them should cost no minutes.

    One that is away or busy is waited for. None when the worker was stopped meanwhile.

    Raises:
        AdapterError: a broker or a store refuses, or was still away after `START_SECONDS`.
    """
    clock = asyncio.get_running_loop().time
    end = clock() + START_SECONDS

    async def patiently(what: str, call: Callable[[], Awaitable[Opened]]) -> Opened:
        return await call_until(what, call, limit=max(0.0, end - clock()))

    async def opened(what: str, opening: Callable[[], AbstractAsyncContextManager[Opened]]) -> Opened:
        return await patiently(what, lambda: stack.enter_async_context(opening()))

    # In this task, and not in one that could be cancelled: what an adapter opens may have to be closed by its opener.
    try:
        async with asyncio.timeout_at(end + GRACE_OF_START) as timer:
            stopped = asyncio.create_task(_end_on(stop, timer))
            try:
                subscription = await opened("open requests", lambda: open_subscription(settings.requests))
                topic = await opened("open responses", lambda: open_topic(settings.responses))
                success = await opened("open success_topic", lambda: _open_if(settings.success_topic))
                error = await opened("open error_topic", lambda: _open_if(settings.error_topic))
                stores = await opened("open stores", lambda: open_stores(settings))
                # Opening need not have read anything: this does.
                await patiently("look into stores", stores.look)
                backlog = await patiently("backlog", subscription.backlog)
                return _Ends(subscription, backlog, topic, stores, success, error)
            finally:
                stopped.cancel()
    except TimeoutError as exc:
        if stop.is_set():
            return None
        urls = [settings.requests, settings.responses, settings.success_topic, settings.error_topic]
        urls += [settings.blobs, settings.output_path, settings.failure_path, settings.ledger, settings.cancels]
        urls += settings.allow_input
        named = " or ".join(url for url in urls if url is not None)
        raise Transient(f"{named} did not answer in {START_SECONDS:g} s") from exc


def _open_if(url: str | None) -> AbstractAsyncContextManager[Topic | None]:
    return contextlib.nullcontext() if url is None else open_topic(url)


async def _end_on(stop: asyncio.Event, timer: asyncio.Timeout) -> None:
    await stop.wait()
    timer.reschedule(0.0)


async def _started(engine: Engine, signals: StopSignals) -> bool:
    began = time.monotonic()
    starting = asyncio.create_task(engine.start())
    stopped = asyncio.create_task(signals.stop.wait())
    await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not starting.done():
        starting.cancel()
        await asyncio.wait({starting})
        return False
    starting.result()
    log.info(
        "engine_ready", seconds=round(time.monotonic() - began, 2), capacity=engine.capacity, paths=sorted(engine.paths)
    )
    return True


async def _work(settings: Settings, engine: Engine, ends: _Ends, signals: StopSignals) -> None:
    subscription, topic = ends.subscription, ends.topic
    handler = Handler(
        engine,
        subscription=subscription.name,
        default_path=settings.default_path,
        max_request_bytes=settings.max_request_bytes,
        invocation_timeout=settings.invocation_timeout_seconds,
    )
    inputs = Inputs(ends.stores, settings.max_input_bytes)
    replier = Replier(topic, subscription.name)
    cancels = None if ends.stores.cancels is None else Cancels(ends.stores.cancels)
    consumer = Consumer(
        subscription,
        handler,
        Acceptor(
            handler,
            subscription=subscription.name,
            inputs=inputs,
            events=events_of(settings, ends.stores.is_own),
            stops=never_stops if cancels is None else cancels.stop,
        ),
        replier,
        Slots(engine),
        policy=RetryPolicy(
            max_attempts=settings.max_attempts,
            dead_letter_after=subscription.max_attempts,
            delay=settings.retry_delay_seconds,
            delay_max=settings.retry_delay_max_seconds,
        ),
        prefetch=settings.prefetch,
        max_hold=settings.max_hold_seconds,
        streams=Streams(
            replier,
            carried=topic.max_body,
            interval=settings.stream_interval_ms / 1000,
            max_bytes=settings.stream_max_bytes,
        ),
        outputs=_outputs(settings, ends),
        notices=_notices(settings, ends),
        cancels=cancels,
    )
    receiving = asyncio.create_task(consumer.run())
    others = [asyncio.create_task(signals.stop.wait()), asyncio.create_task(engine.wait_gone())]
    reporting = asyncio.create_task(_report(consumer, engine))
    looking = [asyncio.create_task(cancels.run())] if cancels is not None else []
    try:
        await asyncio.wait({receiving, *others}, return_when=asyncio.FIRST_COMPLETED)
        gone = others[1].done()
    finally:
        for task in (*others, reporting):
            task.cancel()
        consumer.stop_receiving()
        await asyncio.wait({receiving})
        await consumer.drain(settings.grace_seconds, signals.hurry)
        for task in looking:  # only now: what runs out its grace can be cancelled too
            task.cancel()
        if cancels is not None:
            await cancels.close()
        log.info("drained", **vars_of(consumer), engine_waited_seconds=round(consumer.engine_waited_seconds, 2))
    receiving.result()
    if gone:
        raise EngineGone("the engine died too often to be started again; the log says of what")


def _outputs(settings: Settings, ends: _Ends) -> Outputs | None:
    stores = ends.stores
    if not any((stores.outputs, stores.failures, stores.ledger, stores.responses)):
        return None
    name, carried = ends.subscription.name, ends.topic.max_body
    return Outputs(stores, subscription=name, carried=carried, max_inline=settings.max_inline_bytes)


def _notices(settings: Settings, ends: _Ends) -> Notices | None:
    if ends.success is None and ends.error is None:
        return None
    return Notices(
        ends.success,
        ends.error,
        subscription=ends.subscription.name,
        endpoint_name=settings.endpoint_name,
        include_response=settings.include_inference_response,
    )


def vars_of(consumer: Consumer) -> dict[str, int]:
    """The consumer's counts by name."""
    return {name: getattr(consumer.counts, name) for name in consumer.counts.__dataclass_fields__}


async def _report(consumer: Consumer, engine: Engine) -> None:
    """Say now and then how it goes, when anything does."""
    before, stats, waited = vars_of(consumer), engine.stats, consumer.engine_waited_seconds
    while True:
        await asyncio.sleep(REPORT_SECONDS)
        now = vars_of(consumer)
        if now != before:
            rate = (now["answered"] - before["answered"]) / REPORT_SECONDS
            # The engine's figures are of this interval, but for what a heartbeat is late.
            latest, latest_waited = engine.stats, consumer.engine_waited_seconds
            log.info(
                "progress",
                **now,
                answered_per_second=round(rate, 1),
                **_figures(latest - stats),
                engine_waited_seconds=round(latest_waited - waited, 2),
            )
        before, stats, waited = now, engine.stats, consumer.engine_waited_seconds


def _figures(stats: EngineStats) -> dict[str, float]:
    """What an engine with steps did with them: how full they were, and how long there was none."""
    if not stats.steps:
        return {}
    occupancy = {"occupancy": round(stats.occupancy, 3)} if stats.places else {}
    if not stats.tokens:  # as of functions, whose steps are calls: nobody counts their tokens, nor when they rest
        return occupancy
    return {
        **occupancy,
        "tokens_per_step": round(stats.tokens / stats.steps, 1),
        "idle_seconds": round(stats.idle_seconds, 2),
    }


def run(settings: Settings) -> None:
    """`serve` in an event loop of its own, in a process of its own. Raises what it raises."""
    # Messages in flight are up to a hundred thousand objects that are no garbage, and a settled one leaves none; at the
    # default threshold the collector looks at them again and again, for a third of all time.
    gc.set_threshold(200_000, 20, 20)
    asyncio.run(serve(settings))


__all__ = ["AdapterError", "EngineGone", "StopSignals", "run", "serve"]
