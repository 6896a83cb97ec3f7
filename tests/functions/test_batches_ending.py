"""Dynamic batches that wait, are cancelled and are stopped; in virtual time."""

import asyncio

import pytest
from batches_harness import Function, batches_of, outcome, submitted
from virtual_time import in_virtual_time

from rejoinder.worker.errors import Unavailable


def test_a_lone_item_starts_when_it_has_waited_and_at_once_if_it_need_not():
    async def main(loop):
        for wait, at in ((2.0, 2.0), (0.0, 2.0)):
            function = Function(0)
            batches = batches_of(function, wait=wait)
            await batches.submit("lone")
            assert function.calls == [(at, ["lone"])]

    in_virtual_time(main)


def test_others_that_come_do_not_make_the_oldest_wait_longer():
    async def main(loop):
        function = Function(0)
        batches = batches_of(function, 100, wait=2.0)

        async def late(item):
            await asyncio.sleep(item)
            return await batches.submit(item)

        await asyncio.gather(*(late(item) for item in range(6)))
        # 2 came as the time was up: whether it is in the first batch is a matter of turns, but 3 begins anew.
        assert [at for at, _ in function.calls][:1] == [2.0]
        assert [item for _, items in function.calls for item in items] == list(range(6))
        assert all(at <= items[0] + 2.0 for at, items in function.calls)

    in_virtual_time(main)


def test_a_timer_whose_item_was_cancelled_does_not_hurry_the_next_one():
    async def main(loop):
        function = Function(0)
        batches = batches_of(function, wait=2.0)
        first = loop.create_task(batches.submit("first"))
        await asyncio.sleep(1)
        second = loop.create_task(batches.submit("second"))
        first.cancel()
        assert await outcome(second) == (3.0, "second")
        assert function.calls == [(3.0, ["second"])]

    in_virtual_time(main)


def test_what_gathers_behind_a_call_runs_as_it_ends_however_long_it_has_waited():
    async def main(loop):
        function = Function(5.0)
        batches = batches_of(function, wait=1.0)
        tasks = submitted(loop, batches, 7)
        await asyncio.wait(tasks)
        assert function.calls == [(0.0, [0, 1, 2, 3]), (5.0, [4, 5, 6])]

    in_virtual_time(main)


def test_cancelled_while_it_waits_it_is_never_called():
    async def main(loop):
        function = Function(1.0)
        batches = batches_of(function, 2)
        tasks = submitted(loop, batches, 6)
        await asyncio.sleep(0.5)
        assert (batches.running, batches.waiting) == (2, 4)
        tasks[3].cancel()
        tasks[2].cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert batches.waiting == 2
        await asyncio.wait(tasks)
        assert [items for _, items in function.calls] == [[0, 1], [4, 5]]

    in_virtual_time(main)


def test_one_that_is_cancelled_leaves_its_call_and_the_last_one_ends_it():
    async def main(loop):
        function = Function(10.0)
        batches = batches_of(function, 2)
        first, second, third = submitted(loop, batches, 3)
        await asyncio.sleep(1)
        first.cancel()
        assert await outcome(first) == (1.0, asyncio.CancelledError)
        assert function.cancelled == 0
        second.cancel()
        assert await outcome(second) == (1.0, asyncio.CancelledError)
        assert await outcome(third) == (11.0, 2)
        assert function.cancelled == 1
        assert (batches.running, batches.waiting) == (0, 0)

    in_virtual_time(main)


@pytest.mark.parametrize("linger", [False, True])
def test_with_linger_the_last_one_that_is_cancelled_ends_with_its_call(linger):
    async def main(loop):
        function = Function(10.0, deaf=True)
        batches = batches_of(function, 2, linger=linger)
        first, second, third = submitted(loop, batches, 3)
        await asyncio.sleep(1)
        first.cancel()
        assert await outcome(first) == (1.0, asyncio.CancelledError)
        second.cancel()
        loop.call_later(1, second.cancel)  # again
        assert await outcome(second) == (10.0 if linger else 1.0, asyncio.CancelledError)
        assert await outcome(third) == (20.0, 2)
        assert function.ended == [10.0, 20.0]

    in_virtual_time(main)


