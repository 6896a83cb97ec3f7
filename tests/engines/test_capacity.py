"""The arithmetic of how many sequences fit in a cache, and of an engine's figures."""

import random

from rejoinder.worker.engines.capacity import Average, CacheCapacity, CacheUse
from rejoinder.worker.engines.protocol import EngineStats

EMPTY = CacheUse(free=100, margin=15, held=0, sequences=0)


def after(*seen, times=300):
    capacity = CacheCapacity(50, 10)
    for _ in range(times):
        for size, steps in seen:
            capacity.saw(size, steps)
    return capacity


def test_before_anything_was_seen_the_assumed_size_counts():
    assert CacheCapacity(20, 10).fits(EMPTY) == 4, "into an empty cache without its margin"
    assert CacheCapacity(20, 10).fits(CacheUse(free=80, margin=15, held=20, sequences=2)) == 5


def test_then_those_seen_lately():
    capacity = after((4.99, 10))
    assert capacity.fits(EMPTY) == 17
    for _ in range(300):
        capacity.saw(24.99, 10)
    assert capacity.fits(EMPTY) == 3


def test_a_long_sequence_counts_for_as_long_as_it_runs():
    """One of ten steps with nine of one step: at any moment about half of those in the cache are long ones."""
    capacity = after((10, 9), (1, 1), (1, 1), (1, 1), (1, 1), (1, 1), (1, 1), (1, 1), (1, 1), (1, 1))
    assert 15 <= capacity.fits(EMPTY) <= 17  # 85 / 5.5; by their plain average, 1.9, it would be 44


def test_what_has_just_begun_will_grow():
    assert after((19.9, 10)).fits(CacheUse(free=90, margin=15, held=10, sequences=5)) == 5


def test_what_is_larger_than_usual_leaves_less():
    assert after((4.99, 10)).fits(CacheUse(free=25, margin=15, held=75, sequences=1)) == 3


def test_what_is_shared_is_room_for_more():
    assert after((19.9, 10)).fits(CacheUse(free=60, margin=0, held=200, sequences=10)) == 13


def test_a_full_cache_still_takes_one():
    capacity = after((1000, 10))
    assert capacity.fits(EMPTY) == 1
    assert capacity.fits(CacheUse(free=0, margin=15, held=100, sequences=0)) == 1
    assert capacity.fits(CacheUse(free=0, margin=15, held=100, sequences=7)) == 1


def test_a_steady_mix_gives_a_steady_number():
    chance, capacity, numbers = random.Random(5), CacheCapacity(50, 10), []
    for n in range(2000):
        steps = chance.randint(8, 24)
        capacity.saw(2 + steps / 8, steps)
        if n > 200:
            numbers.append(capacity.fits(CacheUse(free=1000, margin=0, held=0, sequences=0)))
    assert max(numbers) - min(numbers) <= 0.1 * max(numbers)


def test_the_first_observations_weigh_most_then_the_latest():
    average = Average(10.0)
    average.add(20.0)
    assert average.value == 15.0
    for _ in range(1000):
        average.add(3.0)
    assert abs(average.value - 3.0) < 1e-6


def test_an_interval_is_a_difference():
    whole = EngineStats(10, 40, 80, 100, 3.0)
    assert whole - EngineStats(4, 10, 32, 30, 1.0) == EngineStats(6, 30, 48, 70, 2.0)
    assert (whole - whole).occupancy == 0.0
