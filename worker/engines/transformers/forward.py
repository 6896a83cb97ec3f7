"""One model's forwards, shared by all requests: padded batches within a token budget, in a thread beside the loop.

While one forward is under way the next batch gathers, so nothing waits for a timer. A sequence that cannot be run fails
alone: a batch that fails is halved until it is found.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from rejoinder.worker.engines.length_pool import Pool, Tokens, Waiting
from rejoinder.worker.engines.protocol import EngineStats
from rejoinder.worker.engines.transformers.faults import is_device_lost, is_out_of_memory, out_of_memory
from rejoinder.worker.errors import Failed, RetryableError, Unavailable

T = TypeVar("T")
Outcome = torch.Tensor | RetryableError
Forward = Callable[[Sequence[Tokens]], torch.Tensor]


class ForwardBatcher:
    """Runs sequences of concurrent requests together.

    Args:
        budget: Tokens of one forward, padding included.
        slack: Tokens of padding that one more sequence in a batch may cost.
    """

    def __init__(self, budget: int, slack: int) -> None:
        self._pool = Pool(budget, slack)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="forward")
        self._forward: Forward | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopped = self._lost = False
        self._idle_since = 0.0
        self.stats = EngineStats()
        """Forwards done, halves counted each."""
        self.broken = asyncio.Event()
        """Set when the device can run nothing more."""

    async def load(self, load: Callable[[], Forward]) -> None:
        """Make the model, in the thread that will run it.

        Args:
            load: Returns the model: from some sequences to float32 rows on the CPU, one for each.
        """
        self._forward = await asyncio.get_running_loop().run_in_executor(self._thread, load)
        self._idle_since = time.monotonic()

    async def run(self, sequences: Sequence[Tokens]) -> list[torch.Tensor]:
        """The model's row for each sequence, in order. Cancelling drops those that still wait.

        Raises:
            Unavailable: out of memory for one sequence alone, or the batcher is stopped or broken.
            Failed: the model failed on one of the sequences, or gave something that is no number for it.
        """
        if self._stopped or self.broken.is_set():
            raise Unavailable("the engine is not running")
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[torch.Tensor]] = [loop.create_future() for _ in sequences]
        waiting = self._pool.add(sequences, futures)
        if self._task is None:
            self.stats += EngineStats(idle_seconds=time.monotonic() - self._idle_since)
            # A new task first runs after all that is ready now has come in, so even the first batch is full.
            self._task = asyncio.create_task(self._drain())
        try:
            return await asyncio.gather(*futures)
        finally:
            # The first failure ends the others too; gather leaves their exceptions to us.
            self._pool.discard(waiting)
            for future in futures:
                if not future.cancel() and not future.cancelled():
                    future.exception()

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while batch := self._pool.take():
                outcomes = await loop.run_in_executor(self._thread, self._run, [waiting.tokens for waiting in batch])
                _deliver(batch, outcomes)
                if self._lost:
                    self.broken.set()
        finally:
            self._task = None  # in the same step that found nothing waiting
            self._idle_since = time.monotonic()

    def _run(self, batch: Sequence[Tokens]) -> list[Outcome]:
        """Run a batch, in halves where it fails; called in the thread."""
        outcome = self._once(batch)
        if not isinstance(outcome, RetryableError):
            return outcome
        if len(batch) == 1 or self._lost:
            return [outcome] * len(batch)
        half = len(batch) // 2
        return self._run(batch[:half]) + self._run(batch[half:])

    def _once(self, batch: Sequence[Tokens]) -> list[Outcome] | RetryableError:
        # Returned, not raised: a half must not be tried while a traceback still holds the tensors of the whole.
        if self._stopped or self._lost or self._forward is None:
            return Unavailable("the engine was stopped")
        try:
            rows = self._forward(batch)
            finite = torch.isfinite(rows).all(-1).tolist()
            bad = Failed("the model's result for this input is not finite")
            return [row if good else bad for row, good in zip(rows, finite, strict=True)]
        except Exception as exc:  # noqa: BLE001  # whatever it is, it must stay with the sequence that causes it
            if is_device_lost(exc):  # only a new process gets another
                self._lost = True
                return Unavailable(f"the device failed ({_first_line(exc)})")
            if is_out_of_memory(exc):
                return out_of_memory()
            return Failed(f"the engine failed on this input: {type(exc).__name__}")
        finally:
            self.stats += EngineStats(1, len(batch), tokens=sum(len(tokens.ids) for tokens in batch))

    async def stop(self) -> None:
        """Run nothing more; every sequence without a result raises `Unavailable`. Returns after the current forward."""
        self._stopped = True
        while batch := self._pool.take():
            _deliver(batch, [Unavailable("the engine was stopped")] * len(batch))
        if self._task is not None:
            await asyncio.wait({self._task})
        self._thread.shutdown(wait=False, cancel_futures=True)


def _deliver(batch: Sequence[Waiting], outcomes: Sequence[Outcome]) -> None:
    for waiting, outcome in zip(batch, outcomes, strict=True):
        future: asyncio.Future[torch.Tensor] = waiting.owner
        if future.done():
            continue  # cancelled meanwhile
        if isinstance(outcome, RetryableError):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)


def _first_line(exc: Exception) -> str:
    return str(exc).partition("\n")[0][:200]
