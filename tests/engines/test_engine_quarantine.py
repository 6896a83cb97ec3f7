"""Suspects and the gate: who is suspected, who runs with whom, and that nobody waits for ever."""

import asyncio
import itertools

import pytest
from engine_harness import eventually
from host_harness import QUICK, engine_process, request, running
from poisoned import came, lives

from rejoinder.worker import errors
from rejoinder.worker.engines.host import EngineProcess, HostSettings
from rejoinder.worker.engines.protocol import EngineRequest
from rejoinder.worker.engines.quarantine import Gate, Suspects

pytestmark = pytest.mark.usefixtures("own_children")


def named(name, attempt=1):
    return request("echo", name=name, attempt=attempt)


def test_who_is_suspected_and_in_what_company():
    suspects = Suspects()
    assert [suspects.company(named("a", attempt), 32) for attempt in (None, 1, 2)] == [0, 0, 0]
    assert suspects.company(named("a", 3), 32) == 1
    assert suspects.died([named("a"), named("b")]) is None
    assert [suspects.company(named("a", attempt), 32) for attempt in (None, 1, 2, 3)] == [8, 8, 8, 1]
    assert suspects.company(named("a"), 3) == 1
    suspects.died([named("a", 2), named("c", 2)])
    assert suspects.company(named("a", 2), 32) == 1
    assert suspects.company(named("b", 2), 32) == 8
    suspects.acquit(named("a"))
    assert suspects.company(named("a"), 32) == 0


def test_guilt_is_proven_by_a_suspect_s_death_alone():
    suspects = Suspects()
    assert suspects.died([]) is None
    assert suspects.died([named("a")]) is None  # may be chance: it was the only one that ran
    assert suspects.died([named("a", 2)]) == "a"
    assert suspects.died([named("b", 2), named("a", 2)]) is None
    assert suspects.died([named("c", 3)]) == "c"


def test_memory_is_bounded_and_the_longest_ago_are_forgotten():
    suspects = Suspects(limit=2)
    for name in "abac":
        suspects.died([named(name)])
    assert [suspects.company(named(name), 32) for name in "abc"] == [1, 0, 8]


def test_many_attempts_are_suspected_less_as_such_requests_end_well_until_the_next_death():
    suspects, seen = Suspects(), []
    while (company := suspects.company(named("x", 4), 16)) != 0:
        seen.append(company)
        for number in range(company):
            suspects.acquit(named(f"x{number}", 4))
    assert seen == [1, 2, 4, 4, 4, 4]
    suspects.died([named("y")])
    assert suspects.company(named("x", 4), 16) == 1


class Crowd:
    """Tasks that pass a gate, and stay inside until they are told to go."""

    def __init__(self):
        self.usable = True
        self.gate = Gate(lambda: self.usable)
        self.inside = []
        self.order = []
        self.waiting = []
        self.tasks = {}
        self._go = {}

    async def _pass(self, name, company):
        def waits(waiting):
            (self.waiting.append if waiting else self.waiting.remove)(name)

        await self.gate.enter(company, waits)
        try:
            self.inside.append(name)
            self.order.append(name)
            await self._go[name].wait()
        finally:
            self.inside.remove(name)
            self.gate.leave()

    async def come(self, **companies):
        for name, company in companies.items():
            self._go[name] = asyncio.Event()
            self.tasks[name] = asyncio.create_task(self._pass(name, company))
        await settle()

    async def go(self, *names):
        for name in names:
            self._go[name].set()
        await settle()


async def settle():
    for _ in range(10):
        await asyncio.sleep(0)


async def test_suspects_run_alone_in_their_group_and_both_sides_take_turns():
    crowd = Crowd()
    await crowd.come(f1=0, f2=0)
    await crowd.come(s1=2, s2=2, s3=2, s4=1)
    await crowd.come(f3=0, f4=0)
    assert (crowd.inside, crowd.waiting) == (["f1", "f2"], ["s1", "s2", "s3", "s4", "f3", "f4"])
    assert not crowd.gate.open
    assert crowd.gate.held == 8
    await crowd.go("f1")
    assert crowd.inside == ["f2"]
    await crowd.go("f2")
    assert crowd.inside == ["s1", "s2"]
    await crowd.go("s1")
    await crowd.come(f5=0)
    assert crowd.inside == ["s2"]
    await crowd.go("s2")
    assert crowd.inside == ["f3", "f4", "f5"]
    await crowd.come(f6=0)
    await crowd.go("f3", "f4", "f5")
    assert crowd.inside == ["s3"]  # the next in the line runs alone, so this one does too
    await crowd.go("s3")
    assert crowd.inside == ["f6"]
    await crowd.go("f6")
    assert crowd.inside == ["s4"]
    await crowd.go("s4")
    assert crowd.gate.open
    await crowd.come(f7=0)
    assert (crowd.inside, crowd.waiting, crowd.gate.held) == (["f7"], [], 1)
    await crowd.go("f7")


async def test_endless_fresh_ones_and_endless_suspects_both_get_on():
    crowd, numbers = Crowd(), itertools.count()

    async def more():
        await crowd.come(**{f"{kind}{next(numbers)}": company for kind, company in (("f", 0), ("s", 1))})

    await more()
    for _ in range(20):
        await more()
        await crowd.go(*crowd.inside)
    for kind in "fs":
        assert sum(name.startswith(kind) for name in crowd.order) >= 8
    for task in crowd.tasks.values():
        task.cancel()
    await asyncio.gather(*crowd.tasks.values(), return_exceptions=True)
    assert crowd.gate.held == 0


