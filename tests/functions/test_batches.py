"""Dynamic batches: who is called with whom and when, in virtual time, and whose fault a failure is."""

import asyncio
import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from virtual_time import VirtualLoop, in_virtual_time

from rejoinder.worker.engines.functions.batches import Batches, BatchLimits
from rejoinder.worker.errors import BadRequest, Failed, RetryableError, Unavailable


def limits(size=4, *, most=1 << 20, wait=0.0):
    return BatchLimits(size, most, wait)


@dataclass
class Job:
    """One item of the simulation."""

    name: int
    at: float
    key: int
    size: int
    bad: bool
    cancelled_at: float | None
    gone: bool = False


@dataclass
class Simulation:
    """Jobs against batches, with everything that must hold checked at each call and whenever time stands still."""

    loop: VirtualLoop
    limits: BatchLimits
    concurrency: int
    seconds: float
    waiting: dict[int, Job] = field(default_factory=dict)  # by name, in the order of coming; here came is `at`
    under_way: int = 0
    known: set[int] = field(default_factory=set)  # have been in a call
    seen: list[int] = field(default_factory=list)

    def ripe(self):
        """The names of the oldest of each key whose batch can start."""
        keys: dict[int, list[Job]] = {}
        for job in self.waiting.values():
            keys.setdefault(job.key, []).append(job)
        return [
            jobs[0].name
            for jobs in keys.values()
            if any(not job.gone for job in jobs)
            if len(jobs) >= self.limits.size
            or sum(job.size for job in jobs) >= self.limits.bytes
            or jobs[0].at + self.limits.wait <= self.loop.time()
        ]

    def settled(self):
        if self.under_way < self.concurrency:
            assert not self.ripe()

    async def call(self, jobs):
        names = [job.name for job in jobs]
        try:
            self.check(jobs, names)
        except (AssertionError, ValueError, KeyError) as exc:
            self.loop.faults.append(exc)  # to raise it here would be an answer like any
        self.under_way += 1
        try:
            if self.seconds:
                await asyncio.sleep(self.seconds)
            if any(job.bad for job in jobs):
                raise ValueError(names)
            return [("answer", name) for name in names]
        finally:
            self.under_way -= 1

    def check(self, jobs, names):
        assert isinstance(jobs, list)
        assert 1 <= len(jobs) <= self.limits.size
        assert len({job.key for job in jobs}) == 1
        assert len(jobs) == 1 or sum(job.size for job in jobs) <= self.limits.bytes
        assert names == sorted(names)
        assert self.under_way < self.concurrency
        if names[0] in self.known:
            return  # again, in a half
        assert self.waiting[min(self.ripe())].key == jobs[0].key
        same = [job for job in self.waiting.values() if job.key == jobs[0].key and not job.gone]
        assert [job.name for job in same[: len(names)]] == names
        if len(names) < min(len(same), self.limits.size):
            assert sum(job.size for job in same[: len(names) + 1]) > self.limits.bytes
        for name in names:
            del self.waiting[name]
        self.known.update(names)

    async def one(self, job, batches):
        await asyncio.sleep(job.at)
        job.at = self.loop.time()  # the sum of floats
        job.name = len(self.seen)
        self.seen.append(job.name)
        self.waiting[job.name] = job
        return await batches.submit(job, job.size)

    async def cancel(self, job, task):
        await asyncio.sleep(job.cancelled_at)
        job.gone = task.cancel()
        if job.gone:  # the task itself hears of it a turn later; so long it helps to make a batch full
            self.loop.call_soon(self.waiting.pop, job.name, None)


limits_drawn = st.builds(
    BatchLimits, size=st.integers(1, 5), bytes=st.integers(1, 20), wait=st.sampled_from([0.0, 1.0, 2.5])
)
jobs_drawn = st.lists(
    st.builds(
        Job,
        name=st.just(-1),
        at=st.integers(0, 6).map(float),
        key=st.integers(0, 2),
        size=st.integers(0, 12),
        bad=st.sampled_from([False, False, False, True]),
        cancelled_at=st.one_of(st.none(), st.none(), st.integers(0, 9).map(float)),
    ),
    max_size=24,
)


@given(
    jobs=jobs_drawn,
    drawn=st.builds(
        BatchLimits, size=st.integers(1, 5), bytes=st.integers(1, 20), wait=st.sampled_from([0.0, 1.0, 2.5])
    ),
    concurrency=st.integers(1, 3),
    seconds=st.sampled_from([0.0, 1.0, 3.0]),
)
@settings(max_examples=300, deadline=None)
def test_whatever_comes_and_goes_batches_are_as_they_must_be(jobs, drawn, concurrency, seconds):
    async def main(loop):
        simulation = Simulation(loop, drawn, concurrency, seconds)
        batches = Batches(simulation.call, drawn, key=lambda job: job.key, concurrency=concurrency)
        loop.settled = simulation.settled
        tasks = [loop.create_task(simulation.one(job, batches)) for job in jobs]
        cancels = [
            loop.create_task(simulation.cancel(job, task))
            for job, task in zip(jobs, tasks, strict=True)
            if job.cancelled_at is not None
        ]
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*cancels)
        for job, outcome in zip(jobs, outcomes, strict=True):
            if isinstance(outcome, asyncio.CancelledError):
                assert job.cancelled_at is not None
            elif job.bad:
                assert isinstance(outcome, ValueError)
                assert outcome.args == ([job.name],)
            else:
                assert outcome == ("answer", job.name)
        await asyncio.sleep(10)
        assert (batches.waiting, batches.running, simulation.under_way) == (0, 0, 0)
        await batches.stop()

    in_virtual_time(main)


