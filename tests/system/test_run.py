"""Whole runs: recorded, interrupted, resumed, and learning what they are for."""

import json
import os
import signal
import time
from dataclasses import replace

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from actors.tasks import load_family
from learners.core.errors import ConfigError
from system import cli, run, run_folder
from system.backend import LearnerDied
from system.checkpoint import STATE, load_newest
from system.loop import Loop
from system.seeds import Stream, make_rng

pytestmark = pytest.mark.usefixtures("torch_threads")

OBEDIENT = "tests.system.families:Obedient"
MEASURED = ("perf/", "sys/", "time/iteration")
"""Metrics that tell of the machine."""


def state_of(folder):
    """What the newest checkpoint holds, and the iteration it is of."""
    state, counters, _ = run_folder.restore(folder)
    return state, counters.iteration


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def learned(folder):
    """The rows of metrics.jsonl without what tells of the machine."""
    return [
        {tag: value for tag, value in row.items() if not tag.startswith(MEASURED)}
        for row in rows(folder)
    ]


def tensorboard(folder, tag="rollout/ep_rew_mean"):
    """(step, value) of every point that TensorBoard shows."""
    reader = EventAccumulator(str(folder / "tb"), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in reader.Scalars(tag)]


def assert_unbroken(folder, iterations):
    """One row and one point of every iteration, in order, with growing step counts."""
    found = rows(folder)
    assert [row["iteration"] for row in found] == list(range(1, iterations + 1))
    steps = [row["env_steps"] for row in found]
    assert steps == sorted(set(steps))
    assert [step for step, _ in tensorboard(folder)] == steps


