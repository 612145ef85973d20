"""Runs of lifetimes: renewal, backends, resuming, evaluation."""

import io
import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from rich.console import Console

from actors.tasks import load_family
from actors.tasks.delayed_chains import CHAINS
from learners.config import LpgAgentConfig, LpgConfig
from system import evaluation, run_folder
from system.config import RuntimeConfig
from system.loop import Counters, Loop, evaluation_tasks
from system.phase import by_tenth
from system.presets import PRESETS
from system.run import evaluate, make_backend, train

pytestmark = pytest.mark.usefixtures("torch_threads")

BOTH, SHORT = "chain-short,random-small-sparse", "chain-short"
MEASURED = ("perf/", "sys/", "time/iteration")
K, T, M, E = 2, 5, 4, 2
SMALL_RULE = {"rule_width": 4, "num_predictions": 3, "embedding_width": 2}


def lpg_run(names=BOTH, iterations=3, **settings):
    """Four lifetimes of three or four windows, of which two begin half way through."""
    learner = LpgConfig(
        num_inner_updates=K,
        num_steps=T,
        hidden=(4,),
        tabular_updates=6,
        network_updates=8,
        evaluation_updates=settings.pop("evaluation_updates", 19),
        members_per_block=1,
        **SMALL_RULE | settings,
    )
    return tiny("lpg/chain-and-small-grids", names, learner, iterations)


def taught_run(teacher="a2c", names=SHORT, iterations=3, **settings):
    """Four replicas that are not taught by a learned rule."""
    learner = LpgAgentConfig(teacher=teacher, num_steps=T, hidden=(4,), **SMALL_RULE | settings)
    return tiny("lpg-agent/chain-short", names, learner, iterations)


def tiny(preset, names, learner, iterations):
    runtime = RuntimeConfig(
        backend="serial", device="cpu", learner_threads=1, timeout_s=120.0, object_store_mb=100
    )
    return replace(
        PRESETS[preset](),
        task_options={"names": names},
        learner=learner,
        iterations=iterations,
        num_members=M,
        num_envs=E,
        members_per_slot=1,
        eval_tasks=M,
        eval_every=0,
        log_every=1,
        runtime=runtime,
    )


def loop_of(config):
    family = load_family(config.task, config.task_options)
    return Loop(config, family, make_backend(config, family))


def iterated(loop, number, counters=None):
    """Counters, learned metrics, and the members' tasks of each iteration."""
    counters, rows, members = counters or Counters(), [], []
    for _ in range(number):
        counters, metrics, skipped = loop.iterate(counters)
        assert skipped is None
        rows.append({n: v for n, v in metrics.items() if not n.startswith(MEASURED)})
        members.append([dict(task) for task in loop.members])
    return counters, rows, members


def state_of(loop):
    return loop.backend.learner("get_state")


# Renewal


def test_members_get_new_tasks_when_their_lifetimes_are_over_and_keep_their_worlds():
    """Ages before the first window: 0 and 3 of 6, 0 and 4 of 8; each window adds two."""
    loop = loop_of(lpg_run())
    counters, rows, members = iterated(loop, 5)
    assert [row["lpg/lifetimes_ended"] for row in rows] == [0.0, 2.0, 1.0, 1.0, 1.0]
    changed = [
        [new != old for new, old in zip(after, before, strict=True)]
        for before, after in pairwise(members)
    ]
    assert changed == [
        [False, False, False, False],
        [False, True, False, True],
        [True, False, False, False],
        [False, False, True, False],
    ]
    assert all([task["world"] for task in tasks] == [0, 0, 1, 1] for tasks in members)
    assert state_of(loop)["counters"]["lives"].tolist() == [1, 2, 1, 1]
    assert counters.env_steps == 5 * (K + 1) * T * M * E


def test_streams_are_renewed_once_at_the_head_of_a_window(monkeypatch):
    loop = loop_of(replace(lpg_run(), members_per_slot=2))
    counters, _, _ = iterated(loop, 2)
    collect, asked = loop.backend.collect, []

    def note(requests, carries):
        asked.append(requests)
        return collect(requests, carries)

    monkeypatch.setattr(loop.backend, "collect", note)
    iterated(loop, 2, counters)
    renewed = [[request.renew for request in requests] for requests in asked]
    assert renewed == [[(1,), (1,)], [(), ()], [(), ()], [(0,), ()], [(), ()], [(), ()]]
    for requests in asked[K + 1 :]:
        tasks = [dict(task) for request in requests for task in request.tasks]
        assert tasks == [dict(task) for task in loop.members]
    # The environments are in the levels that the loop believes them to be in.
    lengths = [CHAINS["chain-short"].level(task["level"])[0] for task in loop.members[:2]]
    saved = loop.carries[0].env["chain-short.length"]
    assert saved.tolist() == [lengths[0]] * E + [lengths[1]] * E