@given(data=st.data(), count=st.integers(1, 130))
@settings(max_examples=100, deadline=None)
def test_the_guilty_ones_fail_alone_and_are_found_in_few_calls(data, count):
    guilty = data.draw(st.sets(st.integers(0, count - 1), max_size=5))

    async def main(loop):
        calls = 0

        async def call(items):
            nonlocal calls
            calls += 1
            if found := guilty & set(items):
                raise KeyError(*sorted(found))
            return tuple(item * 2 for item in items)

        batches = Batches(call, limits(count))
        outcomes = await asyncio.gather(*(batches.submit(item) for item in range(count)), return_exceptions=True)
        for item, outcome in enumerate(outcomes):
            if item in guilty:
                assert isinstance(outcome, KeyError)
                assert outcome.args == (item,)
            else:
                assert outcome == item * 2
        assert calls <= 1 + 2 * len(guilty) * math.ceil(math.log2(count))

    in_virtual_time(main)


async def outcomes_of(call, count=8, **options):
    batches = Batches(call, options.pop("limits", limits(count)), **options)
    return await asyncio.gather(*(batches.submit(item) for item in range(count)), return_exceptions=True)


async def test_an_answer_that_is_an_exception_is_that_item_s():
    async def call(items):
        return [BadRequest("odd", param="n") if item % 2 else item for item in items]

    outcomes = await outcomes_of(call, 4)
    assert (outcomes[0], outcomes[2]) == (0, 2)
    assert [type(outcomes[at]) for at in (1, 3)] == [BadRequest, BadRequest]


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        (lambda items: [*items, 0], "returned 2 answers for 1 requests"),
        (lambda _: [], "returned 0 answers for 1 requests"),
        (dict.fromkeys, "returned dict, not a list"),
        (lambda items: "abcdefgh"[: len(items)], "returned str, not a list"),
        (lambda _: None, "returned NoneType, not a list"),
    ],
)
async def test_answers_that_are_too_few_too_many_or_no_list_are_no_answers(answers, words):
    async def call(items):
        return answers(items) if 5 in items else list(items)

    outcomes = await outcomes_of(call)
    assert outcomes[:5] + outcomes[6:] == [0, 1, 2, 3, 4, 6, 7]
    assert isinstance(outcomes[5], Failed)
    assert words in outcomes[5].message


async def test_a_retryable_error_is_everybody_s_and_nobody_is_looked_for():
    calls = 0

    async def call(items):
        nonlocal calls
        calls += 1
        raise RetryableError("later", delay=3)

    outcomes = await outcomes_of(call)
    assert calls == 1
    assert [(type(error), error.delay) for error in outcomes] == [(RetryableError, 3)] * 8


class OutOfMemoryError(RuntimeError):
    """As torch has it."""


@pytest.mark.parametrize("error", [MemoryError, OutOfMemoryError])
@pytest.mark.parametrize("mapped", [False, True])
async def test_too_little_memory_for_all_is_enough_for_some(error, mapped):
    async def call(items):
        if len(items) > 2:
            if mapped:
                raise Unavailable("out of memory") from error()
            raise error
        return list(items)

    assert await outcomes_of(call) == list(range(8))


@pytest.mark.parametrize(
    "error", [SystemExit, KeyboardInterrupt, StopIteration, asyncio.CancelledError, GeneratorExit, StopAsyncIteration]
)
@pytest.mark.parametrize("answered", [False, True])
async def test_what_no_task_can_raise_is_a_failure_of_that_item(error, answered):
    async def call(items):
        if answered:
            return [error() if item == 3 else item for item in items]
        if 3 in items:
            raise error
        return list(items)

    outcomes = await outcomes_of(call)
    assert outcomes[:3] + outcomes[4:] == [0, 1, 2, 4, 5, 6, 7]
    wrong = outcomes[3]
    assert isinstance(wrong, Failed | StopAsyncIteration | RuntimeError)


async def test_a_key_that_fails_or_is_none_fails_its_own_item_alone():
    def key(item):
        if item == 2:
            raise SystemExit
        return [] if item == 5 else 1 // (item - 6) * 0

    async def call(items):
        return list(items)

    outcomes = await outcomes_of(call, key=key)
    assert [outcomes[at] for at in (0, 1, 3, 4, 7)] == [0, 1, 3, 4, 7]
    assert [type(outcomes[at]) for at in (2, 5, 6)] == [Failed, TypeError, ZeroDivisionError]
