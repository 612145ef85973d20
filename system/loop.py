"""The loop: the same for every method.

    for each meta-iteration:
        renew, version = learner.begin()                   # who starts anew, who acts
        members        = tasks, drawn again where renewed
        for k in 0 … K-1:
            version    = learner.inner_update(collect(version, members))
        metrics        = learner.meta_update(collect(version, members))

Evaluation is the same without the last line, on tasks from their own seed stream.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil

from actors.family import Task, TaskFamily
from actors.rollout import Receipt, Request, Slot, make_slots
from learners.core.trajectory import Metrics
from system.backend import Backend
from system.config import RunConfig
from system.learner_host import Failure
from system.seeds import Stream, make_rng, make_seeds


@dataclass(frozen=True)
class SkippedUpdate:
    """An iteration that changed nothing because a tensor was not finite."""

    iteration: int  # counted from 1, as in the records
    failure: Failure
    task: Task | None
    seed: int

    def __str__(self) -> str:
        """Tensor, task, seed and iteration."""
        task = "all tasks" if self.task is None else f"task {dict(self.task)}"
        return (
            f"iteration {self.iteration}: {self.failure.tensor} is not finite ({task}, run seed "
            f"{self.seed}); the update is skipped"
        )


class FailedEvaluation(ArithmeticError):
    """An evaluation in which a tensor was not finite."""

    def __init__(self, tensor: str, k: int, tasks: Sequence[Task], member: int | None) -> None:
        task = "all tasks" if member is None else f"task {dict(tasks[member])}"
        super().__init__(f"evaluation: {tensor} is not finite after {k} updates ({task})")


@dataclass(frozen=True)
class Counters:
    """How far a run is."""

    iteration: int = 0
    env_steps: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0


@dataclass(frozen=True)
class Phase:
    """What one collection brought, as its receipts say."""

    member_return: np.ndarray  # [M], mean raw return of the episodes that ended, or NaN
    member_length: np.ndarray  # [M], mean length in steps
    num_steps: int
    busy_seconds: float
    seconds: float
    num_bytes: int


class Loop:
    """Drives a backend through meta-iterations; touches references and receipts only."""

    def __init__(self, config: RunConfig, family: TaskFamily, backend: Backend) -> None:
        self.config = config
        self.family = family
        self.backend = backend
        self.num_inner_updates, self.num_evaluation_updates = backend.learner("num_updates")
        self.members: list[Task] = []

    def iterate(self, counters: Counters) -> tuple[Counters, Metrics, SkippedUpdate | None]:
        """One meta-iteration: the new counters, its metrics, and a failure if there was one."""
        config, backend = self.config, self.backend
        begun, learner_seconds = time.perf_counter(), 0.0
        iteration = counters.iteration
        slots = self.slots(config.num_members)
        renew, version = backend.learner("begin", config.num_members, member_ranges(slots))
        self.resample(renew, iteration)
        phases: list[Phase] = []
        outcome = None
        for k in range(self.num_inner_updates + 1):
            place = (Stream.TRAIN, iteration, k)
            handles, phase = self.collect(slots, self.members, version, place)
            phases.append(phase)
            asked = time.perf_counter()
            if k < self.num_inner_updates:
                outcome = backend.learner("inner_update", False, *handles)
            else:
                outcome = backend.learner("meta_update", *handles)
            learner_seconds += time.perf_counter() - asked
            version = outcome.version
            if outcome.failure is not None:
                break
        assert outcome is not None
        seconds = time.perf_counter() - begun
        failure = outcome.failure
        counters = Counters(
            iteration + 1,
            counters.env_steps + sum(phase.num_steps for phase in phases),
            counters.skipped + (failure is not None),
            counters.skipped_in_a_row + 1 if failure else 0,
        )
        metrics = (outcome.metrics or {}) | self.metrics(phases, seconds, learner_seconds)
        metrics["meta/skipped_updates"] = float(counters.skipped)
        metrics["time/env_steps"] = float(counters.env_steps)
        skipped = None
        if failure is not None:
            task = None if failure.member is None else self.members[failure.member]
            skipped = SkippedUpdate(counters.iteration, failure, task, config.seed)
        return counters, metrics, skipped

    def evaluate(self, num_tasks: int) -> tuple[list[Task], np.ndarray]:
        """Adapts to evaluation tasks without learning from them.

        Returns:
            The tasks, and the mean raw return of each after 0 … K+2 inner updates, [M, K+3].
        """
        tasks = evaluation_tasks(self.family, self.config.seed, num_tasks)
        slots = self.slots(len(tasks))
        _, version = self.backend.learner("begin", len(tasks), member_ranges(slots))
        curve = []
        for k in range(self.num_evaluation_updates + 1):
            place = (Stream.EVALUATION, 0, k)
            handles, phase = self.collect(slots, tasks, version, place)
            curve.append(phase.member_return)
            if k < self.num_evaluation_updates:
                outcome = self.backend.learner("inner_update", True, *handles)
                if outcome.failure is not None:
                    raise FailedEvaluation(outcome.failure.tensor, k, tasks, outcome.failure.member)
                version = outcome.version
            elif not np.isfinite(phase.member_return).all():
                member = int(np.flatnonzero(~np.isfinite(phase.member_return))[0])
                raise FailedEvaluation("episode_return", k, tasks, member)
        return tasks, np.stack(curve, 1)

    # --- Parts ---

    def slots(self, num_members: int) -> list[Slot]:
        """The slots of M members."""
        c = self.config
        return make_slots(num_members, c.num_envs, c.members_per_slot, c.envs_per_slot)

    def resample(self, renew: Sequence[bool], iteration: int) -> None:
        """Draws new tasks for the members that start anew."""
        rng = make_rng(self.config.seed, Stream.TRAIN_TASKS, iteration)
        fresh = self.family.sample(rng, len(renew))
        kept = self.members or fresh
        self.members = [
            new if again else old for new, old, again in zip(fresh, kept, renew, strict=True)
        ]

    def collect(
        self,
        slots: Sequence[Slot],
        tasks: Sequence[Task],
        version: int,
        place: tuple[Stream, int, int],
    ) -> tuple[list[Any], Phase]:
        """Whole episodes of all members."""
        begun = time.perf_counter()
        stream, iteration, k = place
        requests = [
            Request(
                slot=slot,
                tasks=tuple(tasks[slice(*slot.members)]),
                seeds=make_seeds(self.config.seed, stream, iteration, k, slot.id),  # type: ignore[arg-type]
                version=version,
                num_steps=self.family.spec.horizon,
            )
            for slot in slots
        ]
        handles, receipts = self.backend.collect(requests)
        seconds = time.perf_counter() - begun
        return handles, summarise(slots, receipts, len(tasks), seconds)

    def metrics(self, phases: Sequence[Phase], seconds: float, learner_seconds: float) -> Metrics:
        """Returns before and after adaptation, speed, idle time."""
        env_steps = sum(phase.num_steps for phase in phases)
        busy = sum(phase.busy_seconds for phase in phases)
        num_actors = (
            1 if self.config.runtime.backend == "serial" else self.config.runtime.num_actors
        )
        means = [mean_of_finite(phase.member_return) for phase in phases]
        return {f"adapt/ep_rew_mean_{k}": mean for k, mean in enumerate(means)} | {
            "adapt/gain": means[-1] - means[0],
            "rollout/ep_rew_mean": means[-1],
            "rollout/ep_len_mean": mean_of_finite(phases[-1].member_length),
            "perf/env_steps_per_s": env_steps / seconds,
            "perf/collect_s": sum(phase.seconds for phase in phases),
            "perf/learner_s": learner_seconds,
            "perf/actor_idle_frac": max(0.0, 1.0 - busy / (num_actors * seconds)),
            "perf/learner_idle_frac": max(0.0, 1.0 - learner_seconds / seconds),
            "sys/actor_restarts": float(self.backend.actor_restarts),
            "sys/rss_mb": resident_mb(self.backend.pids),
            "sys/object_store_mb": max(phase.num_bytes for phase in phases) / 2**20,
            "time/iteration": seconds,
        }


def member_ranges(slots: Sequence[Slot]) -> list[tuple[int, int]]:
    """The distinct ranges of members, in order."""
    return list(dict.fromkeys(slot.members for slot in slots))


def mean_of_finite(values: np.ndarray) -> float:
    """Mean of the values that are finite; NaN where none is."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")


