"""The soak of `benchmarks/soak`, a minute of it on every broker; and its judge, who must see what goes wrong."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from judge import MIB, TOLERANCES, Record, breaches

ROOT = Path(__file__).parents[2]


def test_a_minute_of_long_jobs_under_a_short_lease(aws: str, gcp: str) -> None:
    # All brokers at once: it is waiting, not work.
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.soak", "--minutes", "1", "--jobs", "5", "45"],
        cwd=ROOT,
        env={**os.environ, "REJOINDER_TEST_AWS": aws, "REJOINDER_TEST_PUBSUB": gcp},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("all held") == 3, done.stdout


FLAT = [(float(second), 100.0) for second in range(100)]
GOOD = Record(
    lease=10,
    sent=[1, 2, 3],
    starts=[1, 2, 3],
    longest_job=30.0,
    answers=[(3, 200), (1, 200), (2, 200)],
    leases_lost=0,
    exit_code=0,
    load=(0.0, 100.0),
    series=dict.fromkeys(TOLERANCES, FLAT),
)


def test_a_good_soak_passes() -> None:
    assert breaches(GOOD) == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"starts": [1, 2, 3, 2]}, "premature redelivery: 1 requests were started more than once, such as 2"),
        ({"leases_lost": 1}, "premature redelivery: the worker lost 1 leases"),
        ({"answers": [(1, 200), (2, 200)]}, "lost: 1 of 3 requests have no answer, such as 3"),
        ({"answers": [*GOOD.answers, (2, 200)]}, "answered twice: 1 requests, such as 2"),
        ({"answers": [*GOOD.answers, (None, 200)]}, "strange: 1 answers to what was not asked, such as None"),
        ({"answers": [(1, 200), (2, 200), (3, 504)]}, "failed: 1 answers have another status than 200"),
        ({"exit_code": -9}, "the worker ended with -9"),
        ({"longest_job": 9.9}, "nothing was proved: no job was longer than the lease of 10 s"),
        ({"sent": [], "starts": [], "answers": []}, "nothing was proved: nothing was sent"),
    ],
)
def test_what_goes_wrong_is_said(changed: dict, said: str) -> None:
    found = breaches(dataclasses.replace(GOOD, **changed))
    assert len(found) == 1
    assert said in found[0]


@pytest.mark.parametrize(
    ("name", "start", "leak"),
    [("fds", 20, 0.1), ("threads", 8, 0.1), ("tasks", 75, 1), ("rss", 50 * MIB, MIB / 4)],
)
def test_what_grows_is_seen(name: str, start: float, leak: float) -> None:
    growing = [(float(second), start + leak * second) for second in range(100)]
    (found,) = breaches(dataclasses.replace(GOOD, series={**GOOD.series, name: growing}))
    assert found.startswith(f"growth: {name} from ")


@pytest.mark.parametrize("name", list(TOLERANCES))
def test_growth_during_the_warm_up_and_after_the_load_is_none(name: str) -> None:
    series = [(at, value / 2 if at < 25 else value) for at, value in FLAT] + [(101.0, 1e12)]
    assert breaches(dataclasses.replace(GOOD, series={**GOOD.series, name: series})) == []


def test_what_was_hardly_sampled_proves_nothing() -> None:
    (found,) = breaches(dataclasses.replace(GOOD, series={**GOOD.series, "fds": FLAT[::20]}))
    assert "fds was sampled too seldom" in found
