"""The thread of a file: what it groups, what it costs when idle, and that nothing of it is left behind."""

import asyncio
import gc
import os
import threading

import pytest

from rejoinder.adapters import AdapterError, Outgoing, open_subscription, open_topic
from rejoinder.adapters.sqlite_thread import POLL_SLOW


def url(tmp_path, **options):
    return f"sqlite:///{tmp_path}/q.db?queue=q" + "".join(f"&{name}={value}" for name, value in options.items())


def threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("sqlite ")]


def descriptors():
    gc.collect()  # what an earlier test has left goes now, and not meanwhile
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - Path.iterdir holds a descriptor of its own


async def test_one_thread_for_each_file_and_nothing_left(tmp_path):
    before = descriptors()
    for _ in range(3):
        async with open_topic(url(tmp_path)) as topic, open_subscription(url(tmp_path)) as subscription:
            await topic.publish([Outgoing(b"x")])
            assert threads() == ["sqlite q.db"]
            async with open_topic(f"sqlite:///{tmp_path}/r.db?queue=q"):
                assert len(threads()) == 2
            assert len(await subscription.receive(1, 1)) == 1
        assert threads() == []
        assert descriptors() == before
    assert {path.name for path in tmp_path.iterdir()} == {"q.db", "r.db"}  # the logs are written back


async def test_a_failed_opening_leaves_nothing(tmp_path):
    before = descriptors()
    (tmp_path / "q.db").write_text("not a database" * 100)
    openings = await asyncio.gather(*(open_topic(url(tmp_path)).__aenter__() for _ in range(3)), return_exceptions=True)
    assert all(isinstance(one, AdapterError) for one in openings)
    assert len({id(one) for one in openings}) == 3
    assert threads() == []
    assert descriptors() == before


async def test_opening_that_is_cancelled_leaves_nothing(tmp_path):
    for steps in range(6):
        opening = asyncio.create_task(open_topic(url(tmp_path)).__aenter__())
        for _ in range(steps):
            await asyncio.sleep(0)
        opening.cancel()
        (got,) = await asyncio.gather(opening, return_exceptions=True)
        assert isinstance(got, asyncio.CancelledError)
        assert threads() == []


async def test_a_receive_that_waits_at_closing_fails_clearly(tmp_path):
    async with open_subscription(url(tmp_path)) as kept:
        async with open_subscription(url(tmp_path)) as closed:
            failing = asyncio.create_task(closed.receive(1, 60))
            waiting = asyncio.create_task(kept.receive(1, 60))
            await asyncio.sleep(0)
        with pytest.raises(AdapterError, match="closed"):
            await failing
        with pytest.raises(AdapterError, match="closed"):
            await closed.receive(1, 0)
        async with open_topic(url(tmp_path)) as topic:
            await topic.publish([Outgoing(b"x")])
        assert len(await waiting) == 1


async def test_what_was_called_before_closing_is_finished(tmp_path):
    async with open_topic(url(tmp_path)) as topic:
        publishing = [asyncio.create_task(topic.publish([Outgoing(b"x")])) for _ in range(50)]
        await asyncio.sleep(0)
    assert all(isinstance(outcome, str) for (outcome,) in await asyncio.gather(*publishing))
    async with open_subscription(url(tmp_path)) as subscription:
        assert len(await subscription.receive(99, 0)) == 50


async def test_a_cancelled_receive_counts_no_attempt_even_when_closing(tmp_path):
    async with open_topic(url(tmp_path)) as topic:
        await topic.publish([Outgoing(b"x")])
    for steps in range(60):
        async with open_subscription(url(tmp_path)) as subscription:
            receiving = asyncio.create_task(subscription.receive(1, 60))
            for _ in range(steps):
                await asyncio.sleep(0 if steps % 2 else 0.0001)
            receiving.cancel()
            if steps % 3 == 0:
                (got,) = await asyncio.gather(receiving, return_exceptions=True)
            else:
                got = None  # closing overtakes it
        if got is None:
            (got,) = await asyncio.gather(receiving, return_exceptions=True)
        async with open_subscription(url(tmp_path)) as subscription:
            if not isinstance(got, BaseException):
                assert await subscription.ack(got) == [None]
                async with open_topic(url(tmp_path)) as topic:
                    await topic.publish([Outgoing(b"x")])
            (message,) = await subscription.receive(1, 0)
            assert message.attempt == 1
            await subscription.ack([message])
            async with open_topic(url(tmp_path)) as topic:
                await topic.publish([Outgoing(b"x")])


