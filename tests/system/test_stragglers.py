"""Which actor is slow, by the receipts of its chunks."""

import pytest

from actors.rollout import Receipt
from system.stragglers import IN_A_ROW, SLOW, Stragglers, paces, slowness


def receipts(**seconds):
    """One chunk of ten steps of each actor, which is called by a letter and runs on node-<it>."""
    return [
        Receipt(0, 1, 10, [], [], own, ord(name), 1, f"node-{name}", 1.0)
        for name, own in seconds.items()
    ]


def test_pace_is_seconds_per_step_of_all_chunks_of_an_actor():
    both = [*receipts(a=1.0, b=2.0), *receipts(a=2.0)]
    assert paces(both) == {(97, "node-a"): 3.0 / 20, (98, "node-b"): 2.0 / 10}


def test_processes_of_two_machines_may_have_one_number():
    one, other = receipts(a=1.0, b=2.0)
    same = Receipt(**{**vars(other), "worker": one.worker})
    assert set(paces([one, same])) == {(97, "node-a"), (97, "node-b")}


def test_an_actor_without_a_valid_step_has_no_pace():
    (one,) = receipts(a=1.0)
    assert paces([Receipt(**{**vars(one), "num_steps": 0})]) == {}


@pytest.mark.parametrize(
    ("pace", "expected"),
    [
        ({}, {}),
        ({"a": 1.0}, {}),
        ({"a": 1.0, "b": 20.0}, {"a": 1 / 20, "b": 20.0}),
        ({"a": 1.0, "b": 2.0, "c": 9.0}, {"a": 1 / 5.5, "b": 2 / 5, "c": 6.0}),
    ],
)
def test_slowness_is_measured_by_the_median_of_the_others(pace, expected):
    assert slowness(pace) == pytest.approx(expected)


def test_the_ratio_is_that_of_the_slowest():
    told = Stragglers().note(receipts(a=1.0, b=1.0, c=3.0))
    assert told == pytest.approx({"perf/slowest_actor_ratio": 3.0})
    assert Stragglers().note(receipts(a=1.0)) == {}


def test_who_is_slow_for_long_is_named_once(caplog):
    watch = Stragglers()
    for _ in range(3 * IN_A_ROW):
        watch.note(receipts(a=1.0, b=1.0, c=20.0))
    (record,) = caplog.records
    assert "actor process 99 on node-c takes 20.0 times as long" in record.getMessage()
    for _ in range(IN_A_ROW):
        watch.note(receipts(a=SLOW, b=1.0, c=1.0))
    assert len(caplog.records) == 2


def test_who_is_slow_now_and_then_is_not(caplog):
    watch = Stragglers()
    for _ in range(5):
        for _ in range(IN_A_ROW - 1):
            watch.note(receipts(a=1.0, b=1.0, c=20.0))
        watch.note(receipts(a=1.0, b=1.0, c=1.0))
    assert caplog.records == []
