"""Which runs make one curve, on which grid, and how groups compare."""

import numpy as np
import pytest

from learners.core.errors import ConfigError
from system import curves
from system.config import to_dict
from system.presets import PRESETS
from system.records import Records
from tests.system import recorded


def run(place="runs/a-seed0", rows=(), preset=None, evaluation=None, **changes):
    config = recorded.config(preset or recorded.PRESET, **changes)
    return Records(place, list(rows), config, {}, evaluation or {})


def labels(runs):
    return [(group.label, len(group.runs)) for group in curves.grouped(runs)]


# Groups


def test_runs_that_differ_in_the_seed_are_one_group():
    runs = [run(f"a{seed}", seed=seed, iterations=seed + 1) for seed in range(3)]
    assert labels(runs) == [(recorded.PRESET, 3)]


def test_other_presets_are_other_groups_in_the_order_of_their_first():
    runs = [run("a", preset="b/x"), run("b", preset="a/x"), run("c", preset="b/x", seed=1)]
    assert labels(runs) == [("b/x", 2), ("a/x", 1)]


def test_a_setting_that_differs_tells_groups_of_one_preset_apart():
    runs = [run("a", learner={"lr": 0.1}), run("b", learner={"lr": 0.2})]
    assert labels(runs) == [(f"{recorded.PRESET}, lr 0.1", 1), (f"{recorded.PRESET}, lr 0.2", 1)]


def test_folders_tell_groups_apart_that_differ_in_much():
    many = [{"lr": n, "gamma": n, "form": n} for n in range(2)]
    named = [run(f"runs/m{n}-seed0", learner=learner) for n, learner in enumerate(many)]
    assert [name for name, _ in labels(named)] == ["m0", "m1"]
    alike = [run(f"runs{n}/m-seed0", learner=learner) for n, learner in enumerate(many)]
    assert [name for name, _ in labels(alike)] == ["runs0/m-seed0", "runs1/m-seed0"]


def test_a_field_that_an_older_version_lacked_has_its_default():
    new = to_dict(PRESETS["ppo/cartpole"]())
    old = {name: value for name, value in new.items() if name != "stagger"}
    assert labels([Records("a", config=new), Records("b", config=old | {"seed": 1})]) == [
        ("ppo/cartpole", 2)
    ]


def test_without_a_configuration_the_folders_name_is_the_label():
    runs = [Records("runs/mine-seed0"), Records("runs/mine-seed1"), Records("runs/other")]
    assert labels(runs) == [("mine", 2), ("other", 1)]


# Metrics


def test_methods_that_adapt_are_shown_before_and_after():
    choice = curves.choose([run(rows=recorded.adapting(ks=(0, 1, 2, 10)))], None)
    assert (choice.before, choice.tag) == ("adapt/ep_rew_mean_0", "adapt/ep_rew_mean_10")
    assert (choice.k, choice.quantity) == (10, curves.RETURN)


@pytest.mark.parametrize(
    ("tags", "before", "tag"),
    [
        (["eval/ep_rew_mean_0", "rollout/ep_rew_mean"], None, "rollout/ep_rew_mean"),
        (["eval/ep_rew_mean_0", "rollout/value_error"], None, "rollout/value_error"),
        (["eval/ep_rew_mean_0"], None, "eval/ep_rew_mean_0"),
        (["eval/ep_rew_mean_0", "eval/ep_rew_mean_3"], "eval/ep_rew_mean_0", "eval/ep_rew_mean_3"),
    ],
)
def test_what_is_shown_where_nothing_adapts(tags, before, tag):
    rows = recorded.rows({name: [1.0] for name in tags}, [1])
    choice = curves.choose([run(rows=rows)], None)
    assert (choice.before, choice.tag) == (before, tag)


def test_a_tag_that_a_run_lacks_names_that_run():
    runs = [run("good", rows=recorded.adapting()), run("bad", rows=recorded.with_replicas())]
    with pytest.raises(ConfigError, match="bad has no metric 'adapt/ep_rew_mean_1'; closest: "):
        curves.choose(runs, "adapt/ep_rew_mean_1")
    with pytest.raises(ConfigError, match="empty has recorded nothing yet"):
        curves.choose([run("empty")], None)


# Grids


def slow_interpolation(step, steps, values):
    for left, right, low, high in zip(steps, steps[1:], values, values[1:], strict=False):
        if left <= step <= right:
            return low + (high - low) * (step - left) / (right - left)
    raise AssertionError(step)


def test_interpolation_equals_a_slow_loop():
    rng = np.random.default_rng(0)
    samples = [(np.cumsum(rng.uniform(1, 5, n)), rng.normal(size=n)) for n in (7, 9, 12)]
    found = curves.on_common_grid(samples)
    assert found.steps[0] == max(steps[0] for steps, _ in samples)
    assert found.steps[-1] == min(steps[-1] for steps, _ in samples)
    assert found.values.shape == (3, 12)
    for row, (steps, values) in zip(found.values, samples, strict=True):
        slow = [slow_interpolation(step, list(steps), list(values)) for step in found.steps]
        np.testing.assert_allclose(row, slow)


def test_runs_of_the_same_steps_keep_their_values():
    steps = np.arange(10.0, 60.0, 10.0)
    found = curves.on_common_grid([(steps, steps**2), (steps, -steps)])
    assert found.steps.tolist() == steps.tolist()
    np.testing.assert_array_equal(found.values, [steps**2, -steps])


def test_a_grid_has_a_bounded_number_of_points():
    steps = np.arange(5000.0)
    assert curves.on_common_grid([(steps, steps)]).values.shape == (1, curves.MAX_POINTS)
    assert curves.on_common_grid([(steps[:1], steps[:1])]).values.tolist() == [[0.0]]