def resident_mb(pids: Sequence[int]) -> float:
    """Resident memory of those of the processes that run on this machine, in MiB.

    Pages that several of them share, as those of the object store, count for each.
    """
    total = 0
    for pid in pids:
        with suppress(psutil.Error):
            total += psutil.Process(pid).memory_info().rss
    return total / 2**20


def summarise(
    slots: Sequence[Slot], receipts: Sequence[Receipt], num_members: int, seconds: float
) -> Phase:
    """Adds the receipts of one phase up."""
    totals = np.zeros((3, num_members))
    for slot, receipt in zip(slots, receipts, strict=True):
        parts = (receipt.return_sum, receipt.length_sum, receipt.num_episodes)
        totals[:, slice(*slot.members)] += np.array(parts)
    with np.errstate(invalid="ignore"):
        member_return, member_length = totals[0] / totals[2], totals[1] / totals[2]
    return Phase(
        member_return=member_return,
        member_length=member_length,
        num_steps=sum(receipt.num_steps for receipt in receipts),
        busy_seconds=sum(receipt.seconds for receipt in receipts),
        seconds=seconds,
        num_bytes=sum(receipt.num_bytes for receipt in receipts),
    )


def evaluation_tasks(family: TaskFamily, seed: int, num_tasks: int) -> list[Task]:
    """Tasks that training never draws, the same for every checkpoint of a run.

    Where a family has only a few tasks, each of them as often as the others.
    """
    if family.finite_tasks is not None:
        known = family.finite_tasks
        return [known[i % len(known)] for i in range(max(num_tasks, len(known)))]
    return family.sample(make_rng(seed, Stream.EVALUATION_TASKS, 0), num_tasks)
