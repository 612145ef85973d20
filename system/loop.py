"""The loop: the same for every method.

    for each meta-iteration:
        renew, version = learner.begin()                   # who starts anew, who acts
        members        = tasks, drawn again where renewed
        for k in 0 … K-1:
            version    = learner.inner_update(collect(version, members))
        metrics        = learner.meta_update(collect(version, members))

Evaluation is the same without the last line, on tasks from their own seed stream. Chunks are whole
episodes, or pieces of a stream that goes on from one iteration to the next.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import psutil

from actors.family import KnowsOptimum, ShowsTrials, Task, TaskFamily
from actors.rollout import Carry, Request, Slot, make_slots
from actors.tasks.trials import Trials
from learners.core.trajectory import Metrics
from system.ahead import Ahead, ConcurrentBackend
from system.backend import Backend
from system.config import RunConfig
from system.learner_host import Failure, Outcome
from system.phase import Phase, by_tenth, mean_of_finite, means, summarise, trial_metrics
from system.seeds import Stream, make_rng, make_seeds
from system.statistics import mean_ci
from system.stragglers import Stragglers

RECENT = 100
"""Episodes of each replica over which a stream's return is averaged."""


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


class Loop:
    """Drives a backend through meta-iterations; touches references and receipts only."""

    def __init__(self, config: RunConfig, family: TaskFamily, backend: Backend) -> None:
        self.config = config
        self.family = family
        self.backend = backend
        self.learner_restarts = 0
        self.plan = backend.learner("plan")
        self.members: list[Task] = []
        self.carries: dict[int, Any] = {}
        self.recent = [deque[float](maxlen=RECENT) for _ in range(config.num_members)]
        self.ahead: Ahead | None = None
        self.stragglers = Stragglers()

    @property
    def streams(self) -> bool:
        """Whether chunks are pieces of streams."""
        return self.plan.num_stream_steps is not None

    @property
    def replicas(self) -> bool:
        """Whether members are independent runs, each of which adapts online."""
        return self.streams and self.plan.num_inner_updates == 0

    @property
    def lifetimes(self) -> bool:
        """Whether members go on from window to window, each with what it has learned."""
        return self.streams and not self.replicas

    @property
    def kind(self) -> str:
        """What members are: "replicas", "lifetimes", or tasks and trials, which are "adapting"."""
        if self.replicas:
            return "replicas"
        return "lifetimes" if self.lifetimes else "adapting"

    @property
    def trials(self) -> bool:
        """Whether a member's chunk is one trial of several episodes, in which it adapts."""
        return self.family.spec.num_episodes > 0 and not self.streams

    @property
    def episodes_of(self) -> TaskFamily:
        """The family whose episodes are collected, be it in trials."""
        return self.family.family if isinstance(self.family, Trials) else self.family

    @property
    def num_replicas(self) -> int:
        """Independent runs in one."""
        return self.config.num_members if self.replicas else 1

    def iterate(self, counters: Counters) -> tuple[Counters, Metrics, SkippedUpdate | None]:
        """One meta-iteration: the new counters, its metrics, and a failure if there was one."""
        begun = time.perf_counter()
        if self.config.max_lag > 0:
            phases, outcome, learner_seconds, extra = self.step_ahead(counters.iteration)
        else:
            phases, outcome, learner_seconds = self.step(counters.iteration)
            extra = {}
        seconds = time.perf_counter() - begun
        failure = outcome.failure
        counters = Counters(
            counters.iteration + 1,
            counters.env_steps + sum(phase.num_steps for phase in phases),
            counters.skipped + (failure is not None),
            counters.skipped_in_a_row + 1 if failure else 0,
        )
        metrics = (outcome.metrics or {}) | self.metrics(phases, seconds, learner_seconds) | extra
        metrics["meta/skipped_updates"] = float(counters.skipped)
        metrics["time/env_steps"] = float(counters.env_steps)
        skipped = None
        if failure is not None:
            task = None if failure.member is None else self.members[failure.member]
            skipped = SkippedUpdate(counters.iteration, failure, task, self.config.seed)
        return counters, metrics, skipped

    def step(self, iteration: int) -> tuple[list[Phase], Outcome, float]:
        """K inner updates and the outer one; the phases, the last outcome, learner seconds."""
        backend, num_inner_updates = self.backend, self.plan.num_inner_updates
        slots = self.slots(self.config.num_members, self.config.num_envs)
        renew, version = backend.learner("begin", self.config.num_members, member_ranges(slots))
        self.resample(renew, iteration)
        phases: list[Phase] = []
        learner_seconds = 0.0
        for k in range(num_inner_updates + 1):
            place = (Stream.TRAIN, iteration, k)
            handles, phase, self.carries = self.collect(
                slots,
                self.members,
                version,
                place,
                carries=self.carries if self.streams else None,
                renew=renew if k == 0 else (),
            )
            phases.append(phase)
            if k < num_inner_updates:
                outcome = backend.learner("inner_update", False, *handles)
            else:
                outcome = backend.learner("meta_update", *handles)
            learner_seconds += outcome.seconds
            version = outcome.version
            if outcome.failure is not None:
                break
        return phases, outcome, learner_seconds

    def step_ahead(self, iteration: int) -> tuple[list[Phase], Outcome, float, Metrics]:
        """One update on one chunk of every slot, collected while the learner worked."""
        config = self.config
        slots = self.slots(config.num_members, config.num_envs)
        if self.ahead is None:
            renew, version = self.backend.learner("begin", config.num_members, member_ranges(slots))
            self.resample(renew, iteration)

            def request(slot: Slot, number: int) -> Request:
                place = (Stream.TRAIN, iteration + number, 0)
                return self.request(slot, self.members, None, place)

            backend = cast(ConcurrentBackend, self.backend)
            self.ahead = Ahead(backend, slots, request, config.max_lag, version, self.carries)
        handles, receipts, waited = self.ahead.next_batch()
        arguments = (config.num_members, member_ranges(slots), *handles)
        outcome = self.ahead.while_collecting("advance", *arguments)
        self.carries = self.ahead.consumed
        phase = summarise(slots, receipts, config.num_members, waited)
        return [phase], outcome, outcome.seconds, self.ahead.metrics()

    def evaluate(self, num_tasks: int) -> tuple[list[Task], np.ndarray]:
        """Adapts to evaluation tasks without learning from them.

        Replicas act on episodes of their own: `num_tasks` is then the number of episodes in all.

        Returns:
            The tasks, and the mean raw return of each after 0 … K+2 inner updates, [M, K+3];
            of lifetimes that in each tenth, [M, 10], NaN where no episode ended in it; of trials
            that in each of the n episodes, [M, n].
        """
        tasks, num_envs = self.evaluation_members(num_tasks)
        slots = self.slots(len(tasks), num_envs)
        num_updates = self.plan.num_evaluation_updates
        try:
            phases = [phase for _, _, phase in self.adapt(slots, tasks, num_updates)]
        finally:
            self.act_again()
        last = phases[-1]
        if not self.lifetimes and not np.isfinite(last.member_return).all():
            member = int(np.flatnonzero(~np.isfinite(last.member_return))[0])
            raise FailedEvaluation("episode_return", num_updates, tasks, member)
        if self.trials:
            return tasks, last.episodes
        curve = np.stack([phase.member_return for phase in phases], 1)
        return tasks, by_tenth(curve) if self.lifetimes else curve

    def evaluation_members(self, num_tasks: int) -> tuple[list[Task], int]:
        """The tasks of an evaluation, one for each member, and how many environments each has."""
        config = self.config
        if not self.replicas:
            return evaluation_tasks(self.family, config.seed, num_tasks), config.num_envs
        known = evaluation_tasks(self.family, config.seed, config.num_members)
        return self.members or known[: config.num_members], -(-num_tasks // config.num_members)

    def adapt(
        self, slots: Sequence[Slot], tasks: Sequence[Task], num_updates: int
    ) -> Iterator[tuple[int, int, Phase]]:
        """Adapts members to tasks: how many updates came before, who acts, and what they earned.

        Training goes on after `act_again`.

        Raises:
            FailedEvaluation: a tensor was not finite.
        """
        _, version = self.backend.learner("begin", len(tasks), member_ranges(slots), True)
        carries: dict[int, Any] | None = {} if self.lifetimes else None
        for k in range(num_updates + 1):
            place = (Stream.EVALUATION, 0, k)
            handles, phase, stopped = self.collect(
                slots, tasks, version, place, carries=carries, keep_data=k < num_updates
            )
            if carries is not None:
                carries = stopped
            yield k, version, phase
            if k < num_updates:
                outcome = self.backend.learner("inner_update", True, *handles)
                if outcome.failure is not None:
                    raise FailedEvaluation(outcome.failure.tensor, k, tasks, outcome.failure.member)
                version = outcome.version

    def act_again(self) -> None:
        """Publishes, after `adapt`, for the slots that train; who waits for them does so ahead."""
        if self.ahead is not None:
            ranges = member_ranges(self.slots(self.config.num_members, self.config.num_envs))
            self.ahead.newest = self.backend.learner("begin", self.config.num_members, ranges)[1]

    def describe(self) -> dict[str, np.ndarray]:
        """What there is to show of the last update, and of the first member's trial."""
        described: dict[str, np.ndarray] = self.backend.learner("describe")
        if "trial_action" in described and isinstance(self.episodes_of, ShowsTrials):
            trial = described["trial_action"], described["trial_ended"]
            described |= self.episodes_of.show(self.members[0], *trial)
        return described

    # --- What a checkpoint holds beside the learner ---

    def snapshot(self) -> dict[str, dict[str, np.ndarray]]:
        """Recent returns and, as far as environments can be saved, where streams stand.

        Streams whose environments cannot be saved begin new episodes, here and after a restart.
        """
        if not self.streams:
            return {}
        recent = {str(m): np.array(values) for m, values in enumerate(self.recent) if values}
        slots = list(self.carries)
        carries = self.backend.fetch([self.carries[slot] for slot in slots])
        if any(not carry.env for carry in carries):
            self.carries, slots, carries = {}, [], []
        out = {"recent": recent} if recent else {}
        if self.members:
            text = json.dumps([dict(task) for task in self.members])
            out["members"] = {"json": np.frombuffer(text.encode(), np.uint8).copy()}
        for slot, carry in zip(slots, carries, strict=True):
            out[f"carry{slot}"] = carry_to_arrays(carry)
        return out

    def restore(self, saved: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Takes a snapshot over."""
        for member, values in saved.get("recent", {}).items():
            self.recent[int(member)].extend(values.tolist())
        if "members" in saved:
            self.members = json.loads(saved["members"]["json"].tobytes())
        self.carries = {
            int(name.removeprefix("carry")): carry_from_arrays(arrays)
            for name, arrays in saved.items()
            if name.startswith("carry")
        }

    # --- Parts ---

    def slots(self, num_members: int, num_envs: int) -> list[Slot]:
        """The slots of M members in E environments each."""
        c = self.config
        num_worlds = max(1, len(self.family.spec.worlds))
        return make_slots(num_members, num_envs, c.members_per_slot, c.envs_per_slot, num_worlds)

    def resample(self, renew: Sequence[bool], iteration: int) -> None:
        """Draws new tasks for the members that start anew, or have none."""
        rng = make_rng(self.config.seed, Stream.TRAIN_TASKS, iteration)
        if not self.members and not any(renew):
            # A stream's tasks are those of the first iteration, also after a restart.
            rng = make_rng(self.config.seed, Stream.TRAIN_TASKS, 0)
        fresh = self.family.sample(rng, len(renew))
        kept = self.members or fresh
        self.members = [
            new if again else old for new, old, again in zip(fresh, kept, renew, strict=True)
        ]

    def request(
        self,
        slot: Slot,
        tasks: Sequence[Task],
        version: int | None,
        place: tuple[Stream, int, int],
        *,
        stream: bool = True,
        renew: Sequence[bool] = (),
        keep_data: bool = True,
    ) -> Request:
        """What is asked of a slot: the next piece of its stream, or whole episodes."""
        where, iteration, k = place
        num_steps = self.plan.num_stream_steps if stream else None
        own = range(*slot.members) if any(renew) else ()
        return Request(
            slot=slot,
            tasks=tuple(tasks[slice(*slot.members)]),
            seeds=make_seeds(self.config.seed, where, iteration, k, slot.id),  # type: ignore[arg-type]
            version=version,
            num_steps=num_steps or self.family.spec.horizon,
            stream=num_steps is not None,
            keep_data=keep_data,
            stagger=self.config.stagger and num_steps is not None,
            renew=tuple(m - slot.members[0] for m in own if renew[m]),
        )

    def collect(
        self,
        slots: Sequence[Slot],
        tasks: Sequence[Task],
        version: int,
        place: tuple[Stream, int, int],
        *,
        carries: Mapping[int, Any] | None,
        renew: Sequence[bool] = (),
        keep_data: bool = True,
    ) -> tuple[list[Any], Phase, dict[int, Any]]:
        """One chunk of every slot.

        Args:
            slots: what is collected.
            tasks: of all members.
            version: of the parameters that act.
            place: what the seeds are made of.
            carries: where the slots' streams stand, by slot; None for whole episodes.
            renew: which members' streams begin anew.
            keep_data: whether the chunks are wanted, and not their receipts alone.

        Returns:
            The chunks' handles, what the receipts say, and where the streams stand now.
        """
        begun = time.perf_counter()
        stream = carries is not None
        requests = [
            self.request(
                slot, tasks, version, place, stream=stream, renew=renew, keep_data=keep_data
            )
            for slot in slots
        ]
        known = carries or {}
        arrivals = self.backend.collect(requests, [known.get(slot.id) for slot in slots])
        seconds = time.perf_counter() - begun
        receipts = [arrival.receipt for arrival in arrivals]
        phase = summarise(slots, receipts, len(tasks), seconds)
        stopped = {a.receipt.slot_id: a.carry for a in arrivals} if stream else {}
        return [arrival.chunk for arrival in arrivals], phase, stopped

    def metrics(self, phases: Sequence[Phase], seconds: float, learner_seconds: float) -> Metrics:
        """Returns before and after adaptation, speed, idle time."""
        env_steps = sum(phase.num_steps for phase in phases)
        busy = sum(phase.busy_seconds for phase in phases)
        receipts = [receipt for phase in phases for receipt in phase.receipts]
        num_actors = (
            1 if self.config.runtime.backend == "serial" else self.config.runtime.num_actors
        )
        if self.trials:
            family = self.episodes_of
            best = family.optimum(self.members) if isinstance(family, KnowsOptimum) else None
            shown = trial_metrics(phases[-1].episodes, best)
        elif not self.streams:
            found = [mean_of_finite(phase.member_return) for phase in phases]
            shown = {f"adapt/ep_rew_mean_{k}": mean for k, mean in enumerate(found)} | {
                "adapt/gain": found[-1] - found[0],
                "rollout/ep_rew_mean": found[-1],
            }
        else:
            shown = self.stream_metrics(phases)
        return (
            shown
            | self.stragglers.note(receipts)
            | {
                "rollout/ep_len_mean": mean_of_finite(means(phases[-1].lengths)),
                "perf/env_steps_per_s": env_steps / seconds,
                "perf/collect_s": sum(phase.seconds for phase in phases),
                "perf/learner_s": learner_seconds,
                "perf/actor_idle_frac": max(0.0, 1.0 - busy / (num_actors * seconds)),
                "perf/learner_idle_frac": max(0.0, 1.0 - learner_seconds / seconds),
                "sys/actor_restarts": float(self.backend.actor_restarts),
                "sys/learner_restarts": float(self.learner_restarts),
                "sys/rss_mb": resident_mb(self.backend.pids),
                "sys/actor_rss_mb_max": max(receipt.own_mb for receipt in receipts),
                "sys/object_store_mb": max(phase.num_bytes for phase in phases) / 2**20,
                "time/iteration": seconds,
            }
        )

    def stream_metrics(self, phases: Sequence[Phase]) -> Metrics:
        """Mean of each member's last 100 episodes, and the interval over replicas."""
        for phase in phases:
            for recent, returns in zip(self.recent, phase.returns, strict=True):
                recent.extend(returns)
        mean = means(self.recent)
        shown = {"rollout/ep_rew_mean": mean_of_finite(mean)}
        if not self.replicas:
            return shown
        finite = mean[np.isfinite(mean)]
        if len(mean) > 1 and finite.size > 1:
            _, (low, high) = mean_ci(finite)
            ends = {"low": float(low), "high": float(high)}
            shown |= {f"rollout/ep_rew_ci95_{end}": value for end, value in ends.items()}
            shown |= {f"replica/ep_rew_mean_{m}": value for m, value in enumerate(mean.tolist())}
        return shown


def carry_to_arrays(carry: Carry) -> dict[str, np.ndarray]:
    """A carry as named arrays."""
    own = {name: value for name, value in vars(carry).items() if name not in ("env", "ticket")}
    return own | {f"env.{name}": value for name, value in carry.env.items()}


def carry_from_arrays(arrays: Mapping[str, np.ndarray]) -> Carry:
    """The inverse of `carry_to_arrays`."""
    env = {n.removeprefix("env."): a for n, a in arrays.items() if n.startswith("env.")}
    own: dict[str, Any] = {n: a for n, a in arrays.items() if not n.startswith("env.")}
    return Carry(env=env, **own)


def member_ranges(slots: Sequence[Slot]) -> list[tuple[int, int]]:
    """The distinct ranges of members, in order."""
    return list(dict.fromkeys(slot.members for slot in slots))


def resident_mb(pids: Sequence[int]) -> float:
    """Resident memory of those of the processes that run on this machine, in MiB.

    Pages that several of them share, as those of the object store, count for each.
    """
    total = 0
    for pid in pids:
        with suppress(psutil.Error):
            total += psutil.Process(pid).memory_info().rss
    return total / 2**20


def evaluation_tasks(family: TaskFamily, seed: int, num_tasks: int) -> list[Task]:
    """Tasks that training never draws, the same for every checkpoint of a run.

    Where a family has only a few tasks, each of them as often as the others.
    """
    if family.finite_tasks is not None:
        known = family.finite_tasks
        return [known[i % len(known)] for i in range(max(num_tasks, len(known)))]
    return family.sample(make_rng(seed, Stream.EVALUATION_TASKS, 0), num_tasks)
