"""The room for inputs: shared out in turn, and nothing of it lost."""

import asyncio

from rejoinder.worker.room import Room


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_room_is_given_in_turn() -> None:
    room = Room(100)
    first, large, small = room.share(), room.share(), room.share()
    await first.hold(60)
    waiting = [asyncio.create_task(large.hold(70)), asyncio.create_task(small.hold(10))]
    await turns()
    assert not any(task.done() for task in waiting), "the small one does not pass the large one"
    first.free()
    await asyncio.gather(*waiting)
    assert room.used == 80
    large.free()
    small.free()
    small.free()
    assert room.used == 0


async def test_more_than_all_is_given_when_nobody_has_any() -> None:
    room = Room(100)
    one, huge = room.share(), room.share()
    assert one.try_hold(1)
    assert not huge.try_hold(1000)
    waiting = asyncio.create_task(huge.hold(1000))
    await turns()
    assert not waiting.done()
    one.free()
    await waiting
    assert room.used == 1000


async def test_who_gives_up_waiting_lets_the_next_in() -> None:
    room = Room(100)
    first, large, small = room.share(), room.share(), room.share()
    await first.hold(60)
    waiting = asyncio.create_task(large.hold(70))
    behind = asyncio.create_task(small.hold(40))
    await turns()
    waiting.cancel()
    await asyncio.wait({waiting})
    await behind
    assert room.used == 100


async def test_room_given_to_a_task_that_was_cancelled_at_that_moment_comes_back() -> None:
    room = Room(100)
    first, second = room.share(), room.share()
    await first.hold(100)
    waiting = asyncio.create_task(second.hold(50))
    await turns()
    first.free()
    waiting.cancel()
    await asyncio.wait({waiting})
    assert waiting.cancelled()
    assert room.used == 0


async def test_a_share_that_grows_keeps_nothing_while_it_waits() -> None:
    room = Room(100)
    one, other = room.share(), room.share()
    await one.hold(50)
    await other.hold(50)
    growing = [asyncio.create_task(share.hold(90)) for share in (one, other)]
    await turns()
    assert growing[0].done(), "they would wait for each other for ever"
    one.free()
    await asyncio.gather(*growing)
    assert room.used == 90


async def test_room_that_is_free_when_those_who_wait_are_cancelled_goes_to_who_still_does() -> None:
    room = Room(100)
    first, second, third = room.share(), room.share(), room.share()
    await first.hold(100)
    waiting, behind = asyncio.create_task(second.hold(50)), asyncio.create_task(third.hold(60))
    await turns()
    waiting.cancel()
    first.free()  # before the cancelled one has had a turn, as when a worker stops
    await asyncio.wait({waiting, behind}, timeout=20)
    assert waiting.cancelled()
    assert behind.done()
    assert room.used == 60
