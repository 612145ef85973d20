"""A run's configuration: frozen dataclasses, nothing derived stored. Free of torch and ray."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from learners.config import (
    METHODS,
    LearnerConfig,
    LpgAgentConfig,
    LpgConfig,
    MamlTrpoConfig,
    Rl2Config,
    method_of,
)
from learners.core.errors import ConfigError

TaskOption = float | int | bool | str


@dataclass(frozen=True)
class RuntimeConfig:
    """How a run is carried out. Nothing here changes what is learned in synchronous mode."""

    backend: Literal["ray", "serial"] = "ray"
    """ray: actors and learner as processes. serial: everything in this process."""
    num_actors: int = 2
    """Rollout actors, one CPU each."""
    address: str | None = None
    """Address of a running Ray cluster; a local one is started without it."""
    accept_open_cluster: bool = False
    """Join a cluster that lets in who has no token; only behind a wall of another kind."""
    wait_for_nodes: bool = False
    """Wait for an autoscaler to bring the CPUs that the cluster lacks, instead of giving up."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the learner computes."""
    num_learners: int = 1
    """Learners of training, which share blocks of members out: processes, each with a GPU where
    there are some. An evaluation has one."""
    learner_threads: int = 2
    """CPU threads of each learner."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints; there is one at the end and on Ctrl-C as well."""
    max_hours: float = 0.0
    """Hours after which training stops with a checkpoint, and the same command goes on; 0 for no
    limit."""
    keep_checkpoints: int = 3
    """Newest checkpoints that are kept."""
    timeout_s: float = 600.0
    """Longest wait for a remote answer, in seconds."""
    object_store_mb: int = 512
    """Size of the object store of a local Ray cluster."""
    actor_memory_mb: int = 0
    """Memory that an actor may hold beside what it shares; one with more is replaced between two
    chunks. 0 for no limit."""

    def __post_init__(self) -> None:
        """Refuses values that no run could use."""
        positive = ("num_actors", "num_learners", "learner_threads", "keep_checkpoints")
        for name in (*positive, "timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.num_learners > 1 and self.backend == "serial":
            raise ConfigError(
                f"num_learners {self.num_learners} needs --backend ray: one process has one learner"
            )
        if self.object_store_mb < 100:
            raise ConfigError(f"object_store_mb must be at least 100, not {self.object_store_mb}")
        for name in ("actor_memory_mb", "max_hours"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, not {getattr(self, name)}")

    def num_gpus(self, available: float) -> int:
        """GPUs that the learners need, of a cluster that has so many: one each, or none."""
        wanted = self.device == "cuda" or (self.device == "auto" and available >= 1)
        return self.num_learners if wanted else 0


@dataclass(frozen=True)
class RunConfig:
    """What is learned, on what, and for how long."""

    preset: Annotated[str, tyro.conf.Suppress]
    """Name of the preset that this started from."""
    task: str
    """Task family: a name of `metaloop list`, gym:<id>, or module:Class."""
    learner: LearnerConfig = field(default_factory=MamlTrpoConfig)
    """Hyper-parameters of the method."""
    task_options: Annotated[dict[str, TaskOption], tyro.conf.Suppress] = field(default_factory=dict)
    """Fields of the task family that differ from its defaults."""
    iterations: int = 200
    """Meta-iterations."""
    num_members: int = 40
    """M, tasks per meta-iteration, or replicas: independent runs, each with its own seed."""
    num_envs: int = 20
    """E, parallel environments of each member; where chunks are whole episodes, their number."""
    members_per_slot: int = 4
    """Members that one request covers."""
    envs_per_slot: int = 1_000_000
    """Environments of a member that one request covers at most."""
    seed: int = 0
    """Everything random in the run follows from it."""
    eval_every: int = 10
    """Meta-iterations between evaluations; 0 for none but the last."""
    eval_tasks: int = 40
    """Tasks of an evaluation, from their own seed stream; for replicas the episodes of all."""
    log_every: int = 1
    """Meta-iterations that one record averages over."""
    picture_every: int = 50
    """Meta-iterations between pictures in TensorBoard; 0 for none. LIRPG and FRODO have some."""
    video_every: int = 0
    """Meta-iterations between films of evaluation episodes in TensorBoard; 0 for none."""
    stagger: bool = False
    """Whether streams begin in the middle of episodes, each environment somewhere else. Where all
    episodes are equally long, environments that begin together would end together for ever."""
    max_lag: int = 0
    """Versions that a chunk may lag behind the newest parameters when it is learned from. 0 waits
    for chunks of exactly the newest; above 0 actors go on while the learner works."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """How it is carried out."""

    def __post_init__(self) -> None:
        """Refuses values that no run could use."""
        positive = ("iterations", "num_members", "num_envs", "members_per_slot", "envs_per_slot")
        for name in (*positive, "eval_tasks", "log_every"):
            if not getattr(self, name) >= 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("seed", "eval_every", "picture_every", "video_every", "max_lag"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, not {getattr(self, name)}")
        if self.max_lag > 0:
            self.check_lag()
        if isinstance(self.learner, Rl2Config):
            self.check_trials(self.learner.num_minibatches)
            if self.runtime.num_learners > 1:
                raise ConfigError(
                    f"num_learners {self.runtime.num_learners}: rl2 shuffles the trials of all "
                    "members into the minibatches of one recurrent network, one after the other; "
                    "there are no blocks of members to share out, so num_learners must be 1"
                )
            return
        steps, parts = rollout_size(self.learner, self.num_envs)
        if steps % parts:
            raise ConfigError(
                f"num_minibatches {parts} does not divide the {steps} steps of a rollout "
                f"({self.num_envs} environments)"
            )

    def check_trials(self, num_minibatches: int) -> None:
        """Refuses numbers of trials that RL² cannot learn from."""
        if self.num_envs != 1:
            raise ConfigError(
                f"rl2 collects one trial of each task: num_envs must be 1, not {self.num_envs}; "
                "num_members is the number of trials"
            )
        if self.num_members % num_minibatches:
            raise ConfigError(
                f"num_minibatches {num_minibatches} does not divide the {self.num_members} trials "
                "of a batch"
            )

    def check_lag(self) -> None:
        """Refuses asynchronous collection where a method or backend has none."""
        if isinstance(self.learner, MamlTrpoConfig | LpgConfig | LpgAgentConfig | Rl2Config):
            raise ConfigError(
                f"max_lag {self.max_lag}: {method_of(self.learner)} needs the data of exactly its "
                "own parameters; max_lag must be 0"
            )
        if self.runtime.backend == "serial":
            raise ConfigError(
                f"max_lag {self.max_lag} needs --backend ray: one process cannot collect and learn "
                "at the same time"
            )


def rollout_size(learner: LearnerConfig, num_envs: int) -> tuple[int, int]:
    """Steps of one replica's rollout, and into how many minibatches they are cut."""
    num_steps = getattr(learner, "num_steps", 1)
    return num_steps * num_envs, getattr(learner, "num_minibatches", 1)


MAY_CHANGE = (
    "iterations",
    "eval_every",
    "eval_tasks",
    "log_every",
    "picture_every",
    "video_every",
    "runtime",
)
"""Fields that a resumed run may change: none of them alters what was learned so far."""


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as JSON values."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    if isinstance(config, RunConfig):
        values["learner"] = {"method": method_of(config.learner), **values["learner"]}
    return values


def from_dict(values: dict[str, Any]) -> RunConfig:
    """The inverse of `to_dict`.

    Raises:
        ConfigError: a field is unknown or missing.
    """
    values = dict(values)
    learner = dict(values.pop("learner"))
    try:
        return RunConfig(
            learner=learner_from_dict(learner.pop("method", "maml-trpo"), learner),
            runtime=RuntimeConfig(**values.pop("runtime")),
            **values,
        )
    except TypeError as error:
        raise ConfigError(
            f"this configuration is of another version of metaloop: {error}"
        ) from None


def learner_from_dict(method: str, values: dict[str, Any]) -> LearnerConfig:
    """A method's settings from JSON values.

    Raises:
        ConfigError: the method is unknown, or refuses a value.
        TypeError: a setting is unknown, or of another type.
    """
    if method not in METHODS:
        raise ConfigError(f"this configuration has the unknown method {method!r}")
    own: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
    return METHODS[method](**own)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level with dotted names."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = value
    return out


def differences(old: RunConfig, new: RunConfig) -> list[tuple[str, Any, Any]]:
    """(field, old, new) where two configurations differ in what is learned."""
    a, b = flat(to_dict(old)), flat(to_dict(new))
    names = [n for n in {**a, **b} if n.split(".")[0] not in MAY_CHANGE]
    absent = "(not set)"
    return [
        (n, a.get(n, absent), b.get(n, absent))
        for n in names
        if a.get(n, absent) != b.get(n, absent)
    ]
