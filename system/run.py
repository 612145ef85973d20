"""Training and evaluation of a run, from its folder to the table at the end."""

from __future__ import annotations

import logging
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import safetensors.numpy

from actors.family import TaskFamily
from actors.tasks import load_family
from learners.config import LpgAgentConfig
from learners.core.trajectory import Metrics
from system import checkpoint, comparison, evaluation, pictures, rules, run_folder
from system.backend import Backend, LearnerDied
from system.config import RunConfig, to_dict
from system.learner_host import choose_device
from system.loop import Counters, FailedEvaluation, Loop, SkippedUpdate, evaluation_tasks
from system.memory import check_replicas
from system.progress import Progress
from system.records import EVALUATION
from system.seeds import Stream, make_seeds
from system.serial_backend import SerialBackend
from system.shares import check_shares
from system.telemetry import Telemetry
from system.videos import Videos

MAX_SKIPPED_IN_A_ROW = 10

MAX_DEATHS = 3
"""Learners that may die without a checkpoint in between: the next one would die as well."""


class StoppedRun(RuntimeError):
    """A run that ended itself; the message says why and where the evidence lies."""


class Interrupt:
    """Whether the user asked to stop.

    The first Ctrl-C or SIGTERM lets the running iteration finish, the second one does not.
    """

    asked = False

    def __call__(self, number: int, frame: object) -> None:
        """The signal handler."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nfinishing this iteration, then saving; once more stops at once", file=sys.stderr)


@dataclass(frozen=True)
class Sitting:
    """One call of `train`: where it writes, and until when it may."""

    folder: Path
    after_save: Callable[[], None]
    end: float  # as of time.monotonic()

    @property
    def over(self) -> bool:
        """Whether its time is up."""
        return time.monotonic() >= self.end


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Catches Ctrl-C and SIGTERM inside the block."""
    interrupt = Interrupt()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def make_backend(config: RunConfig, family: TaskFamily) -> Backend:
    """The configured backend, with a new learner.

    Raises:
        ConfigError: the device, or what Ray needs, is missing.
    """
    seeds = make_seeds(config.seed, Stream.INIT, count=config.num_members)
    if config.runtime.backend == "serial":
        return SerialBackend(config, family, seeds)
    from system.ray_backend import RayBackend  # ray takes a second to import

    return RayBackend(config, family, seeds)


@contextmanager
def running(config: RunConfig) -> Iterator[tuple[TaskFamily, Backend, Loop]]:
    """The configured backend, ended at the end of the block."""
    family = load_family(config.task, config.task_options)
    backend = make_backend(config, family)
    try:
        yield family, backend, Loop(config, family, backend)
    finally:
        backend.close()


def train(
    config: RunConfig, folder: Path, after_save: Callable[[], None] = lambda: None
) -> dict[str, Any] | None:
    """Trains until `config.iterations`, or goes on with the run in `folder`.

    Args:
        config: the run.
        folder: where it lies.
        after_save: called after each checkpoint.

    Returns:
        The last evaluation, or None where the user, or `max_hours`, stopped before the end.

    Raises:
        ConfigError: the folder holds another run, or the machine lacks something.
        StoppedRun: ten updates in a row were skipped because of non-finite tensors.
    """
    hours = config.runtime.max_hours or math.inf
    sitting = Sitting(folder, after_save, time.monotonic() + 3600.0 * hours)
    config = rules.resolved(config)
    # The learner of a cluster that is joined has memory and a device of its own.
    elsewhere = config.runtime.backend == "ray" and config.runtime.address is not None
    available = sys.maxsize if elsewhere else None
    spec = load_family(config.task, config.task_options).spec
    check_shares(config, spec)
    check_replicas(config, spec, available)
    device = config.runtime.device if elsewhere else str(choose_device(config.runtime.device))
    with run_folder.opened(folder, config, device):
        return train_in(sitting, config)


def train_in(sitting: Sitting, config: RunConfig) -> dict[str, Any] | None:
    """`train` in a folder that is this process's own.

    Where the learner's process dies, another one goes on from the newest checkpoint; the run ends
    where several die one after the other and there is no new checkpoint.
    """
    died_at: list[int | None] = []
    while True:
        try:
            return train_from_newest(sitting, config, len(died_at))
        except LearnerDied as error:
            died_at.append(checkpoint.newest_step(sitting.folder / run_folder.CHECKPOINTS))
            if died_at[-MAX_DEATHS:] == died_at[-1:] * MAX_DEATHS:
                raise
            logging.getLogger("metaloop").warning("%s Another one starts now.", error)
            # Where its node died with it, another may have to come first.
            config = replace(config, runtime=replace(config.runtime, wait_for_nodes=True))


