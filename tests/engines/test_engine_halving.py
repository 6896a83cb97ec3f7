"""Who is run again after a failed step: bounded, fair, and down to the one that cannot run."""

import math
import random

import pytest

from rejoinder.worker.engines.halving import GROW_AFTER, Halving


def run(halving, budget, left, fails):
    """One step of sequences with tokens `left`, as a scheduler makes it; true if it went well."""
    group = halving.group
    names = [name for name in left if group is None or name in group.names]
    if not names:
        halving.drop()
        return True
    tokens = halving.limit(budget) if group is None else min(budget, group.tokens)
    step = []
    for name in names:
        if tokens:
            step.append((name, min(left[name], tokens)))
            tokens -= step[-1][1]
    if fails(step):
        guilty = halving.failed(step, memory=True)
        if guilty is not None:
            left.pop(guilty)
        return False
    halving.succeeded(sum(count for _, count in step))
    for name, count in step:
        left[name] -= count
        if not left[name]:
            left.pop(name)
    return True


@pytest.mark.parametrize("seed", range(30))
def test_it_ends_and_only_the_guilty_are_given_up(seed):
    rng = random.Random(seed)
    budget = rng.choice([8, 64, 256])
    left = {f"s{i}": rng.choice([1, 1, 5, 100]) for i in range(rng.randint(1, 40))}
    poison = {name for name in left if rng.random() < 0.1}
    most = rng.choice([1, 3, 20, 10**6])
    halving, ended, in_a_row = Halving(), set(), 0
    bound = math.log2(40) + math.log2(256) + 3
    while left:
        before = set(left)
        well = run(
            halving,
            budget,
            left,
            lambda step: sum(c for _, c in step) > most or any(name in poison for name, _ in step),
        )
        if not well:
            ended |= before - set(left)
        # Given up is an end too: what follows is a failure of somebody else's.
        in_a_row = 0 if well or before != set(left) else in_a_row + 1
        assert in_a_row <= bound
    assert ended == poison
    assert halving.group is None or not halving.group.names & set(left)


def test_the_limit_grows_back():
    halving = Halving()
    names = [(f"s{i}", 1) for i in range(32)]
    assert halving.failed(names, memory=True) is None
    for size in (16, 16):
        assert len(halving.group.names) == size
        halving.succeeded(size)
    assert halving.group is None
    for limit in (16, 32, 64):
        assert halving.limit(100) == limit
        for _ in range(GROW_AFTER):
            assert halving.limit(100) == limit
            halving.succeeded(limit)
    assert halving.limit(100) == 100
    assert not halving.limited


def test_ones_own_failure_leaves_no_limit():
    halving = Halving()
    halving.failed([("a", 1), ("b", 1)], memory=True)
    halving.succeeded(1)
    assert halving.failed([("b", 1)], memory=True) is None, "tried once more"
    assert halving.failed([("b", 1)], memory=True) == "b"
    assert (halving.group, halving.limit(64)) == (None, 64)


def test_a_step_of_one_token_leaves_its_neighbours_their_room():
    halving = Halving()
    assert halving.failed([("a", 1)], memory=True) is None, "tried once more"
    halving.succeeded(1)
    assert (halving.group, halving.limit(64)) == (None, 64)


def test_the_limit_grows_back_where_steps_of_one_token_fail_now_and_then():
    halving = Halving()
    halving.failed([("a", 1), ("b", 1)], memory=True)
    for _ in range(2):
        halving.succeeded(1)
    for _ in range(GROW_AFTER):
        assert halving.limit(64) == 1
        halving.failed([("a", 1)], memory=True)
        halving.succeeded(1)
        halving.succeeded(1)
    assert halving.limit(64) == 2


def test_what_is_no_matter_of_memory_is_not_tried_in_smaller_parts():
    halving = Halving()
    assert halving.failed([("a", 64)], memory=False) is None
    assert halving.group.tokens == 64
    assert halving.failed([("a", 64)], memory=False) == "a"
