"""What one call of a dynamic batch does reaches no other, and leaves nothing behind; in virtual time."""

import asyncio
import contextvars
import gc
import weakref

from batches_harness import Function, batches_of, outcome, submitted
from virtual_time import in_virtual_time

from rejoinder.worker.errors import Failed


def test_a_function_that_cancels_itself_is_no_cancelling_of_those_that_wait():
    async def main(loop):
        async def call(items):
            helper = loop.create_task(asyncio.sleep(5))
            loop.call_soon(helper.cancel)
            await helper

        batches = batches_of(call, 2)
        outcomes = [await outcome(task) for task in submitted(loop, batches, 2)]
        assert [kind for _, kind in outcomes] == [Failed, Failed]

    in_virtual_time(main)


def test_when_the_loop_ends_nothing_is_left_behind():
    faults = []

    async def main():
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: faults.append(context))
        batches = batches_of(Function(10.0), 1)
        tasks = submitted(loop, batches, 4)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert batches.running == 1
        return tasks, batches

    tasks, batches = asyncio.run(main())
    assert all(task.done() for task in tasks)
    assert not faults
    assert (batches.running, batches.waiting) == (0, 0)


def test_neither_context_nor_cancelling_of_one_call_reaches_the_next():
    variable = contextvars.ContextVar("variable", default="none")

    async def main(loop):
        seen = []

        async def call(items):
            seen.append((variable.get(), asyncio.current_task().cancelling()))
            variable.set("a call's")
            await asyncio.sleep(0)
            asyncio.current_task().cancel()
            return items

        batches = batches_of(call, 1)

        async def submit(item):
            variable.set("a caller's")
            return await batches.submit(item)

        assert await asyncio.gather(*(submit(item) for item in range(3))) == [0, 1, 2]
        assert seen == [("none", 0)] * 3

    in_virtual_time(main)


def test_a_failed_item_is_freed_with_its_error():
    class Body:
        pass

    async def main(loop):
        async def call(items):
            raise ValueError

        batches = batches_of(call, 2)
        bodies = [Body(), Body()]
        watched = [weakref.ref(body) for body in bodies]
        gc.disable()
        try:
            tasks = [loop.create_task(batches.submit(body)) for body in bodies]
            del bodies
            await asyncio.wait(tasks)
            assert [type(task.exception()) for task in tasks] == [ValueError, ValueError]
            del tasks
            await asyncio.sleep(1)
            assert [watch() for watch in watched] == [None, None]
        finally:
            gc.enable()

    in_virtual_time(main)


def test_a_half_that_is_given_up_leaves_no_cancelling_to_the_other():
    async def main(loop):
        seen = []

        async def call(items):
            seen.append((list(items), asyncio.current_task().cancelling()))
            await asyncio.sleep(1)
            if len(items) > 1:
                raise ValueError
            return items

        batches = batches_of(call, 2)
        first, second = submitted(loop, batches, 2)
        await asyncio.sleep(1.5)
        first.cancel()
        assert await outcome(second) == (2.5, 1)
        assert seen == [([0, 1], 0), ([0], 0), ([1], 0)]

    in_virtual_time(main)