def train_from_newest(
    sitting: Sitting, config: RunConfig, learner_restarts: int
) -> dict[str, Any] | None:
    """Trains from the newest checkpoint, or from the start, to the end or an interrupt."""
    folder = sitting.folder
    restored = run_folder.restore(folder)
    # Ray sets a handler of its own when it starts, so ours comes after it.
    with running(config) as (_, backend, loop), interruptible() as interrupt:
        loop.learner_restarts = learner_restarts
        counters = Counters()
        if restored is not None:
            state, counters, said = restored
            loop.restore(run_folder.pop_loop_state(state))
            backend.learner("set_state", state)
            for line in [*said, f"going on with {folder} from iteration {counters.iteration}"]:
                print(line)
        elif isinstance(config.learner, LpgAgentConfig) and config.learner.teacher == "rule":
            backend.learner("adopt", "meta_params", rules.load(Path(config.learner.rule)))
        resume_step = counters.iteration if restored is not None else None
        with Telemetry(folder, resume_step) as telemetry:
            telemetry.config_text(to_dict(config), loop.kind)
            print(f"run folder   {folder}   device {backend.device}")
            print(f"TensorBoard  tensorboard --logdir {folder}")
            counters, result = iterate(sitting, config, loop, counters, telemetry, interrupt)
        if counters.iteration < config.iterations:
            print(f"stopped at iteration {counters.iteration}; the same command goes on from there")
            return None
        result = result or evaluate_now(config, loop)
    run_folder.write_json(folder / EVALUATION, result | {"iteration": counters.iteration})
    return result


def iterate(
    sitting: Sitting,
    config: RunConfig,
    loop: Loop,
    counters: Counters,
    telemetry: Telemetry,
    interrupt: Interrupt,
) -> tuple[Counters, dict[str, Any] | None]:
    """Meta-iterations with records and checkpoints, until the end, an interrupt, or time is up.

    Returns:
        The counters, and the evaluation of the last iteration if there was one.
    """
    saved_at, result = time.monotonic(), None
    videos = Videos(config.video_every)
    unwritten: list[Metrics] = []
    with Progress(config.iterations, counters.iteration, config.preset) as progress:
        while counters.iteration < config.iterations and not interrupt.asked and not sitting.over:
            counters, metrics, skipped = loop.iterate(counters)
            if skipped is not None:
                progress.say(str(skipped))
            result = None
            if evaluation_is_due(config, counters.iteration):
                try:
                    result = evaluate_now(config, loop)
                    metrics |= evaluation.as_metrics(result)
                except FailedEvaluation as error:
                    progress.say(str(error))
            unwritten.append(metrics)
            if result is not None or record_is_due(config, counters.iteration):
                metrics = average(unwritten)
                telemetry.write(counters.iteration, own_steps(loop, counters), metrics)
                progress.update(counters.iteration, counters.env_steps, metrics)
                unwritten = []
            if pictures_are_due(config, counters.iteration):
                described = loop.describe()
                images, histograms = pictures.draw(described), pictures.histograms(described)
                telemetry.show(own_steps(loop, counters), images, histograms)
            if videos.due(counters.iteration):
                videos.show(loop, telemetry, own_steps(loop, counters), progress.say)
            if skipped is not None and counters.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                save(sitting, config, loop, counters)
                stop(sitting.folder, counters, skipped)
            if time.monotonic() - saved_at > 60.0 * config.runtime.checkpoint_minutes:
                save(sitting, config, loop, counters)
                saved_at = time.monotonic()
    save(sitting, config, loop, counters)
    return counters, result


def evaluation_is_due(config: RunConfig, iteration: int) -> bool:
    """Whether `iteration` iterations end with an evaluation; the last one always does."""
    every = config.eval_every
    return iteration == config.iterations or (every > 0 and iteration % every == 0)


def record_is_due(config: RunConfig, iteration: int) -> bool:
    """Whether `iteration` iterations end with a record; the last one always does."""
    return iteration == config.iterations or iteration % config.log_every == 0


def pictures_are_due(config: RunConfig, iteration: int) -> bool:
    """Whether `iteration` iterations end with pictures; the last one does where there are any."""
    every = config.picture_every
    return every > 0 and (iteration == config.iterations or iteration % every == 0)


