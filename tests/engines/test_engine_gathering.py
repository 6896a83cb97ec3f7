"""Which waiting sequences run together."""

from rejoinder.worker.engines.gathering import Bounds, gather


def test_like_runs_with_like():
    assert gather([], Bounds(rows=4)) == []
    assert gather([(10, 10)] * 9, Bounds(rows=4)) == [0, 1, 2, 3]
    assert gather([(10, 10), (500, 10), (12, 10), (10, 900), (10, 60)], Bounds(rows=9)) == [0, 2, 4]
    assert gather([(500, 10), (10, 10), (900, 10)], Bounds(rows=9)) == [0, 2]
    assert gather([(10, 10), (11, 10), (10, 10)], Bounds(rows=9, padding=False)) == [0, 2]
    # The third would pad the others: 3 rows of 30 and 10.
    assert gather([(10, 10), (10, 10), (30, 10)], Bounds(rows=9, tokens=119)) == [0, 1]
    assert gather([(10, 10), (10, 10), (30, 10)], Bounds(rows=9, tokens=120)) == [0, 1, 2]
    assert gather([(10, 10), (20, 10), (10, 90)], Bounds(rows=9, prompt_tokens=20)) == [0]
    assert gather([(10**6, 10**6), (1, 1)], Bounds(rows=9, tokens=5, prompt_tokens=5)) == [0]
