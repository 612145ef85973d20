"""What is reported of an evaluation: numbers, JSON and a table."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from system import evaluation

TASKS = [{"goal": [0.1 * i, -0.1 * i]} for i in range(8)]
CURVE = np.stack([np.arange(8.0), np.arange(8.0) + 5.0, np.full(8, 20.0)], 1)
DIRECTIONS = [{"direction": 1.0}, {"direction": -1.0}] * 4


def shown(result):
    stream = io.StringIO()
    evaluation.print_table(result, Console(file=stream, width=120))
    return stream.getvalue()


def test_the_object_has_what_the_command_line_promises():
    result = evaluation.summarise("maml-trpo/navigation-2d", TASKS, CURVE, held_out=True)
    assert result["preset"] == "maml-trpo/navigation-2d"
    assert result["tasks"] == 8
    assert result["held_out"] is True
    assert [row["k"] for row in result["adapt"]] == [0, 1, 2]
    for row, values in zip(result["adapt"], CURVE.T, strict=True):
        assert set(row) == {"k", "mean", "ci95", "iqm"}
        assert row["mean"] == pytest.approx(values.mean())
        low, high = row["ci95"]
        assert low <= row["mean"] <= high
    assert result["adapt"][0]["iqm"] == pytest.approx(3.5)
    assert result["adapt"][2]["ci95"] == [20.0, 20.0]
    assert json.loads(json.dumps(result)) == result


def test_the_gain_is_that_of_the_first_update_task_by_task():
    result = evaluation.summarise("p", TASKS, CURVE, held_out=True)
    assert result["gain"] == {"mean": 5.0, "ci95": [5.0, 5.0]}
    without = evaluation.summarise("p", TASKS, CURVE[:, :1], held_out=True)
    assert without["gain"] is None
    assert "gain" not in shown(without)


def test_held_out_tasks_are_listed_with_their_returns():
    result = evaluation.summarise("p", TASKS, CURVE, held_out=True)
    assert "groups" not in result
    assert [row["task"] for row in result["per_task"]] == TASKS
    assert [row["returns"] for row in result["per_task"]] == CURVE.tolist()


def test_tasks_of_many_numbers_are_not_listed():
    long = [{"mean_reward": [0.123456789] * 50}] * 8
    assert evaluation.summarise("p", long, CURVE, held_out=True)["per_task"] == []


def test_a_few_known_tasks_are_grouped():
    result = evaluation.summarise("p", DIRECTIONS, CURVE, held_out=False)
    assert "per_task" not in result
    backward, forward = result["groups"]
    assert (backward["task"], forward["task"]) == ({"direction": -1.0}, {"direction": 1.0})
    assert forward["members"] == backward["members"] == 4
    assert forward["adapt"][0]["mean"] == CURVE[0::2, 0].mean()
    assert backward["adapt"][0]["mean"] == CURVE[1::2, 0].mean()
    assert backward["gain"]["mean"] == 5.0


def test_the_table_shows_every_number_of_updates_and_the_intervals():
    text = shown(evaluation.summarise("maml-trpo/x", TASKS, CURVE, held_out=True))
    assert "maml-trpo/x: return of 8 held-out tasks" in text
    for part in ("3.50", "8.50", "20.00", "[20.00, 20.00]", "gain of 1", "[5.00, 5.00]"):
        assert part in text


def test_the_table_does_not_call_known_tasks_held_out():
    text = shown(evaluation.summarise("p", DIRECTIONS, CURVE, held_out=False))
    assert "held-out" not in text
    assert "{'direction': 1.0}" in text
    assert "{'direction': -1.0}" in text


def test_scalars_for_tensorboard():
    metrics = evaluation.as_metrics(evaluation.summarise("p", TASKS, CURVE, held_out=True))
    assert metrics == {
        "eval/ep_rew_mean_0": 3.5,
        "eval/ep_rew_mean_1": 8.5,
        "eval/ep_rew_mean_2": 20.0,
        "eval/gain": 5.0,
        "eval/gain_ci95_low": 5.0,
        "eval/gain_ci95_high": 5.0,
    }


def test_replicas_are_named_as_such():
    result = evaluation.summarise("p", DIRECTIONS, CURVE[:, :1], held_out=True, replicas=True)
    assert result["replicas"] == result["tasks"] == len(DIRECTIONS)
    assert not result["held_out"]
    assert "groups" not in result
    assert "replicas, each on episodes of its own" in shown(result)