def test_every_agent_and_the_rule_learn():
    loop = loop_of(lpg_run())
    before = state_of(loop)
    iterated(loop, 1)
    after = state_of(loop)
    for group in ("params", "meta_params"):
        for name, p in after[group].items():
            assert (p != before[group][name]).any(), name


def test_a_skipped_window_is_begun_again_and_renews_again(monkeypatch, assert_same_state):
    loop = loop_of(lpg_run())
    counters, _, _ = iterated(loop, 2)
    before = state_of(loop)
    assert before["counters"]["renew"].tolist() == [False, True, False, True]
    collect = loop.backend.collect

    def spoil(requests, carries):
        monkeypatch.undo()
        arrivals = collect(requests, carries)
        arrivals[2].chunk.arrays["reward"][0, 1] = math.nan
        return arrivals

    old = [dict(task) for task in loop.members]
    monkeypatch.setattr(loop.backend, "collect", spoil)
    counters, metrics, skipped = loop.iterate(counters)
    assert (skipped.failure.tensor, skipped.failure.member) == ("reward", 2)
    assert metrics["meta/skipped_updates"] == 1.0
    assert_same_state(state_of(loop), before)
    _, _, (members,) = iterated(loop, 1, counters)
    assert [new == there for new, there in zip(members, old, strict=True)] == [
        *(True, False, True, False)
    ]
    assert state_of(loop)["lifetimes"]["age"].tolist() == [0, 2, 6, 2]


# Backends


@pytest.mark.ray
def test_ray_learns_of_lifetimes_bitwise_what_the_serial_backend_learns(assert_same_state):
    config = lpg_run()
    serial = loop_of(config)
    counters, rows, members = iterated(serial, 3)
    assert members[2] != members[0]
    _, curve = serial.evaluate(M)
    on_ray = replace(config, runtime=replace(config.runtime, backend="ray", num_actors=2))
    loop = loop_of(on_ray)
    try:
        found_counters, found, found_members = iterated(loop, 3)
        assert_same_state(state_of(loop), state_of(serial))
        _, found_curve = loop.evaluate(M)
    finally:
        loop.backend.close()
    assert found_counters == counters
    assert found_members == members
    np.testing.assert_equal(found, rows)
    np.testing.assert_array_equal(found_curve, curve)


# Resuming


def records(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {name: v for name, v in json.loads(line).items() if name.split("/")[0] in ("lpg", "meta")}
        for line in lines
    ]


FURTHER = {"ema_advantage": True, "adam_per_lifetime": True, "sees_lifetime": True}
RESUMED = {
    "early": (lpg_run(), 1),
    "before a renewal": (lpg_run(), 2),
    "after a renewal": (lpg_run(), 3),
    "tables alone": (lpg_run(SHORT), 2),  # their plain steps have no slots
    "with every option": (lpg_run(**FURTHER), 2),
    "taught on tables": (taught_run(), 2),
    "not taught": (taught_run("none", BOTH), 2),
}


@pytest.mark.parametrize(("config", "cut"), RESUMED.values(), ids=RESUMED)
def test_a_resumed_run_of_lifetimes_is_the_uninterrupted_one(
    config, cut, tmp_path, assert_same_state
):
    whole = replace(config, iterations=5)
    train(whole, tmp_path / "whole")
    train(replace(whole, iterations=cut), tmp_path / "halves")
    train(whole, tmp_path / "halves")
    expected, counters, _ = run_folder.restore(tmp_path / "whole")
    found, again, _ = run_folder.restore(tmp_path / "halves")
    assert again == counters
    assert "loop.members" in expected
    assert any(name.startswith("loop.carry") for name in expected)
    assert_same_state(found, expected)
    shown = [records(tmp_path / name) for name in ("whole", "halves")]
    np.testing.assert_equal(shown[1], shown[0])
    last = [
        json.loads((tmp_path / name / "evaluation.json").read_text())
        for name in ("whole", "halves")
    ]
    assert last[0] == last[1]


# Evaluation


def test_an_evaluation_is_ten_tenths_of_whole_lifetimes():
    loop = loop_of(lpg_run())
    iterated(loop, 2)
    tasks, curve = loop.evaluate(6)
    expected = evaluation_tasks(loop.family, loop.config.seed, 6)
    assert [dict(task) for task in tasks] == [dict(task) for task in expected]
    assert [task["world"] for task in tasks] == [0, 0, 0, 1, 1, 1]
    assert curve.shape == (6, 10)
    finite = curve[np.isfinite(curve)]
    assert finite.size > 10
    assert (np.abs(finite) <= 1.0).all()
    assert not np.isinf(curve).any()
    _, again = loop.evaluate(6)
    np.testing.assert_array_equal(again, curve)


