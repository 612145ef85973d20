"""How fast environment steps come, from bare physics to the whole system, on every core at once."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gymnasium
import mujoco
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from actors.tasks import load_family
from learners.core.errors import ConfigError
from system import run_folder
from system.bench.spread import spread
from system.config import RunConfig, RuntimeConfig
from system.loop import Loop, member_ranges
from system.presets import PRESETS
from system.run import make_backend
from system.seeds import Stream

HIDDEN = 64
NUM_ENVS = 20
BLOCK = 100
"""Steps between two looks at the clock."""
READY_SECONDS = 120.0


@dataclass(frozen=True)
class Robot:
    """What is simulated: Gymnasium's id, EnvPool's, and the preset that uses ours."""

    gymnasium: str
    envpool: str
    preset: str


ROBOTS = {
    "half-cheetah": Robot("HalfCheetah-v5", "HalfCheetah-v4", "maml-trpo/half-cheetah-dir"),
    "ant": Robot("Ant-v5", "Ant-v4", "maml-trpo/ant-dir"),
}

Steps = Callable[[], int]
"""Takes some steps; returns how many environment steps they were."""


# --- What is measured: each makes a `Steps` in the process that takes them ---


def raw(robot: Robot) -> Steps:
    """Bare `mj_step` with random controls."""
    env: Any = gymnasium.make(robot.gymnasium).unwrapped
    controls = np.random.default_rng(0).uniform(-1.0, 1.0, (BLOCK, env.model.nu))

    def steps() -> int:
        for control in controls:
            env.data.ctrl[:] = control
            mujoco.mj_step(env.model, env.data, env.frame_skip)
        return BLOCK

    return steps


def one_gymnasium(robot: Robot) -> Steps:
    """One Gymnasium environment with random actions."""
    env = gymnasium.make(robot.gymnasium)
    env.reset(seed=0)
    actions = np.random.default_rng(0).uniform(-1.0, 1.0, (BLOCK, *env.action_space.shape))  # type: ignore[misc]

    def steps() -> int:
        for action in actions:
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset()
        return BLOCK

    return steps


def acting(obs_size: int, action_size: int) -> Callable[[Any], np.ndarray]:
    """A Gaussian policy of two layers of 64 units in torch."""
    net = torch.nn.Sequential(
        torch.nn.Linear(obs_size, HIDDEN), torch.nn.Tanh(),
        torch.nn.Linear(HIDDEN, HIDDEN), torch.nn.Tanh(),
        torch.nn.Linear(HIDDEN, action_size),
    )  # fmt: skip

    def act(obs: Any) -> np.ndarray:
        with torch.inference_mode():
            mean = net(torch.as_tensor(obs, dtype=torch.float32))
            action: np.ndarray = (mean + torch.randn_like(mean)).numpy()
        return action

    return act


def stepping(env: Any, obs: Any, act: Callable[[Any], np.ndarray]) -> Steps:
    """A policy that goes on in a batch of environments which restart by themselves."""

    def steps() -> int:
        nonlocal obs
        for _ in range(BLOCK):
            obs = env.step(act(obs))[0]
        return BLOCK * NUM_ENVS

    return steps


def gymnasium_and_policy(robot: Robot) -> Steps:
    """Gymnasium's SyncVectorEnv of 20 environments and a policy."""
    make = [lambda: gymnasium.make(robot.gymnasium)] * NUM_ENVS
    env = SyncVectorEnv(make, autoreset_mode=AutoresetMode.SAME_STEP)
    act = acting(env.single_observation_space.shape[0], env.single_action_space.shape[0])  # type: ignore[index]
    return stepping(env, env.reset(seed=0)[0], act)


def envpool_and_policy(robot: Robot) -> Steps:
    """EnvPool of 20 environments on one thread, and a policy."""
    import envpool

    env = envpool.make_gymnasium(robot.envpool, num_envs=NUM_ENVS, num_threads=1, seed=0)
    act = acting(env.observation_space.shape[0], env.action_space.shape[0])
    return stepping(env, env.reset()[0], act)


def our_environments(robot: Robot) -> Steps:
    """Our batch of 20 environments with random actions."""
    family = load_family(PRESETS[robot.preset]().task, {})
    env: Any = family.make(NUM_ENVS)
    tasks = family.sample(np.random.default_rng(0), NUM_ENVS)
    actions = torch.rand(BLOCK, *env.action_space.shape) * 2.0 - 1.0

    def steps() -> int:
        env.reset(seed=0, options={"tasks": tasks})
        for action in actions[: family.spec.horizon]:
            env.step(action)
        return min(BLOCK, family.spec.horizon) * NUM_ENVS

    return steps


def our_actor(robot: Robot) -> Steps:
    """Our rollout worker: environments, policy and trajectories, without Ray."""
    return collecting(robot, "serial", 1)[0]


