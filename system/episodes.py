"""Episodes to look at: of evaluation tasks, before and after adaptation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from actors.family import Task, TaskFamily
from actors.rollout import Chunk, Request, Slot
from actors.scenes import Drawable, Plan, Scene
from actors.tasks import FAMILIES, load_family
from learners.core.errors import ConfigError
from system.loop import Loop
from system.replay import Episode, replay
from system.seeds import Stream

MAX_STEPS = 2000
"""Steps of an episode that are looked at."""

MAX_SCENES = 200
"""Scenes of an episode that are kept, about. All plans are, as they show the path so far."""

SHORT = 40
"""Of episodes with fewer steps several are shown in a row, of so many steps in all."""

LONG_TEXT = 40
"""A task that takes more letters is named by its number."""


@dataclass(frozen=True)
class Panel:
    """Episodes that are shown one after the other in one place, and what is written above them."""

    lines: tuple[str, ...]
    episodes: Sequence[Episode]


@dataclass(frozen=True)
class Shown:
    """What there is to look at.

    Attributes:
        rows: panels that belong side by side.
        steps_per_second: how fast the environments run.
        steps_between: steps from one scene to the next.
        what: "adaptation", "trial" or "episode".
    """

    rows: list[list[Panel]]
    steps_per_second: float
    steps_between: int
    what: str


def watch(loop: Loop, num_tasks: int, num_updates: int | None = None) -> Shown:
    """Adapts to evaluation tasks, and looks at an episode of each before and after that.

    Of a trial the first and the last episode are looked at; of a replica, which has no before and
    after, an episode, or several short ones.

    Args:
        loop: of the run; it learns nothing from this.
        num_tasks: how many tasks, or replicas, are shown if there are so many.
        num_updates: inner updates; by default as many as an evaluation takes.

    Raises:
        ConfigError: the environments have no picture, or `num_updates` does not fit.
        FailedEvaluation: a tensor was not finite.
    """
    most, spec = loop.plan.num_evaluation_updates, loop.family.spec
    if num_updates is not None and not 1 <= num_updates <= most:
        raise ConfigError(refused_updates(num_updates, most))
    # Kinds of worlds are dealt out evenly, and some have no picture.
    tasks, _ = loop.evaluation_members(num_tasks * max(1, len(spec.worlds)))
    looks = first_looks(loop.episodes_of, tasks)
    members = [m for m, scene in enumerate(looks.scenes) if scene is not None][:num_tasks]
    if not members:
        raise ConfigError(no_picture(loop.config.task))
    recorded = record_adaptation(loop, tasks, most if num_updates is None else num_updates)
    every = 1
    if not isinstance(looks.scenes[members[0]], Plan):
        every = steps_between(recorded, max(1, spec.num_episodes))
    seen = {
        k: {
            m: episodes
            for request, chunk in recording
            for m, episodes in replay(loop.episodes_of, request, chunk, members, every).items()
        }
        for k, recording in recorded.items()
    }
    names = {m: task_name(loop, tasks[m], m) for m in members}
    what, rows = arrange(seen, names, bool(spec.num_episodes))
    return Shown(rows, looks.steps_per_second, every, what)


def arrange(
    seen: Mapping[int, Mapping[int, Sequence[Episode]]], names: Mapping[int, str], trials: bool
) -> tuple[str, list[list[Panel]]]:
    """What it is that is shown, and its panels in rows.

    Args:
        seen: episodes by number of updates and by member.
        names: of the members, in their order.
        trials: whether a member's episodes are those of one trial.
    """
    if trials:
        return "trial", [in_trial(name, seen[0][m]) for m, name in names.items()]
    if len(seen) == 1:
        return "episode", [[Panel((name,), seen[0][m]) for m, name in names.items()]]
    return "adaptation", [
        [Panel((name, after(k)), by_member[m]) for k, by_member in seen.items()]
        for m, name in names.items()
    ]


# --- What can be looked at ---


@dataclass(frozen=True)
class Looks:
    """What each of some environments looks like at its start; None where it has no picture."""

    scenes: list[Scene | None]
    steps_per_second: float


def first_looks(family: TaskFamily, tasks: Sequence[Task]) -> Looks:
    """Looks at one environment of each task."""
    env = family.make(len(tasks))
    env.reset(seed=0, options={"tasks": list(tasks)})
    try:
        if not isinstance(env, Drawable):
            return Looks([None] * len(tasks), 1.0)
        return Looks([env.scene(m) for m in range(len(tasks))], env.steps_per_second)
    finally:
        env.close()


def no_picture(task: str) -> str:
    """That a family has none, and which have."""
    known = [name for name in FAMILIES if isinstance(load_family(name).make(1), Drawable)]
    return (
        f"there is no picture of {task}. There is one of {', '.join(known)}; of worlds only the "
        "grids have one. So have atari-<game>, trials of all these, and every gym:<id> and family "
        'of your own whose Gymnasium environments have the render mode "rgb_array", or whose '
        "batches of environments are actors.scenes.Drawable"
    )


def refused_updates(num_updates: int, most: int) -> str:
    """Why a number of inner updates does not fit."""
    if most == 0:
        return f"--updates {num_updates} has no effect: this method adapts without inner updates"
    return f"--updates must be 1 to {most}, what an evaluation of this run takes; not {num_updates}"


# --- Recording ---

Recording = list[tuple[Request, Chunk]]
"""What was asked for and what came, slot by slot."""


def record_adaptation(loop: Loop, tasks: Sequence[Task], num_updates: int) -> dict[int, Recording]:
    """Episodes of all members before the first inner update and after the last, by their number."""
    spec = loop.family.spec
    in_a_row = 1 if num_updates or spec.num_episodes else max(1, SHORT // spec.horizon)
    slots = loop.slots(len(tasks), in_a_row)
    adapting = loop.slots(len(tasks), loop.config.num_envs if num_updates else 1)
    try:
        return {
            k: record(loop, slots, tasks, version)
            for k, version, _ in loop.adapt(adapting, tasks, num_updates)
            if k in (0, num_updates)
        }
    finally:
        loop.act_again()


def record(loop: Loop, slots: Sequence[Slot], tasks: Sequence[Task], version: int) -> Recording:
    """Whole episodes of all members, or a long beginning of them; alike but for who acts."""
    requests = [
        loop.request(slot, tasks, version, (Stream.EPISODES, 0, 0), stream=False) for slot in slots
    ]
    if not loop.family.spec.num_episodes:
        requests = [replace(r, num_steps=min(r.num_steps, MAX_STEPS)) for r in requests]
    arrivals = loop.backend.collect(requests)
    chunks = loop.backend.fetch([arrival.chunk for arrival in arrivals])
    return list(zip(requests, chunks, strict=True))


def steps_between(recorded: Mapping[int, Recording], num_episodes: int) -> int:
    """Steps between two scenes, so that the longest episode has not too many of them."""
    longest = max(
        chunk.arrays["valid"].sum(1).max() for pairs in recorded.values() for _, chunk in pairs
    )
    return max(1, int(np.ceil(longest / num_episodes / MAX_SCENES)))


# --- Naming ---


def in_trial(name: str, episodes: Sequence[Episode]) -> list[Panel]:
    """The first and the last episode of a trial."""
    ends = dict.fromkeys((0, len(episodes) - 1))
    return [Panel((name, f"episode {i + 1} of the trial"), [episodes[i]]) for i in ends]


def after(k: int) -> str:
    """How many updates came before."""
    if k == 0:
        return "before adaptation"
    return f"after {k} update{'s' * (k > 1)}"


def task_name(loop: Loop, task: Task, member: int) -> str:
    """A member's task in a few words."""
    if loop.replicas:
        return f"replica {member}"
    worlds = loop.family.spec.worlds
    if worlds:
        return f"{worlds[int(task['world'])].name}, level {task['level']}"  # type: ignore[arg-type]
    text = ", ".join(f"{name} {number_text(value)}" for name, value in task.items())
    return text if 0 < len(text) <= LONG_TEXT else f"task {member}"


def number_text(value: float | int | Sequence[float]) -> str:
    """A task's number, or its numbers, rounded."""
    values = value if isinstance(value, Sequence) else [value]
    return " ".join(f"{x:.3g}" for x in values)