def test_an_evaluation_leaves_the_training_of_lifetimes_alone(assert_same_state):
    """Before a window that renews, and before one that does not."""
    loop, undisturbed = loop_of(lpg_run()), loop_of(lpg_run())
    counters, rows = Counters(), []
    for _ in range(5):
        loop.evaluate(M + 2)
        counters, more, _ = iterated(loop, 1, counters)
        rows += more
    expected_counters, expected, _ = iterated(undisturbed, 5)
    assert counters == expected_counters
    np.testing.assert_equal(rows, expected)
    assert_same_state(state_of(loop), state_of(undisturbed))


def test_too_few_evaluation_tasks_for_the_worlds_are_refused():
    loop = loop_of(lpg_run())
    with pytest.raises(ValueError, match="cannot cover 2 kinds"):
        loop.evaluate(1)


@pytest.mark.parametrize("num_updates", [1, 3, 9, 10, 25])
def test_a_tenth_is_the_mean_of_what_is_finite_in_it(num_updates):
    rng = np.random.default_rng(0)
    curve = rng.normal(size=(3, num_updates))
    curve[rng.random(curve.shape) < 0.4] = math.nan
    found = by_tenth(curve)
    assert found.shape == (3, 10)
    pieces = np.array_split(np.arange(num_updates), 10)
    for m in range(3):
        for tenth, piece in enumerate(pieces):
            values = [curve[m, k] for k in piece if not math.isnan(curve[m, k])]
            expected = sum(values) / len(values) if values else math.nan
            np.testing.assert_allclose(found[m, tenth], expected)


PARTLY = np.array([[1.0, math.nan, math.nan], [3.0, 5.0, math.nan], [math.nan, 7.0, math.nan]])
LEVELS = [{"world": 0, "level": level} for level in (1, 2, 2)]


def strict(result):
    """The object as JSON without NaN, and back."""
    return json.loads(json.dumps(result, allow_nan=False))


@pytest.mark.parametrize("held_out", [True, False])
def test_what_is_said_of_a_part_is_said_of_those_whose_episodes_ended(held_out):
    result = evaluation.summarise("lpg/x", LEVELS, PARTLY, held_out)
    assert strict(result) == result
    assert [(row["k"], row["mean"]) for row in result["adapt"]] == [(0, 2.0), (1, 6.0)]
    assert result["gain"] == {"mean": 2.0, "ci95": [2.0, 2.0]}
    metrics = evaluation.as_metrics(result)
    assert metrics["eval/ep_rew_mean_1"] == 6.0
    assert np.isfinite(list(metrics.values())).all()
    if held_out:
        returns = [row["returns"] for row in result["per_task"]]
        assert returns == [[1.0, None, None], [3.0, 5.0, None], [None, 7.0, None]]
    else:
        assert [group["gain"] for group in result["groups"]] == [None, result["gain"]]
        assert [len(group["adapt"]) for group in result["groups"]] == [1, 2]
    stream = io.StringIO()
    evaluation.print_table(result, Console(file=stream, width=120))
    text = stream.getvalue()
    assert "nan" not in text
    assert "6.00" in text
    assert "all" in text


def test_an_evaluation_without_any_end_says_nothing():
    result = evaluation.summarise("lpg/x", LEVELS, np.full((3, 10), math.nan), held_out=True)
    assert strict(result) == result
    assert (result["adapt"], result["gain"]) == ([], None)
    assert evaluation.as_metrics(result) == {}
    evaluation.print_table(result, Console(file=io.StringIO()))


def test_a_return_that_is_infinite_is_not_passed_over():
    curve = PARTLY.copy()
    curve[1, 1] = math.inf
    with pytest.raises(ValueError, match="infinite"):
        evaluation.summarise("lpg/x", LEVELS, curve, held_out=True)


@pytest.mark.parametrize("num_updates", [1, 5, 19])
def test_a_run_ends_with_a_table_however_short_its_evaluation(num_updates, tmp_path):
    """Chains of up to 30 steps end in no update of the first tenths; some tenths have none."""
    result = train(lpg_run(evaluation_updates=num_updates), tmp_path / "run")
    written = json.loads(
        (tmp_path / "run" / "evaluation.json").read_text(), parse_constant=pytest.fail
    )
    assert written == result | {"iteration": 3}
    assert evaluate(tmp_path / "run", {})["adapt"] == result["adapt"]


@pytest.mark.parametrize("names", [SHORT, "random-small-sparse"])
def test_replicas_are_evaluated_on_the_levels_that_they_learned(names, tmp_path):
    """By the verb as at the end of their training: not on levels that they never saw."""
    config = replace(taught_run(names=names, iterations=20), num_members=12, eval_tasks=120)
    result = train(config, tmp_path / "run")
    again = evaluate(tmp_path / "run", {})
    assert (again["replicas"], again["adapt"]) == (12, result["adapt"])