def own_steps(loop: Loop, counters: Counters) -> int:
    """Environment steps of each replica so far: the x-axis of what is recorded."""
    return counters.env_steps // loop.num_replicas


SO_FAR = (
    "time/env_steps",
    "meta/skipped_updates",
    "sys/actor_restarts",
    "sys/learner_restarts",
    "perf/chunks_dropped",
)
"""Metrics that count from the start: of several records the last one holds."""


def average(records: Sequence[Metrics]) -> Metrics:
    """Mean of each metric over the records in which it is finite; counters as in the last."""
    names = dict.fromkeys(name for record in records for name in record)
    averaged: Metrics = {}
    for name in names:
        values = [record[name] for record in records if name in record]
        finite = [value for value in values if math.isfinite(value)]
        last = name in SO_FAR or not finite
        averaged[name] = values[-1] if last else sum(finite) / len(finite)
    return averaged


def save(sitting: Sitting, config: RunConfig, loop: Loop, counters: Counters) -> None:
    """Writes a checkpoint."""
    state, keep = loop.backend.learner("get_state"), config.runtime.keep_checkpoints
    run_folder.save(sitting.folder, state, loop.snapshot(), counters, keep)
    sitting.after_save()


def stop(folder: Path, counters: Counters, skipped: SkippedUpdate) -> NoReturn:
    """Ends a run whose updates fail again and again, and keeps what shows why."""
    evidence = folder / "non_finite"
    evidence.mkdir(exist_ok=True)
    failure = skipped.failure
    safetensors.numpy.save_file(failure.arrays, evidence / "batch.safetensors")
    run_folder.write_json(
        evidence / "batch.json",
        {
            "tensor": failure.tensor,
            "task": None if skipped.task is None else dict(skipped.task),
            "iteration": skipped.iteration,
            "seed": skipped.seed,
        },
    )
    raise StoppedRun(
        f"{counters.skipped_in_a_row} updates in a row were skipped, the last because "
        f"{failure.tensor} is not finite at iteration {skipped.iteration}. The member's data of "
        f"that batch are in {evidence}; the newest checkpoint holds the last good state, from "
        "which the same command with --backend serial goes on in one process"
    )


def evaluate_now(config: RunConfig, loop: Loop) -> dict[str, Any]:
    """Adapts to evaluation tasks with what is learned so far."""
    tasks, curve = loop.evaluate(config.eval_tasks)
    replicas = loop.replicas
    held_out = loop.family.finite_tasks is None
    worlds = [world.name for world in loop.family.spec.worlds]
    return evaluation.summarise(
        config.preset, tasks, curve, held_out, replicas, worlds, loop.trials
    )


@contextmanager
def restored(folder: Path, changes: dict[str, Any]) -> Iterator[tuple[Loop, Counters]]:
    """The newest checkpoint of a run, to be looked at; its backend is ended with the block.

    Args:
        folder: the run's folder.
        changes: fields of the runtime configuration that are to differ.

    Raises:
        ConfigError: no run, or no checkpoint, in the folder.
    """
    config = run_folder.read_config(folder)
    runtime = replace(config.runtime, num_learners=1, **changes)
    # Nothing is learned here, so that nothing lags; one process could not have it.
    config = replace(config, max_lag=0, runtime=runtime)
    state, counters, said = run_folder.restore_newest(folder)
    for line in said:
        print(line, file=sys.stderr)
    with running(config) as (_, backend, loop):
        loop.restore(run_folder.pop_loop_state(state))  # replicas have tasks of their own
        backend.learner("set_state", state)
        yield loop, counters


def evaluate(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Evaluates the newest checkpoint of a run.

    Args:
        folder: the run's folder.
        changes: `eval_tasks` and fields of the runtime configuration that are to differ.

    Raises:
        ConfigError: no run, or no checkpoint, in the folder.
    """
    eval_tasks = changes.pop("eval_tasks", None)
    with restored(folder, changes) as (loop, counters):
        config = replace(loop.config, eval_tasks=eval_tasks or loop.config.eval_tasks)
        result = evaluate_now(config, loop)
        if loop.trials:
            tasks = evaluation_tasks(loop.family, config.seed, config.eval_tasks)
            result |= comparison.compare(loop.family, tasks, config.seed)
    return result | {"iteration": counters.iteration, "env_steps": counters.env_steps}
