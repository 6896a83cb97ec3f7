"""Which waiting sequences run together: within the budget, of like lengths, everyone once and nobody too late."""

from hypothesis import given
from hypothesis import strategies as st

from rejoinder.worker.engines.length_pool import Pool, Tokens

LENGTHS = st.lists(st.lists(st.integers(1, 60), max_size=12), max_size=6)


def add(pool, name, lengths):
    return pool.add([Tokens([0] * length) for length in lengths], [(name, at) for at in range(len(lengths))])


def owners(batch):
    return [waiting.owner for waiting in batch]


def lengths(batch):
    return [waiting.length for waiting in batch]


@given(LENGTHS, st.integers(1, 200), st.integers(0, 50))
def test_each_runs_once_within_the_budget_sorted_and_with_little_padding(requests, budget, slack):
    pool = Pool(budget, slack)
    for name, sizes in enumerate(requests):
        add(pool, name, sizes)
    seen = []
    while batch := pool.take():
        sizes = lengths(batch)
        assert sizes == sorted(sizes)
        assert len(batch) == 1 or sizes[-1] * len(batch) <= budget
        assert sizes[-1] * len(batch) - sum(sizes) <= slack * (len(batch) - 1)
        seen += owners(batch)
    assert sorted(seen) == [(name, at) for name, sizes in enumerate(requests) for at in range(len(sizes))]
    assert len(pool) == 0


def test_equal_lengths_fill_the_budget():
    pool = Pool(100, 10)
    add(pool, "a", [10] * 25)
    assert [len(pool.take()) for _ in range(3)] == [10, 10, 5]
    assert pool.take() == []


def test_like_lengths_run_together_whenever_they_came():
    pool = Pool(100, 5)
    for name, size in enumerate([10, 50, 11, 49, 9]):
        add(pool, name, [size])
    assert lengths(pool.take()) == [9, 10, 11]
    assert lengths(pool.take()) == [49, 50]


def test_what_is_longer_than_the_budget_runs_alone():
    pool = Pool(20, 50)
    add(pool, "a", [30, 5, 31])
    assert lengths(pool.take()) == [30]
    assert lengths(pool.take()) == [5]
    assert lengths(pool.take()) == [31]


def test_a_request_of_many_does_not_hold_up_one_of_few():
    pool = Pool(10, 0)
    add(pool, "many", [10] * 100)
    for _ in range(20):
        pool.take()
    add(pool, "few", [10])
    came = [owners(pool.take())[0][0] for _ in range(2)]
    assert "few" in came


def test_nobody_waits_for_ever_behind_a_stream_of_others():
    pool = Pool(20, 0)
    add(pool, "odd", [7])
    served = []
    for name in range(5):
        add(pool, name, [10, 10])
        served += owners(pool.take())
    assert ("odd", 0) in served[:1]


@given(LENGTHS, st.integers(0, 3))
def test_what_is_discarded_does_not_run(requests, taken):
    pool = Pool(64, 16)
    parts = [add(pool, name, sizes) for name, sizes in enumerate(requests)]
    seen = [owner for _ in range(taken) for owner in owners(pool.take())]
    for part in parts[::2]:
        pool.discard(part)
    before = len(seen)
    while batch := pool.take():
        seen += owners(batch)
    assert all(name % 2 for name, _ in seen[before:])
    assert {owner for owner in seen if owner[0] % 2} == {
        (name, at) for name, sizes in enumerate(requests) if name % 2 for at in range(len(sizes))
    }
