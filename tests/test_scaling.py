"""The simulation of many actors, where the answer is known; and the page that is made of it."""

import importlib.util
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

PATH = Path(__file__).parents[1] / "docs" / "results" / "scaling.py"
spec = importlib.util.spec_from_file_location("scaling", PATH)
assert spec is not None
assert spec.loader is not None
scaling = sys.modules["scaling"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scaling)

FREE = scaling.Costs(num_slots=12, num_phases=2, streams=False, chunk_s=(0.5,))
"""Equal chunks; everything else costs nothing."""


@pytest.fixture(params=["synchronous", "asynchronous"])
def simulated(request):
    return scaling.SIMULATED[request.param]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("num_actors", [1, 2, 3, 5, 6, 7, 11, 12, 13, 256])
def test_equal_chunks_take_as_many_turns_as_an_actor_has_slots(num_actors, streams):
    costs = replace(FREE, streams=streams)
    turns = -(-12 // num_actors)
    assert scaling.synchronous_s(costs, num_actors) == pytest.approx(2 * turns * 0.5)
    assert scaling.asynchronous_s(costs, num_actors) == pytest.approx(turns * 0.5)
    assert scaling.bounds(costs, num_actors)["slots"] == pytest.approx(12 / turns)


def test_without_overheads_it_is_linear_up_to_the_number_of_slots(simulated):
    costs = replace(FREE, num_slots=16)
    one = simulated(costs, 1)
    assert [one / simulated(costs, n) for n in (1, 2, 4, 8, 16)] == pytest.approx([1, 2, 4, 8, 16])
    assert simulated(costs, 256) == pytest.approx(simulated(costs, 16))


def test_a_learner_that_takes_for_ever_leaves_nothing_to_gain(simulated):
    costs = replace(FREE, learner_s=1e6)
    assert simulated(costs, 1) / simulated(costs, 256) == pytest.approx(1.0, abs=1e-4)


def test_synchronous_parts_add_up_and_asynchronous_ones_overlap():
    costs = replace(FREE, num_phases=1, learner_s=3.0, rest_s=0.25)
    for num_actors, collecting in ((1, 6.0), (2, 3.0), (4, 1.5)):
        both = scaling.synchronous_s(costs, num_actors)
        longer = scaling.asynchronous_s(costs, num_actors)
        assert both == pytest.approx(collecting + 3.25)
        assert longer == pytest.approx(max(collecting, 3.25))
        amdahl = 9.25 / (collecting + 3.25)
        assert scaling.bounds(costs, num_actors)["learner"] == pytest.approx(amdahl)


def test_the_driver_takes_chunks_one_after_the_other(simulated):
    costs = replace(FREE, num_slots=64, num_phases=1, driver_s=0.1, chunk_s=(0.01,))
    assert simulated(costs, 64) == pytest.approx(64 * 0.1, rel=0.02)
    assert simulated(costs, 256) == pytest.approx(64 * 0.1, rel=0.02)


def test_a_collection_lasts_as_long_as_its_slowest_chunk():
    costs = replace(FREE, num_slots=200, num_phases=1, chunk_s=(0.1, 0.1, 0.1, 5.0))
    assert scaling.synchronous_s(costs, 256) == pytest.approx(5.0)
    # With one actor a slow chunk delays nothing but itself.
    mean = sum(costs.chunk_s) / 4
    assert scaling.synchronous_s(costs, 1) == pytest.approx(200 * mean, rel=0.1)


def test_finer_slots_are_the_same_work_with_more_steps():
    fine = scaling.finer(FREE, 4)
    assert scaling.synchronous_s(fine, 1) == pytest.approx(scaling.synchronous_s(FREE, 1))
    assert scaling.synchronous_s(FREE, 48) == pytest.approx(2 * 0.5)
    assert scaling.synchronous_s(fine, 48) == pytest.approx(2 * 0.125)
    heavy = replace(FREE, chunk_mb=8.0, block_mb=4.0)
    assert scaling.finer(heavy, 4).serial_s(64) == pytest.approx(heavy.serial_s(64))


def test_chunks_of_other_nodes_go_over_the_network():
    costs = replace(FREE, chunk_mb=90.0, block_mb=10.0, network_mb_s=100.0, actors_per_node=4)
    assert costs.serial_s(4) == 0.0
    assert costs.serial_s(8) == pytest.approx(2 * 12 * 1.0 / 2)
    assert costs.serial_s(16) == pytest.approx(2 * 12 * 1.0 * 3 / 4)


def test_a_seed_gives_one_answer(simulated):
    costs = replace(FREE, chunk_s=(0.1, 0.2, 0.7))
    assert simulated(costs, 3, seed=1) == simulated(costs, 3, seed=1)
    assert simulated(costs, 3, seed=1) != simulated(costs, 3, seed=2)


def result_of(costs, **changes):
    """What a measurement writes, read again."""
    result = {
        "preset": "maml-trpo/half-cheetah-dir",
        "num_members": 40,
        "max_lag": 0,
        "costs": asdict(costs),
        "seconds": {"synchronous": {1: [12.0, 12.5, 11.0], 2: [6.0]}},
        "load": 0.1,
        "machine": {"cores": 2, "processor": "a processor"},
    }
    return json.loads(json.dumps(result | changes))


def test_the_page_has_what_was_measured_and_what_follows(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{scaling.MARKS[0]}\nold\n{scaling.MARKS[1]}\nafter\n")
    both = {"synchronous": {"1": [12.0], "2": [6.0]}, "asynchronous": {"1": [6.0], "2": [3.0]}}
    results = [result_of(FREE), result_of(FREE, preset="a2c/half-cheetah", seconds=both)]
    for _ in range(2):  # twice, to see that it is replaced
        scaling.rewrite(page, results)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert text.count("### ") == 2
    assert "| synchronous | 12.000 | 12.000 | 6.000 | 6.000 |" in text
    assert "| asynchronous | 6.000 | 6.000 | 3.000 | 3.000 |" in text
    assert "| 16 | 12.0 | 16.0 | 16.0 | 12.0 | 16.0 | 16.0 |" in text
    scaling.draw(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_in_the_repository_is_that_of_the_script(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(scaling.PAGE.read_text())
    results = [json.loads(path.read_text()) for path in sorted(scaling.FOLDER.glob("*.json"))]
    assert results
    scaling.rewrite(page, results)
    assert page.read_text() == scaling.PAGE.read_text()
    assert scaling.FIGURE.exists()


def test_receipts_and_clocks_become_costs():
    from actors.rollout import Receipt, make_slots
    from system.phase import summarise

    slots = make_slots(4, 1, 2, 1)
    receipts = [Receipt(slot.id, 1, 10, [], [], 0.25, 1, 2**20, "here", 1.0) for slot in slots]
    phase = summarise(slots, receipts, 4, seconds=0.6)
    row = {"wall_s": 2.0, "driver_s": 0.04, "phases": [phase, phase], "learner_s": 0.5}
    costs = scaling.costs_of([row, row], streams=True, block_mb=0.5)
    expected = {
        **{"num_slots": 2, "num_phases": 2, "streams": True, "chunk_mb": 1.0, "block_mb": 0.5},
        **{"handover_s": 0.05, "driver_s": 0.01, "learner_s": 0.5, "rest_s": 0.3},
    }
    assert costs.chunk_s == (0.25,) * 8
    assert {name: getattr(costs, name) for name in expected} == pytest.approx(expected)