async def test_an_idle_receive_looks_rarely(tmp_path):
    async with open_subscription(url(tmp_path)) as subscription:
        thread = subscription._file.thread
        before = thread.polls
        assert await subscription.receive(1, 1.0) == []
        quick = 6  # from 2 ms, doubling to 40 ms
        assert thread.polls - before <= 1.0 / POLL_SLOW + quick
        before = thread.polls
        assert await subscription.receive(1, 0) == []
        assert thread.polls - before == 1


async def test_many_waiting_receives_look_as_rarely_as_one(tmp_path):
    async with open_subscription(url(tmp_path)) as subscription:
        thread = subscription._file.thread
        receives = [asyncio.create_task(subscription.receive(1, 1.0)) for _ in range(20)]
        await asyncio.gather(*receives)
        assert thread.polls <= 1.0 / POLL_SLOW + 40  # their ends are up to 20 looks of their own


async def test_an_operation_that_fails_fails_none_of_its_group(tmp_path):
    async with open_topic(url(tmp_path)) as topic, open_subscription(url(tmp_path)) as subscription:
        await topic.publish([Outgoing(b"x")])
        (message,) = await subscription.receive(1, 1)
        receiving = asyncio.create_task(subscription.receive(9, 5))
        # SQLite refuses a lone surrogate, and finds it only when the group runs.
        bad, good, acked = await asyncio.gather(
            topic.publish([Outgoing("\ud800")]),  # type: ignore[arg-type]
            topic.publish([Outgoing(b"good")]),
            subscription.ack([message]),
        )
        assert isinstance(bad[0], AdapterError)
        assert "surrogates" in str(bad[0])
        assert acked == [None]
        assert [one.id for one in await receiving] == good


async def test_two_event_loops_share_a_file(tmp_path):
    async def take():
        async with open_subscription(url(tmp_path)) as subscription:
            (message,) = await subscription.receive(1, 60)
            return message.body, await subscription.ack([message])

    async with open_topic(url(tmp_path)) as topic:
        taking = asyncio.create_task(asyncio.to_thread(asyncio.run, take()))
        while len(threads()) != 1:
            await asyncio.sleep(0.001)
        await topic.publish([Outgoing(b"x")])
        assert await taking == (b"x", [None])


async def test_openers_of_one_queue_may_have_different_policies(tmp_path):
    async with (
        open_topic(url(tmp_path)) as topic,
        open_subscription(url(tmp_path)) as lenient,
        open_subscription(url(tmp_path, max_attempts=2)) as strict,
        open_subscription(f"sqlite:///{tmp_path}/q.db?queue=q-dead") as dead,
    ):
        await topic.publish([Outgoing(b"x")])
        for number in (1, 2, 3):
            (message,) = await lenient.receive(1, 1)
            assert message.attempt == number
            await lenient.set_lease([message], 0)
        assert await strict.receive(1, 0) == []
        (corpse,) = await dead.receive(1, 0)
        assert (corpse.id, corpse.attempt) == (message.id, 1)


async def test_a_cancellation_between_the_result_and_the_task_lets_go(tmp_path):
    async with open_topic(url(tmp_path)) as topic, open_subscription(url(tmp_path)) as subscription:
        await topic.publish([Outgoing(b"x")])
        # A task that is cancelled after its future has a result, and before its next step, sees just this.
        receiving = subscription.receive(1, 60)
        future = receiving.send(None)
        while not future.done():
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            receiving.throw(asyncio.CancelledError())
        (message,) = await subscription.receive(1, 0)
        assert message.attempt == 1


async def test_a_nack_of_the_last_attempt_wakes_who_waits_for_dead_letters(tmp_path):
    async with (
        open_topic(url(tmp_path)) as topic,
        open_subscription(url(tmp_path, max_attempts=1)) as subscription,
        open_subscription(f"sqlite:///{tmp_path}/q.db?queue=q-dead") as dead,
    ):
        await topic.publish([Outgoing(b"x")])
        (message,) = await subscription.receive(1, 1)
        burying = asyncio.create_task(dead.receive(1, 20))
        await subscription.set_lease([message], 0)
        assert [corpse.id for corpse in await burying] == [message.id]