@pytest.mark.parametrize("late", [False, True])
async def test_cancelling_leaves_the_gate(late):
    """Late: in the same moment as its turn comes."""
    crowd = Crowd()
    await crowd.come(f1=0)
    await crowd.come(s1=1)
    await crowd.come(f2=0)
    assert crowd.inside == ["f1"]
    if late:
        crowd._go["f1"].set()
        await asyncio.sleep(0)  # f1 leaves, s1 is let in, and has not run yet
        assert crowd.inside == []
    crowd.tasks["s1"].cancel()
    await settle()
    assert crowd.inside == (["f2"] if late else ["f1", "f2"])
    await crowd.go("f1", "f2")
    assert crowd.gate.held == 0
    assert crowd.gate.open


async def test_nobody_enters_without_a_process_and_all_can_be_refused():
    crowd = Crowd()
    crowd.usable = False
    await crowd.come(f1=0, s1=1, s2=1, s3=1)
    assert crowd.inside == []
    crowd.tasks["s1"].cancel()
    crowd.usable = True
    crowd.gate.turn()
    await settle()
    assert crowd.inside == ["s2"]
    crowd.gate.refuse(lambda: errors.Unavailable("no"))
    await settle()
    for name in ("f1", "s3"):
        with pytest.raises(errors.Unavailable):
            await crowd.tasks[name]
    assert crowd.waiting == ["s1"]  # who was cancelled is told nothing more
    await crowd.go("s2")
    assert crowd.gate.held == 0


def poisoned(name, attempt=1, **body):
    return EngineRequest("/do", {"n": name, **body}, name, 1, attempt)


async def test_suspects_wait_for_the_next_process_and_are_forgotten_after_it(tmp_path):
    journal = tmp_path / "journal"
    settings = HostSettings(start_seconds=120, restart_backoff=0.02, max_deaths=2)
    engine = EngineProcess("poisoned:create", {"journal": str(journal), "capacity": 8}, settings)
    await engine.start()
    calls = [engine.generate(poisoned(name, steps=500)) for name in "abc"]
    results = await asyncio.gather(
        *calls, engine.generate(poisoned("k", kills="exit", steps=10)), return_exceptions=True
    )
    assert {type(result) for result in results} == {errors.Unavailable}
    assert engine.capacity == 0
    assert engine.deaths == 1
    # All at once while there is no process: none is told to come back, and the killer takes at most its group.
    calls = [engine.generate(poisoned(name, 2)) for name in "abc"]
    results = await asyncio.gather(*calls, engine.generate(poisoned("k", 3, kills="exit")), return_exceptions=True)
    assert results[:3] == ["a", "b", "c"]
    assert isinstance(results[3], errors.Unavailable)
    await eventually(lambda: engine.capacity == 8)
    assert engine.deaths == 0
    for _ in range(3):  # more than max_deaths, all its own
        with pytest.raises(errors.Unavailable, match="exit status 9"):
            await engine.generate(poisoned("k", 3, kills="exit"))
    await eventually(lambda: engine.capacity == 8)
    company = came(journal) + 3
    together = await asyncio.gather(*[engine.generate(poisoned(name, steps=5, company=company)) for name in "abc"])
    assert together == ["a", "b", "c"]
    await engine.stop()
    assert frozenset("abc") in lives(journal)[-1].together
    assert all(company == {"k"} for life in lives(journal)[1:] for company in life.together if "k" in company)


async def test_an_engine_that_every_request_kills_ends_it():
    async with engine_process() as engine:
        for number in range(QUICK.max_deaths):
            with pytest.raises(errors.Unavailable):
                await engine.generate(request("exits", 1, name=f"r{number}", attempt=3))
        async with asyncio.timeout(60):
            await engine.wait_gone()
        with pytest.raises(errors.EngineGone, match="3 times in a row"):
            await engine.generate(request("echo", attempt=3))


async def test_stopping_refuses_who_waits_at_the_gate_at_once():
    engine = EngineProcess("misbehaving:create", {}, QUICK)
    await engine.start()
    (inside,) = await running(engine, "n")
    waiting = [asyncio.create_task(engine.generate(request("echo", attempt=attempt))) for attempt in (3, 1)]
    await settle()
    assert engine.held == 3
    stopping = asyncio.create_task(engine.stop())
    for call in waiting:
        with pytest.raises(errors.Unavailable, match="stopped"):
            await call
    assert not stopping.done()
    await stopping
    with pytest.raises(errors.Unavailable):
        await inside
    with pytest.raises(errors.Unavailable):
        await engine.generate(request("echo", attempt=3))


async def test_an_engine_that_is_gone_refuses_who_waits(tmp_path):
    async with engine_process(die_after_first_load=str(tmp_path / "loaded")) as engine:
        with pytest.raises(errors.Unavailable):
            await engine.generate(request("exits", 1))
        async with asyncio.timeout(60):
            with pytest.raises(errors.EngineGone):
                await engine.generate(request("echo", attempt=3))
            await engine.wait_gone()