KINDS: dict[str, Callable[[Robot], Steps]] = {
    "bare mj_step": raw,
    "one Gymnasium environment": one_gymnasium,
    "Gymnasium SyncVectorEnv, torch policy": gymnasium_and_policy,
    "EnvPool, torch policy": envpool_and_policy,
    "our environments": our_environments,
    "our actor, without Ray": our_actor,
}
END_TO_END = "end to end, through Ray"


def collecting(robot: Robot, backend: str, num_processes: int) -> tuple[Steps, Any]:
    """Collection of a batch, as in a meta-iteration, and the backend that does it."""
    runtime = RuntimeConfig(backend=backend, num_actors=num_processes, device="cpu")  # type: ignore[arg-type]
    members = 20 * num_processes
    config = replace(
        PRESETS[robot.preset](), num_members=members, num_envs=NUM_ENVS, runtime=runtime
    )
    family = load_family(config.task, config.task_options)
    made = make_backend(config, family)
    loop = Loop(config, family, made)
    slots = loop.slots(config.num_members, config.num_envs)
    _, version = made.learner("begin", config.num_members, member_ranges(slots))
    loop.resample([True] * config.num_members, 0)
    number = iter(range(1_000_000_000))

    def steps() -> int:
        place = (Stream.TRAIN, next(number), 0)
        return loop.collect(slots, loop.members, version, place, carries=None)[1].num_steps

    return steps, made


# --- Measuring ---


def timed(steps: Steps, seconds: float) -> float:
    """Environment steps per second over at least so many seconds."""
    begun, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - begun) < seconds:
        count += steps()
    return count / passed


def serve(robot: Robot, kinds: Sequence[str], seconds: float, turns: Any, answers: Any) -> None:
    """A process that measures the kind whose turn it is; all processes begin together."""
    mujoco.set_mju_user_warning(lambda message: None)  # else a file in the working folder
    torch.set_num_threads(1)
    steps = {kind: KINDS[kind](robot) for kind in kinds}
    for warm_up in steps.values():
        warm_up()
    answers.put(None)
    while (kind := turns.get()) is not None:
        answers.put(timed(steps[kind], seconds))


class Processes:
    """As many processes as there are cores, which measure one kind at once; a context manager."""

    def __init__(self, robot: Robot, kinds: Sequence[str], seconds: float, number: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.answers, self.seconds = context.Queue(), seconds
        self.turns = [context.Queue() for _ in range(number)]
        self.processes = [
            context.Process(
                target=serve, args=(robot, kinds, seconds, turn, self.answers), daemon=True
            )
            for turn in self.turns
        ]

    def __enter__(self) -> Processes:
        for process in self.processes:
            process.start()
        self.gather()
        return self

    def __exit__(self, *error: object) -> None:
        for turn, process in zip(self.turns, self.processes, strict=True):
            turn.put(None)
            process.join(30)

    def gather(self) -> list[Any]:
        """An answer of each."""
        return [self.answers.get(timeout=READY_SECONDS + self.seconds) for _ in self.processes]

    def measure(self, kind: str) -> float:
        """Steps per second of all together."""
        for turn in self.turns:
            turn.put(kind)
        return float(sum(self.gather()))


def measure(name: str, seconds: float, rounds: int) -> dict[str, Any]:
    """Every kind in turn, round after round, so that a machine's moods meet all of them.

    Args:
        name: of the robot.
        seconds: of each measurement.
        rounds: how many there are of each.

    Returns:
        "steps_per_s": minimum, median and maximum of each kind over the rounds, all cores
        together; "ratios": the median over rounds of each kind to bare physics in the same round.
    """
    if name not in ROBOTS:
        raise ConfigError(f"there is no robot {name!r}; there are {', '.join(ROBOTS)}")
    robot, cores = ROBOTS[name], len(os.sched_getaffinity(0))
    kinds = [k for k in KINDS if "EnvPool" not in k or importlib.util.find_spec("envpool")]
    rates: dict[str, list[float]] = {kind: [] for kind in (*kinds, END_TO_END)}
    steps, backend = collecting(robot, "ray", cores)
    try:
        with Processes(robot, kinds, seconds, cores) as processes:
            steps()
            for _ in range(rounds):
                for kind in kinds:
                    rates[kind].append(processes.measure(kind))
                rates[END_TO_END].append(timed(steps, seconds))
    finally:
        backend.close()
    floor = np.array(rates["bare mj_step"])
    config: RunConfig = PRESETS[robot.preset]()
    return {
        "name": f"sampling, {robot.gymnasium}, {cores} cores at once",
        "steps_per_s": {kind: spread(values) for kind, values in rates.items()},
        "ratios": {
            f"{kind} / bare mj_step": float(np.median(np.array(values) / floor))
            for kind, values in rates.items()
        },
        **run_folder.describe_process(config, "cpu"),
    }
