"""Runs on trials: collection, evaluation, comparison, Ray, resuming."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from actors.tasks import load_family
from learners.core.errors import ConfigError
from system import comparison, evaluation, run_folder
from system.backend import AGENTS
from system.config import RuntimeConfig
from system.loop import Counters, Loop
from system.phase import trial_metrics
from system.presets import PRESETS
from system.rl2_presets import RL2_PRESETS
from system.run import evaluate, make_backend, train
from system.statistics import landmarks

pytestmark = pytest.mark.usefixtures("torch_threads")

MEASURED = ("perf/", "sys/", "time/iteration")
TABLE = "trials:tabular-mdp"
OPTIONS = {
    "trials:bandit": {"arms": 3, "pulls": 1, "episodes": 4},
    TABLE: {"states": 3, "actions": 2, "horizon": 4, "episodes": 3},
    "trials:navigation-2d": {"horizon": 5, "episodes": 2},
    "trials:maze": {"horizon": 15, "episodes": 2},
}


def tiny(task="trials:bandit", iterations=3, **learner):
    """Six trials in three slots."""
    preset = PRESETS["rl2/bandit"]()
    runtime = RuntimeConfig(
        backend="serial", device="cpu", learner_threads=1, timeout_s=120.0, object_store_mb=100
    )
    small = {"width": 4, "num_epochs": 2, "num_minibatches": 2} | learner
    return replace(
        preset,
        task=task,
        task_options=OPTIONS[task],
        learner=replace(preset.learner, **small),
        iterations=iterations,
        num_members=6,
        members_per_slot=2,
        eval_tasks=5,
        runtime=runtime,
    )


def loop_of(config):
    family = load_family(config.task, config.task_options)
    return Loop(config, family, make_backend(config, family))


def iterated(loop, number=2):
    counters, rows = Counters(), []
    for _ in range(number):
        counters, metrics, skipped = loop.iterate(counters)
        assert skipped is None
        rows.append({n: v for n, v in metrics.items() if not n.startswith(MEASURED)})
    return counters, rows


# Collection


@pytest.mark.parametrize("task", OPTIONS)
def test_every_family_is_learned_from_in_trials(task):
    loop = loop_of(tiny(task))
    before = loop.backend.learner("get_state")
    counters, rows = iterated(loop)
    horizon = loop.family.spec.horizon
    assert 6 <= counters.env_steps <= 2 * 6 * horizon
    after = loop.backend.learner("get_state")
    assert any(not before["params"][n].equal(after["params"][n]) for n in after["params"])
    n = loop.family.episodes
    for row in rows:
        returns = [row[f"adapt/ep_rew_mean_{k}"] for k in range(n)]
        assert row["rollout/trial_return"] == pytest.approx(sum(returns))
        assert row["rollout/ep_rew_mean"] == pytest.approx(sum(returns) / n)
        assert row["adapt/gain"] == pytest.approx(returns[-1] - returns[0])


def test_new_tasks_for_every_iteration():
    loop = loop_of(tiny())
    iterated(loop, 1)
    first = loop.members
    iterated(loop, 1)
    assert loop.members == first  # the same seed and iteration
    loop.iterate(Counters(iteration=1))
    assert loop.members != first


def test_all_slots_act_with_one_copy_of_the_parameters():
    loop = loop_of(tiny())
    slots = [(0, 2), (2, 4), (4, 6)]
    _, version = loop.backend.learner("begin", 6, slots)
    published = loop.backend.server.get(AGENTS, version)
    (flat,) = {id(refs[0]) for refs in published.blocks.values()}
    assert list(published.blocks) == slots
    (whole,) = published.blocks[slots[0]]
    assert whole.shape[0] == 1
    assert flat == id(whole)


def test_regret_is_measured_to_the_best_arm():
    loop = loop_of(tiny())
    _, (row,) = iterated(loop, 1)
    best = np.mean([max(task["means"]) for task in loop.members])
    for k in range(4):
        assert row[f"adapt/regret_{k}"] == pytest.approx(best - row[f"adapt/ep_rew_mean_{k}"])
    assert row["rollout/trial_regret"] == pytest.approx(4 * best - row["rollout/trial_return"])


def test_regret_of_families_whose_best_is_not_known_is_not_told():
    shown = trial_metrics(np.arange(6.0).reshape(3, 2), None)
    assert shown == {
        "adapt/ep_rew_mean_0": 2.0,
        "adapt/ep_rew_mean_1": 3.0,
        "adapt/gain": 1.0,
        "rollout/ep_rew_mean": 2.5,
        "rollout/trial_return": 5.0,
    }


@pytest.mark.parametrize(
    ("num", "expected"),
    [(1, [0]), (3, [0, 1, 2]), (20, list(range(20))), (33, [0, 1, 2, 4, 8, 16, 32])],
)
def test_of_many_episodes_some_are_shown(num, expected):
    assert landmarks(num) == expected


def test_of_a_hundred_episodes_the_first_and_the_last_are_shown():
    assert landmarks(100) == [0, 1, 2, 4, 8, 16, 32, 64, 99]


# Bitwise


@pytest.mark.ray
def test_ray_learns_from_trials_bitwise_what_the_serial_backend_learns(assert_same_state):
    config = tiny(TABLE)
    serial = loop_of(config)
    counters, rows = iterated(serial)
    _, curve = serial.evaluate(5)
    on_ray = replace(config, runtime=replace(config.runtime, backend="ray", num_actors=2))
    loop = loop_of(on_ray)
    try:
        found_counters, found = iterated(loop)
        assert_same_state(loop.backend.learner("get_state"), serial.backend.learner("get_state"))
        _, found_curve = loop.evaluate(5)
    finally:
        loop.backend.close()
    assert found_counters == counters
    np.testing.assert_equal(found, rows)
    np.testing.assert_array_equal(found_curve, curve)


@pytest.mark.parametrize("outer", ["ppo", "trpo"])
def test_a_resumed_run_on_trials_is_the_uninterrupted_one(outer, tmp_path, assert_same_state):
    whole = tiny(iterations=3, outer=outer)
    train(whole, tmp_path / "whole")
    train(replace(whole, iterations=1), tmp_path / "halves")
    train(whole, tmp_path / "halves")
    expected, counters, _ = run_folder.restore(tmp_path / "whole")
    found, again, _ = run_folder.restore(tmp_path / "halves")
    assert again == counters
    assert_same_state(found, expected)


# Evaluation


def test_an_evaluation_is_one_trial_of_each_task():
    loop = loop_of(tiny())
    tasks, curve = loop.evaluate(5)
    assert curve.shape == (5, 4)
    assert set(np.unique(curve)) <= {0.0, 1.0}
    result = evaluation.summarise("rl2/bandit", tasks, curve, True, trials=True)
    assert [row["k"] for row in result["adapt"]] == [0, 1, 2, 3]
    assert result["trial_return"]["mean"] == pytest.approx(curve.sum(1).mean())
    assert result["gain"]["mean"] == pytest.approx((curve[:, 3] - curve[:, 0]).mean())
    metrics = evaluation.as_metrics(result)
    assert metrics["eval/trial_return"] == result["trial_return"]["mean"]
    stream = io.StringIO()
    evaluation.print_table(result, Console(file=stream, width=120))
    assert "whole trials" in stream.getvalue()


@pytest.mark.parametrize("task", ["trials:bandit", TABLE])
def test_opponents_play_the_same_trials(task, tmp_path):
    train(tiny(task, iterations=1), tmp_path)
    result = evaluate(tmp_path, {"eval_tasks": 40})
    assert json.loads(json.dumps(result)) == result
    best = result["bounds"]["known task"]["mean"]
    low = result["opponents"]["random"]["mean"]
    assert low < best
    for row in result["opponents"].values():
        assert row["ci95"][0] <= row["mean"] <= row["ci95"][1]
    stream = io.StringIO()
    comparison.print_table(result, Console(file=stream, width=120))
    for name in ("rl2", "greedy", "known task"):
        assert name in stream.getvalue()


def test_the_bandit_of_the_paper_is_told_beside_its_figures_and_the_bayes_optimum():
    family = load_family("trials:bandit", {"arms": 5, "pulls": 1, "episodes": 10})
    tasks = family.sample(np.random.default_rng(0), 50)
    found = comparison.compare(family, tasks, 0)
    assert found["paper"]["rl2"] == 6.7
    assert found["bounds"]["bayes optimum"]["mean"] == pytest.approx(6.660, abs=5e-4)
    known = 10 * np.mean([max(task["means"]) for task in tasks])
    assert found["bounds"]["known task"]["mean"] == pytest.approx(known)


def test_tables_of_the_paper_are_not_told_beside_other_mdps():
    family = load_family(TABLE, OPTIONS[TABLE] | {"episodes": 10})
    tasks = family.sample(np.random.default_rng(0), 20)
    assert comparison.compare(family, tasks, 0)["paper"] == {}


def test_families_without_opponents_are_not_compared():
    family = load_family("trials:navigation-2d", OPTIONS["trials:navigation-2d"])
    result = comparison.compare(family, family.sample(np.random.default_rng(0), 3), 0)
    assert result == {}
    comparison.print_table(result)  # nothing to show
    assert comparison.compare(load_family("bandit"), [], 0) == {}


# What is refused


def test_several_trials_of_a_task_are_refused():
    with pytest.raises(ConfigError, match="num_envs must be 1, not 3"):
        replace(tiny(), num_envs=3)


def test_minibatches_that_do_not_divide_the_trials_are_refused():
    config = tiny()
    with pytest.raises(ConfigError, match="num_minibatches 4 does not divide the 6 trials"):
        replace(config, learner=replace(config.learner, num_minibatches=4))


def test_lag_is_refused():
    with pytest.raises(ConfigError, match="rl2 needs the data of exactly"):
        replace(tiny(), max_lag=1)


def test_tasks_that_are_no_trials_are_refused():
    with pytest.raises(ConfigError, match="--task trials:"):
        loop_of(replace(tiny(), task="bandit", task_options={}))


@pytest.mark.parametrize("name", RL2_PRESETS)
def test_every_preset_can_be_begun(name):
    config = RL2_PRESETS[name]()
    family = load_family(config.task, config.task_options)
    assert family.spec.num_episodes >= 2
    assert config.num_members % config.members_per_slot == 0