def test_all_cancelled_in_one_turn_one_of_them_lingers():
    async def main(loop):
        function = Function(10.0, deaf=True)
        batches = batches_of(function, 3, linger=True)
        tasks = submitted(loop, batches, 3)
        await asyncio.sleep(1)
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*(outcome(task) for task in tasks))
        assert sorted(end for end, _ in ends) == [1.0, 1.0, 10.0]
        assert {kind for _, kind in ends} == {asyncio.CancelledError}

    in_virtual_time(main)


def test_an_error_that_comes_as_its_caller_is_cancelled_is_lost_quietly():
    async def main(loop):
        gate = loop.create_future()

        async def call(items):
            await gate
            raise ValueError(items)

        batches = batches_of(call, 1)
        task = loop.create_task(batches.submit(0))
        await asyncio.sleep(0.1)
        gate.set_result(None)
        while batches.running:
            await asyncio.sleep(0)
        task.cancel()
        assert await outcome(task) == (0.1, asyncio.CancelledError)

    in_virtual_time(main)


def test_the_call_of_a_cancelled_one_that_ends_in_the_same_turn_harms_no_later_one():
    async def main(loop):
        gate = loop.create_future()

        async def call(items):
            if items == ["first"]:
                await gate
            return items

        batches = batches_of(call, 1)
        first = loop.create_task(batches.submit("first"))
        second = loop.create_task(batches.submit("second"))
        await asyncio.sleep(0.1)
        first.cancel()
        gate.set_result(None)
        assert await outcome(first) == (0.1, asyncio.CancelledError)
        assert await outcome(second) == (0.1, "second")
        assert await batches.submit("third") == "third"

    in_virtual_time(main)


def test_those_cancelled_are_not_looked_for_among_the_guilty():
    async def main(loop):
        calls = []

        async def call(items):
            calls.append(list(items))
            await asyncio.sleep(1)
            raise ValueError(items)

        batches = batches_of(call, 4)
        tasks = submitted(loop, batches, 4)
        await asyncio.sleep(0.5)
        tasks[2].cancel()
        await asyncio.sleep(1)  # the first half runs
        tasks[3].cancel()
        assert (await outcome(tasks[3]))[0] == 1.5
        assert [(await outcome(task))[1] for task in tasks[:2]] == [ValueError, ValueError]
        await asyncio.sleep(10)
        assert calls == [[0, 1, 2, 3], [0, 1], [0], [1]]

    in_virtual_time(main)


@pytest.mark.parametrize("deaf", [False, True])
def test_stopping_refuses_all_at_once_and_returns_when_the_calls_have_ended(deaf):
    async def main(loop):
        function = Function(10.0, deaf=deaf)
        batches = batches_of(function, 2)
        tasks = submitted(loop, batches, 5)
        await asyncio.sleep(1)
        stopping = [loop.create_task(batches.stop()) for _ in range(2)]
        assert [await outcome(task) for task in tasks] == [(1.0, Unavailable)] * 5
        assert [await outcome(task) for task in stopping] == [(10.0 if deaf else 1.0, None)] * 2
        assert (batches.running, batches.waiting) == (0, 0)
        assert await outcome(loop.create_task(batches.submit(9))) == (loop.time(), Unavailable)
        await batches.stop()
        assert len(function.calls) == 1

    in_virtual_time(main)


def test_stopped_between_two_halves_nothing_more_is_called():
    async def main(loop):
        calls = []

        async def call(items):
            calls.append(list(items))
            try:
                await asyncio.sleep(1)
            except asyncio.CancelledError:
                raise ValueError from None  # instead of ending
            raise ValueError

        batches = batches_of(call, 4)
        tasks = submitted(loop, batches, 4)
        await asyncio.sleep(1.5)
        await batches.stop()
        assert [(await outcome(task))[1] for task in tasks] == [Unavailable] * 4
        assert calls == [[0, 1, 2, 3], [0, 1]]

    in_virtual_time(main)


def test_stopped_before_anything_started_and_while_a_timer_runs():
    async def main(loop):
        function = Function(0)
        for wait in (0.0, 5.0):
            batches = batches_of(function, wait=wait)
            tasks = submitted(loop, batches, 2)
            await asyncio.sleep(0)
            await batches.stop()
            assert [(await outcome(task))[1] for task in tasks] == [Unavailable] * 2
        await asyncio.sleep(10)
        assert function.calls == []

    in_virtual_time(main)
