"""Requests that kill the engine process: they end with their own 503, and nobody else's attempts are used up."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from poisoned import deaths
from worker_harness import Bench, bench, until, until_backlog, until_empty

from rejoinder.worker.engines.host import EngineProcess, HostSettings
from rejoinder.worker.engines.pool import EnginePool
from rejoinder.worker.engines.protocol import EngineRequest
from rejoinder.worker.engines.quarantine import Suspects

CAPACITY = 32
QUICK = {"start_seconds": 120.0, "restart_backoff": 0.02, "restart_backoff_limit": 0.1}


def engine(
    journal: Path, *, capacity: int = CAPACITY, suspects: Suspects | None = None, **settings: Any
) -> EngineProcess:
    journal.touch()
    config = {"journal": str(journal), "capacity": capacity}
    return EngineProcess("poisoned:create", config, HostSettings(**{**QUICK, **settings}), suspects)


async def send(it: Bench, name: str, **body: Any) -> None:
    envelope = {"path": "/do", "metadata": {"n": name}, "body": {"n": name, **body}}
    await it.send_raw(json.dumps(envelope).encode())


def outcomes(it: Bench) -> dict[str, tuple[int, int]]:
    """Status and attempt of each answer, by the request's name."""
    assert len({response["metadata"]["n"] for response, _ in it.got}) == len(it.got)
    return {
        response["metadata"]["n"]: (response["status_code"], int(message.attributes["attempt"]))
        for response, message in it.got
    }


@pytest.mark.parametrize("kills", ["exit", "thread"])
@pytest.mark.parametrize("killers", [1, 3])
async def test_killers_end_and_their_neighbours_are_answered(
    tmp_path: Path, kills: str, killers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rejoinder.worker.engines.process.DOUBT_SECONDS", 60.0)
    journal, fresh = tmp_path / "journal", 60
    async with bench(engine(journal), start=False, prefetch=0) as it:
        for number in range(CAPACITY):
            if number % 10 == 3 and number // 10 < killers:
                await send(it, f"killer{number}", kills=kills, steps=10, company=CAPACITY)
            else:
                await send(it, f"neighbour{number}", steps=30, company=CAPACITY)
        it.start()
        await until(lambda: deaths(journal))
        for number in range(fresh):
            await send(it, f"fresh{number}", steps=3)
            await asyncio.sleep(0.03)  # a stream
        await it.responses_until(CAPACITY + fresh, limit=200)
        await until_empty(it)
    answers = outcomes(it)
    assert {name: answer for name, answer in answers.items() if name.startswith("killer")} == {
        f"killer{number * 10 + 3}": (503, 5) for number in range(killers)
    }
    for name, (status, attempt) in answers.items():
        if name.startswith("neighbour"):
            assert (status, attempt <= 3) == (200, True), (name, status, attempt)
        elif name.startswith("fresh"):
            assert (status, attempt) == (200, 1), name
    first, *later = deaths(journal)
    assert len(first) == CAPACITY
    # Together at first, at most once each in a group, then three times alone.
    assert 1 + 3 * killers < len(later) + 1 <= 1 + 4 * killers
    assert all(len(victims) <= CAPACITY // 4 for victims in later)
    assert sum(len(victims) == 1 for victims in later) >= 3 * killers


async def test_a_killer_in_one_of_two_processes_harms_nobody_in_the_other(tmp_path: Path) -> None:
    journal, suspects = tmp_path / "journal", Suspects()
    pool = EnginePool([engine(journal, capacity=CAPACITY // 2, suspects=suspects) for _ in range(2)], suspects)
    async with bench(pool, start=False, prefetch=0) as it:
        await send(it, "killer", kills="exit", steps=10)
        for number in range(2 * CAPACITY):
            await send(it, f"neighbour{number}", steps=30)
        it.start()
        await it.responses_until(2 * CAPACITY + 1, limit=200)
        await until_empty(it)
    answers = outcomes(it)
    assert answers.pop("killer") == (503, 5)
    assert {status for status, _ in answers.values()} == {200}
    assert max(attempt for _, attempt in answers.values()) <= 3
    # The journal has the processes by their births, and which of the two is born first is chance.
    first, *later = sorted(deaths(journal), key=len, reverse=True)
    assert len(first) <= CAPACITY // 2
    assert sum(attempt > 1 for _, attempt in answers.values()) == len(first) - 1
    assert [len(victims) for victims in later[1:]] == [1, 1, 1]


async def test_a_lone_killer_reaches_its_cap_and_the_worker_lives(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    async with bench(engine(journal, max_deaths=2), max_attempts=4) as it:
        await send(it, "killer", kills="exit")
        await it.responses_until(1, limit=60)
        await send(it, "innocent")
        await it.responses_until(2, limit=60)
    assert outcomes(it) == {"killer": (503, 4), "innocent": (200, 1)}
    assert deaths(journal) == [{"killer"}] * 4


async def test_a_hanging_request_is_found_too(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    async with bench(engine(journal, hang_seconds=3.0), start=False, max_attempts=3, prefetch=0) as it:
        await send(it, "killer", kills="hang")
        it.start()
        await until(lambda: "in killer" in journal.read_text())
        # Its neighbours' progress keeps it from being noticed for as long as they run.
        await send(it, "neighbour", steps=10)
        await it.responses_until(2, limit=60)
    assert outcomes(it) == {"killer": (503, 3), "neighbour": (200, 1)}
    assert deaths(journal) == [{"killer"}] * 3


async def test_time_at_the_gate_is_not_the_request_s_own(tmp_path: Path) -> None:
    """Suspects that run one after the other, all together for longer than the time limit of each."""
    journal = tmp_path / "journal"
    async with bench(engine(journal), start=False, invocation_timeout_seconds=5, prefetch=0) as it:
        await send(it, "killer", kills="exit", steps=20)
        for number in range(20):
            await send(it, f"neighbour{number}", steps=80)
        it.start()
        await it.responses_until(21, limit=200)
    answers = outcomes(it)
    assert answers.pop("killer") == (503, 5)
    assert {status for status, _ in answers.values()} == {200}


async def test_what_waits_at_the_gate_goes_back_at_once_when_the_worker_stops(tmp_path: Path) -> None:
    journal, suspects = tmp_path / "journal", Suspects()
    suspects.died([EngineRequest("/do", {}, name, 1) for name in ("one", "two")])
    async with bench(engine(journal, suspects=suspects), prefetch=0, grace_seconds=60) as it:
        await send(it, "runs", steps=600)
        await until(lambda: "in runs" in journal.read_text())
        waiting = {"path": "/do", "metadata": {"n": "one"}, "body": {"n": "one"}, "options": {"inference_id": "one"}}
        await it.send_raw(json.dumps(waiting).encode())
        await until_backlog(it, lambda backlog: backlog.held == 2)
        it.signals.receive("SIGTERM")
        await until_backlog(it, lambda backlog: (backlog.waiting, backlog.held) == (1, 1))
        await it.responses_until(1, limit=60)
    assert outcomes(it) == {"runs": (200, 1)}