def test_runs_without_common_steps_are_refused():
    early, late = np.array([1.0, 2.0]), np.array([3.0, 4.0])
    with pytest.raises(ConfigError, match="one begins at 3, another ends at 2"):
        curves.on_common_grid([(early, early), (late, late)])


def test_replicas_count_as_runs():
    runs = [run(f"r{s}", recorded.with_replicas(10.0 * s), seed=s) for s in range(2)]
    ((series,),) = [panel.series for panel in curves.panels(curves.grouped(runs))]
    assert series.replicas
    assert series.after.values[:, 0].tolist() == [0, 1, 2, 10, 11, 12]


# Adaptation


def test_the_adaptation_of_one_run_has_the_interval_over_its_tasks():
    found = curves.adaptation([run(evaluation=recorded.evaluation(means=(1.0, 3.0)))], "mean")
    assert (found.k.tolist(), found.middle.tolist()) == ([0, 1], [1.0, 3.0])
    assert [ends.tolist() for ends in found.interval] == [[0.0, 2.0], [3.0, 5.0]]
    assert (found.over, found.unit) == ("tasks", "inner updates")
    iqm = curves.adaptation([run(evaluation=recorded.evaluation(means=(1.0, 3.0)))], "iqm")
    assert (iqm.middle.tolist(), iqm.interval) == ([1.5, 3.5], None)


def test_the_adaptation_of_several_runs_has_the_interval_over_runs():
    results = [recorded.evaluation(means=(0.0, n), unit="episodes before") for n in (2.0, 4.0)]
    found = curves.adaptation([run(evaluation=result) for result in results], "mean")
    assert found.middle.tolist() == [0.0, 3.0]
    low, high = found.interval
    assert (low[1], high[1]) == (2.0, 4.0)
    assert (found.over, found.unit) == ("2 runs", "episodes before")


def test_the_last_evaluation_of_the_metrics_stands_in_for_a_missing_file():
    columns = {"eval/ep_rew_mean_0": [1.0, None, 2.0], "eval/ep_rew_mean_1": [3.0, None, 4.0]}
    found = curves.adaptation([run(rows=recorded.rows(columns, [1, 2, 3]))], "mean")
    assert (found.middle.tolist(), found.interval, found.unit) == ([2.0, 4.0], None, "")
    assert curves.adaptation([run(evaluation=recorded.evaluation(means=(1.0,)))], "mean") is None
    assert curves.adaptation([run()], "mean") is None


# Panels and pairs


def test_each_task_has_a_panel():
    runs = [
        run(str(n), recorded.with_replicas(), preset=f"{learner}/x", task=task, task_options=own)
        for n, (learner, task, own) in enumerate(
            [("a", "hop", {}), ("b", "hop", {}), ("a", "run", {"d": 1}), ("b", "run", {"d": 2})]
        )
    ]
    panels = curves.panels(curves.grouped(runs))
    assert [panel.task for panel in panels] == ["hop", "run (d 1)", "run (d 2)"]
    assert [len(panel.improvements) for panel in panels] == [1, 0, 0]


def test_groups_are_compared_where_the_shorter_one_ends():
    short, long = recorded.with_replicas(0.0, num=4), recorded.with_replicas(2.5, num=9)
    runs = [run("a", short, preset="a/x"), run("b", long, preset="b/x")]
    ((pair,),) = [panel.improvements for panel in curves.panels(curves.grouped(runs))]
    assert (pair.label, pair.other, pair.step) == ("a/x", "b/x", 40.0)
    # 3, 4, 5 against 5.5, 6.5, 7.5.
    assert (pair.probability, pair.interval) == (0.0, (0.0, 0.0))


def test_a_single_run_is_compared_with_none():
    runs = [run(n, recorded.adapting(), preset=f"{n}/x") for n in "ab"]
    ((),) = [panel.improvements for panel in curves.panels(curves.grouped(runs))]


def test_many_groups_are_compared_with_the_first():
    runs = [run(n, recorded.with_replicas(), preset=f"{n}/x") for n in "abcde"]
    (panel,) = curves.panels(curves.grouped(runs))
    assert [(pair.label, pair.other) for pair in panel.improvements] == [
        ("a/x", f"{n}/x") for n in "bcde"
    ]
    (fewer,) = curves.panels(curves.grouped(runs[:4]))
    assert len(fewer.improvements) == 6


def test_a_tag_replaces_returns_and_their_adaptation():
    one = run(rows=recorded.adapting(), evaluation=recorded.evaluation())
    ((series,),) = [p.series for p in curves.panels(curves.grouped([one]), "adapt/ep_rew_mean_0")]
    assert (series.before, series.k, series.adaptation) == (None, None, None)
    ((series,),) = [p.series for p in curves.panels(curves.grouped([one]))]
    assert series.before is not None
    assert (series.k, series.adaptation.k.tolist()) == (1, [0, 1, 2])


def test_an_estimate_is_a_mean_or_an_interquartile_mean():
    values = np.array([[0.0], [1.0], [2.0], [97.0]])
    assert curves.estimate(values, "mean")[0].tolist() == [25.0]
    assert curves.estimate(values, "iqm")[0].tolist() == [1.5]


def test_short_runs_and_equal_seeds_are_remarked_on():
    long, short = recorded.adapting(num=9), recorded.adapting(num=3)
    groups = curves.grouped([run("long", long, seed=1), run("short", short, seed=1)])
    ends, seeds = curves.remarks(groups)
    assert "ends after 300 steps, where short does" in ends
    assert "one seed" in seeds
    assert curves.remarks(curves.grouped([run("a", long), run("b", long, seed=1)])) == []