def steps_of(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.fixture
def orders(tmp_path):
    folder = tmp_path / "orders"
    folder.mkdir()
    return folder


def task_of(iteration, member=0):
    """The x of a goal of the run of seed 0 with four members; iterations count from 1."""
    family = load_family(OBEDIENT, {"horizon": 20})
    tasks = family.sample(make_rng(0, Stream.TRAIN_TASKS, iteration - 1), 4)
    return str(tasks[member]["goal"][0])


# Records


def test_a_run_leaves_everything_in_its_folder(tmp_path, tiny_run, capsys):
    folder = tmp_path / "run"
    config = tiny_run(eval_every=2)
    result = run.train(config, folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        *("checkpoints", "config.json", "evaluation.json", "lock", "meta.json", "metrics.jsonl"),
        "tb",
    ]
    assert_unbroken(folder, 3)
    assert steps_of(folder) == ["00000003"]
    evaluated = [row["iteration"] for row in rows(folder) if "eval/ep_rew_mean_0" in row]
    assert evaluated == [2, 3]
    saved = json.loads((folder / "evaluation.json").read_text())
    assert saved == json.loads(json.dumps(result)) | {"iteration": 3}
    out = capsys.readouterr().out
    assert f"run folder   {folder}" in out
    assert f"tensorboard --logdir {folder}" in out
    assert "3/3" in out


def test_checkpoints_come_as_often_as_asked_for_and_the_newest_stay(tmp_path, tiny_run):
    runtime = {"checkpoint_minutes": 0.0, "keep_checkpoints": 2}
    run.train(tiny_run(iterations=5, runtime=runtime), tmp_path)
    assert steps_of(tmp_path) == ["00000004", "00000005"]


def test_an_evaluation_of_the_folder_is_that_of_the_end_of_training(tmp_path, tiny_run):
    result = run.train(tiny_run(), tmp_path)
    again = run.evaluate(tmp_path, {})
    assert again == result | {"iteration": 3, "env_steps": rows(tmp_path)[-1]["env_steps"]}
    more = run.evaluate(tmp_path, {"eval_tasks": 7})
    assert more["tasks"] == 7
    assert more["per_task"][:4] != again["per_task"] or more["tasks"] != again["tasks"]


def test_an_evaluation_needs_a_checkpoint(tmp_path, tiny_run):
    with run_folder.opened(tmp_path, tiny_run(), "cpu"):
        pass
    with pytest.raises(ConfigError, match="has no checkpoint yet"):
        run.evaluate(tmp_path, {})
    with pytest.raises(ConfigError, match="is not a run's folder"):
        run.evaluate(tmp_path / "elsewhere", {})


def test_a_task_that_cannot_be_loaded_leaves_no_folder(tmp_path, tiny_run):
    config = replace(tiny_run(), task="navigation-3d")
    with pytest.raises(ValueError, match="navigation-2d"):
        run.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_backend_is_closed_whatever_happens(tmp_path, tiny_run, monkeypatch):
    closed = []
    monkeypatch.setattr(run.SerialBackend, "close", lambda self: closed.append(self))

    def fail(self, counters):
        raise RuntimeError("not today")

    monkeypatch.setattr(Loop, "iterate", fail)
    with pytest.raises(RuntimeError, match="not today"):
        run.train(tiny_run(), tmp_path)
    assert len(closed) == 1


# Going on


@pytest.mark.parametrize("task", ["navigation-2d", "half-cheetah-dir"])
def test_a_resumed_run_equals_an_uninterrupted_one(task, tmp_path, tiny_run, assert_same_state):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = run.train(tiny_run(task, iterations=6, eval_every=3), whole)
    run.train(tiny_run(task, iterations=3, eval_every=3), parts)
    result = run.train(tiny_run(task, iterations=6, eval_every=3), parts)
    assert_same_state(state_of(parts)[0], state_of(whole)[0])
    assert_unbroken(parts, 6)
    assert learned(parts) == learned(whole)
    assert tensorboard(parts) == tensorboard(whole)
    assert result == expected


def test_a_finished_run_is_not_trained_further(tmp_path, tiny_run, assert_same_state):
    result = run.train(tiny_run(), tmp_path)
    before, _ = state_of(tmp_path)
    assert run.train(tiny_run(), tmp_path) == result
    assert_same_state(state_of(tmp_path)[0], before)
    assert_unbroken(tmp_path, 3)


def test_rows_after_the_last_checkpoint_are_taken_back(
    tmp_path, tiny_run, monkeypatch, assert_same_state
):
    """As after a power cut: rows 4 and 5 were written, their checkpoint was not."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run.train(tiny_run(iterations=6, eval_every=3), whole)
    run.train(tiny_run(iterations=3, eval_every=3), cut)
    iterate = Loop.iterate

    def until_five(self, counters):
        if counters.iteration == 5:
            raise KeyboardInterrupt
        return iterate(self, counters)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "iterate", until_five)
        with pytest.raises(KeyboardInterrupt):
            run.train(tiny_run(iterations=6, eval_every=3), cut)
    assert len(rows(cut)) == 5
    assert steps_of(cut) == ["00000003"]
    run.train(tiny_run(iterations=6, eval_every=3), cut)
    assert_unbroken(cut, 6)
    assert learned(cut) == learned(whole)
    assert tensorboard(cut) == tensorboard(whole)
    assert_same_state(state_of(cut)[0], state_of(whole)[0])


def test_a_damaged_checkpoint_is_passed_over_and_said(
    tmp_path, tiny_run, capsys, assert_same_state
):
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    run.train(tiny_run(iterations=5), whole)
    for iterations in (2, 4):
        run.train(tiny_run(iterations=iterations), damaged)
    file = damaged / "checkpoints" / "00000004" / STATE
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    capsys.readouterr()
    run.train(tiny_run(iterations=5), damaged)
    out = capsys.readouterr().out
    assert "checkpoint 00000004 is refused" in out
    assert "SHA-256" in out
    assert "from iteration 2" in out
    assert_unbroken(damaged, 5)
    assert_same_state(state_of(damaged)[0], state_of(whole)[0])


def test_skipped_updates_are_still_counted_after_a_resume(tmp_path, tiny_run, orders):
    def config(iterations):
        options = {"orders": str(orders)}
        return tiny_run(OBEDIENT, iterations=iterations, task_options=options)

    (orders / "nan_reward").write_text(task_of(iteration=2))
    run.train(config(3), tmp_path / "run")
    run.train(config(4), tmp_path / "run")
    skipped = [row["meta/skipped_updates"] for row in rows(tmp_path / "run")]
    assert skipped == [0.0, 1.0, 1.0, 1.0]
    assert load_newest(tmp_path / "run" / "checkpoints").info["counters"]["skipped"] == 1


def test_an_evaluation_with_nan_does_not_cost_what_was_learned(tmp_path, tiny_run, orders):
    config = tiny_run(OBEDIENT, iterations=3, eval_every=2, task_options={"orders": str(orders)})
    family = load_family(OBEDIENT, config.task_options)
    evaluated = family.sample(make_rng(0, Stream.EVALUATION_TASKS, 0), 4)
    (orders / "nan_reward").write_text(str(evaluated[1]["goal"][0]))
    try:
        run.train(config, tmp_path / "run")
    except ArithmeticError as error:
        assert "evaluation" in str(error)  # noqa: PT017 - either is good, if nothing is lost
    restored = run_folder.restore(tmp_path / "run")
    assert restored is not None, "two iterations are lost"
    assert restored[1].iteration >= 2


# Interrupts


def test_the_first_signal_asks_and_the_second_ends(capsys):
    before = signal.getsignal(signal.SIGINT)
    with run.interruptible() as interrupt:
        assert not interrupt.asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.asked
        assert "finishing this iteration" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_iteration_finish_and_keeps_it(
    number, tmp_path, tiny_run, monkeypatch, capsys, assert_same_state
):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run.train(tiny_run(iterations=4), whole)
    iterate = Loop.iterate

    def signalled(self, counters):
        if counters.iteration == 1:
            os.kill(os.getpid(), number)
        return iterate(self, counters)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "iterate", signalled)
        assert run.train(tiny_run(iterations=4), stopped) is None
    assert "stopped at iteration 2; the same command goes on" in capsys.readouterr().out
    assert state_of(stopped)[1] == 2
    run.train(tiny_run(iterations=4), stopped)
    assert_unbroken(stopped, 4)
    assert_same_state(state_of(stopped)[0], state_of(whole)[0])


def test_hours_that_are_over_stop_a_run_with_a_checkpoint(
    tmp_path, tiny_run, monkeypatch, capsys, assert_same_state
):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run.train(tiny_run(iterations=4), whole)
    iterate, clock, passed = Loop.iterate, time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock() + passed[0])

    def long(self, counters):
        passed[0] += 1800.0 if counters.iteration < 3 else 0.0
        return iterate(self, counters)

    monkeypatch.setattr(Loop, "iterate", long)
    for iterations in (2, 4):
        limited = tiny_run(iterations=4, runtime={"max_hours": 0.9})
        assert (run.train(limited, stopped) is None) == (iterations < 4)
        assert state_of(stopped)[1] == iterations
    assert "stopped at iteration 2; the same command goes on" in capsys.readouterr().out
    assert_unbroken(stopped, 4)
    assert_same_state(state_of(stopped)[0], state_of(whole)[0])


def train_arguments(folder, orders, tiny_flags, *more):
    return [
        *("train", "maml-trpo/navigation-2d", "--run-dir", folder, "--iterations", "6"),
        *("--task", OBEDIENT, "--task.orders", orders, *tiny_flags),
        *("--checkpoint-minutes", "0", *more),
    ]


def wait_for_iteration(iteration, folder, orders, process, wait_until):
    """Waits until the run is in the middle of an iteration that it was told to wait in."""

    def there():
        assert process.poll() is None, process.communicate()
        return list(orders.glob("waiting-*")) and len(rows(folder)) == iteration - 1

    wait_until(there, f"iteration {iteration} is under way", seconds=120)


def test_ctrl_c_keeps_a_serial_run_and_the_same_command_goes_on(
    tmp_path, orders, tiny_run, tiny_flags, command_line, wait_until, assert_same_state
):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run.train(tiny_run(OBEDIENT, iterations=6), whole)
    arguments = train_arguments(stopped, orders, tiny_flags, "--backend", "serial")
    (orders / "wait").write_text(task_of(iteration=3))
    process = command_line.start(*arguments)
    wait_for_iteration(3, stopped, orders, process, wait_until)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to the session that it began
    (orders / "wait").unlink()
    status, out, err = command_line.result(process)
    assert status == 130, err
    assert "stopped at iteration 3; the same command goes on from there" in out
    assert "Traceback" not in err
    assert state_of(stopped)[1] == 3
    assert cli.main([str(argument) for argument in arguments]) == 0
    assert_unbroken(stopped, 6)
    assert learned(stopped) == learned(whole)
    assert_same_state(state_of(stopped)[0], state_of(whole)[0])


def process_called(name, parent):
    """The process of a Ray actor below `parent`."""
    for child in psutil.Process(parent).children(recursive=True):
        try:
            if child.cmdline()[:1] and child.cmdline()[0].startswith(f"ray::{name}"):
                return child
        except psutil.Error:
            continue
    return None


@pytest.mark.ray
def test_a_dead_learner_is_replaced_and_after_ctrl_c_the_same_command_goes_on(
    tmp_path, orders, tiny_run, tiny_flags, command_line, clusters, wait_until, assert_same_state
):
    clusters.close()  # memory for the processes of this test
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run.train(tiny_run(OBEDIENT, iterations=6), whole)
    arguments = train_arguments(broken, orders, tiny_flags)
    on_ray = [*arguments, "--backend", "ray", "--num-actors", "1"]

    (orders / "wait").write_text(task_of(iteration=3))
    process = command_line.start(*on_ray)
    wait_for_iteration(3, broken, orders, process, wait_until)
    dead = process_called("LearnerActor", process.pid)
    dead.kill()
    (orders / "wait").unlink()

    def replaced():
        learner = process_called("LearnerActor", process.pid)
        return learner is not None and learner.pid != dead.pid

    wait_until(replaced, "another learner is there", seconds=120)
    for left_over in orders.glob("waiting-*"):
        left_over.unlink()
    (orders / "wait").write_text(task_of(iteration=4))
    wait_for_iteration(4, broken, orders, process, wait_until)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    (orders / "wait").unlink()
    status, out, err = command_line.result(process)
    assert status == 130, err
    assert "the learner's process ended in" in err
    assert "Another one starts now" in err
    assert "from iteration 2" in out
    assert "stopped at iteration 4; the same command goes on from there" in out
    assert state_of(broken)[1] == 4
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert alive == []

    assert cli.main([*map(str, arguments), "--backend", "serial"]) == 0
    assert_unbroken(broken, 6)
    assert learned(broken) == learned(whole)
    assert_same_state(state_of(broken)[0], state_of(whole)[0])


@pytest.mark.parametrize(
    ("dies", "deaths"),
    [
        (lambda iteration, restarts: iteration == 1, [1, 1, 1]),
        (lambda iteration, restarts: restarts < 4 and iteration > restarts // 2, [1, 1, 2, 2]),
    ],
    ids=["at the same place", "further on each time"],
)
def test_a_learner_is_replaced_while_there_are_new_checkpoints(
    tmp_path, tiny_run, monkeypatch, caplog, dies, deaths
):
    """Where three die without one in between, all others would."""
    found, iterate = [], Loop.iterate

    def dying(self, counters):
        if dies(counters.iteration, self.learner_restarts):
            found.append(counters.iteration)
            raise LearnerDied("the learner's process ended.")
        return iterate(self, counters)

    monkeypatch.setattr(Loop, "iterate", dying)
    config = tiny_run(iterations=3, runtime={"checkpoint_minutes": 0.0})
    if len(set(deaths)) == 1:
        with pytest.raises(LearnerDied):
            run.train(config, tmp_path / "run")
    else:
        run.train(config, tmp_path / "run")
        assert rows(tmp_path / "run")[-1]["sys/learner_restarts"] == len(deaths)
    assert found == deaths
    assert caplog.text.count("Another one starts now") == (2 if len(set(deaths)) == 1 else 4)


def test_a_killed_driver_goes_on_from_the_newest_checkpoint(
    tmp_path, orders, tiny_run, tiny_flags, command_line, wait_until,
    assert_same_state,
):  # fmt: skip
    """`kill -9` in the middle of iteration 3, whose checkpoints come after every iteration."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run.train(tiny_run(OBEDIENT, iterations=6), whole)
    arguments = train_arguments(killed, orders, tiny_flags, "--backend", "serial")
    (orders / "wait").write_text(task_of(iteration=3))
    process = command_line.start(*arguments)
    wait_for_iteration(3, killed, orders, process, wait_until)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    (orders / "wait").unlink()
    assert state_of(killed)[1] == 2

    status, out, err = command_line.run(*arguments)
    assert status == 0, err
    assert "from iteration 2" in out
    assert_unbroken(killed, 6)
    assert learned(killed) == learned(whole)
    assert_same_state(state_of(killed)[0], state_of(whole)[0])


# Learning


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_navigation_is_learned_to_be_learned(seed, tmp_path, tiny_run):
    """Mean return on 40 held-out goals after one inner update, H = 30, twelve meta-iterations.

    Measured, seeds 0, 1, 2:       k = 0                     k = 1
        untrained          −15.3, −15.1, −14.4       −12.6, −12.9, −13.1
        trained            −12.6, −11.9, −11.2        −4.6,  −4.8,  −4.9
    """
    threshold = -6.5
    config = tiny_run(
        *("navigation-2d",),
        seed=seed,
        iterations=12,
        num_members=20,
        num_envs=10,
        members_per_slot=10,
        eval_tasks=40,
        task_options={"horizon": 30},
    )
    result = run.train(config, tmp_path)
    before, after = (row["mean"] for row in result["adapt"][:2])
    assert after > threshold
    # What does not adapt, or has not learned to, does not get there.
    assert before < threshold - 2.0
    untrained = replace(config, iterations=1)
    with run.running(untrained) as (_, _, loop):
        _, curve = loop.evaluate(40)
    assert curve[:, 1].mean() < threshold - 2.0
    assert after - before > 2.0 * (curve[:, 1] - curve[:, 0]).mean()
