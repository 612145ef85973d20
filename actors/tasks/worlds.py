"""The environments that LPG is trained in (Oh et al. 2020): grid worlds and delayed chains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from torch import Tensor

from actors.family import Task
from actors.scenes import Drawable, Scene
from actors.tasks import closest
from actors.tasks.array_env import ArrayEnv, unbounded_box
from actors.tasks.checks import mask_at_reset, matching_shape, task_whole, tasks_at_reset
from actors.tasks.delayed_chains import CHAINS, Chain
from actors.tasks.grid_worlds import GRIDS, SAMPLED, Grid
from learners.core.trajectory import Spec

KINDS: dict[str, Grid | Chain] = {**GRIDS, **CHAINS, "sampled": SAMPLED}
"""Name → kind of environment."""

ALL = (*GRIDS, *CHAINS)
"""LPG's fifteen."""

NUM_LEVELS = 2**32
"""Levels are numbered from 0."""


@dataclass(frozen=True)
class Worlds:
    """Levels of one or more kinds of environment, dealt out evenly over lifetimes.

    Task: {"world": index of the kind in `names`, "level": number, "num_actions": 2, 9 or 18}. All
    that makes a level follows from its kind and number: where objects lie in tabular grids, size,
    walls and objects of a sampled one, length and rewarded action of a chain.

    Attributes:
        names: of the kinds, separated by commas; "all" stands for the fifteen of LPG, and
            "sampled" is GROOVE's distribution of levels.
    """

    names: str = "chain-short,random-small-sparse"

    def __post_init__(self) -> None:
        if not isinstance(self.names, str):
            raise ValueError(f"Worlds: names must be a string, not {self.names!r}")
        for name in self.kinds:
            if name not in KINDS:
                raise ValueError(
                    f"Worlds: names must be of {', '.join(['all', *KINDS])}, separated by commas; "
                    f"there is no {name!r}; closest: {closest(name, ('all', *KINDS))}"
                )
        if len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"Worlds: names must not repeat one, as {self.names!r} does")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The names, one by one."""
        given = [name.strip() for name in self.names.split(",")]
        return tuple(kind for name in given for kind in (ALL if name == "all" else (name,)))

    @property
    def spec(self) -> Spec:
        """Number of actions and indices of features; the largest numbers of any kind."""
        kinds = [KINDS[name] for name in self.kinds]
        worlds = tuple(KINDS[name].world(name) for name in self.kinds)
        return Spec(
            obs_size=1 + max(world.num_indices for world in worlds),
            action_size=max(max(kind.num_actions) for kind in kinds),
            discrete=True,
            horizon=max(kind.max_steps for kind in kinds),
            worlds=worlds,
        )

    @property
    def finite_tasks(self) -> list[Task] | None:
        """None: levels are many."""
        return None

    def sample(self, rng: np.random.Generator, num_tasks: int) -> list[Task]:
        """Levels, independent; task i of n is of kind ⌊i W / n⌋.

        Raises:
            ValueError: there are fewer tasks than kinds.
        """
        kinds = [KINDS[name] for name in self.kinds]
        if num_tasks < len(kinds):
            raise ValueError(
                f"Worlds: {num_tasks} task(s) cannot cover {len(kinds)} kinds of environment: "
                "take more tasks, or fewer names"
            )
        tasks: list[Task] = []
        for i in range(num_tasks):
            world = i * len(kinds) // num_tasks
            level = int(rng.integers(NUM_LEVELS))
            num_actions = int(rng.choice(kinds[world].num_actions))
            tasks.append({"world": world, "level": level, "num_actions": num_actions})
        return tasks

    def make(self, num_envs: int, device: torch.device | str = "cpu") -> WorldsEnv:
        """A batch of environments."""
        return WorldsEnv(self, num_envs, device)


@dataclass(frozen=True)
class _Group:
    """The environments of one kind.

    Attributes:
        world: index of the kind.
        rows: which environments, int64.
        env: these.
    """

    world: int
    rows: Tensor
    env: ArrayEnv


class WorldsEnv(VectorEnv[Tensor, Tensor, Tensor]):
    """A batch of environments of one or more kinds, each kind stepped as a batch of its own.

    They draw from one generator, kind by kind. A reset of some environments alone may give them
    new levels, but no other kind.
    """

    steps_per_second = 10.0

    metadata = {"autoreset_mode": AutoresetMode.DISABLED}  # noqa: RUF012 (Gymnasium's own field)

    def __init__(self, family: Worlds, num_envs: int, device: torch.device | str = "cpu") -> None:
        self.num_envs = num_envs
        self.device = torch.device(device)
        self._names, self._spec = family.kinds, family.spec
        self.single_observation_space = unbounded_box(self._spec.obs_size, torch.int64)
        self.single_action_space = Discrete(self._spec.action_size)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.generator = torch.Generator(self.device)
        self.generator.seed()
        self._worlds = np.zeros(num_envs, np.int64)
        self._groups: list[_Group] = []
        self._order = torch.arange(num_envs, device=self.device)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Starts episodes, as `ArrayEnv` does.

        Raises:
            ValueError: there are no tasks yet, tasks or mask do not fit, or a mask comes with a
                task of another kind.
        """
        mask = mask_at_reset(options, self.num_envs, with_tasks=True)
        tasks = tasks_at_reset(options, self.num_envs)
        if not self._groups and (tasks is None or mask is not None):
            raise ValueError('the first reset needs options={"tasks": [...]} and no reset_mask')
        if tasks is not None:
            worlds = self._checked(tasks)
            if mask is None:
                self._regroup(worlds)
            elif (worlds != self._worlds)[mask].any():
                index = int(np.flatnonzero((worlds != self._worlds) & mask)[0])
                raise ValueError(
                    f"task {index}: with a reset_mask an environment keeps its 'world' "
                    f"{self._worlds[index]}, not {worlds[index]}; reset all of them to change it"
                )
        if seed is not None:
            self.generator.manual_seed(seed)
        parts = [group.env.reset(options=_part(group, tasks, mask))[0] for group in self._groups]
        return self._merged(parts), {}

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """One step, as `ArrayEnv` does.

        Args:
            actions: [num_envs] int64. Those beyond an environment's own number n of actions count
                as the remainder of a division by n.
        """
        if len(self._groups) == 1:
            return self._groups[0].env.step(actions)
        actions = torch.as_tensor(actions, device=self.device)
        if actions.shape != (self.num_envs,):
            raise ValueError(
                f"actions have shape {tuple(actions.shape)}, expected {(self.num_envs,)}"
            )
        parts = [group.env.step(actions[group.rows])[:4] for group in self._groups]
        obs, reward, terminated, truncated = map(self._merged, zip(*parts, strict=True))
        return obs, reward, terminated, truncated, {}

    def scene(self, index: int) -> Scene | None:
        """That of the environment's kind; chains have none."""
        for group in self._groups:
            if (
                isinstance(group.env, Drawable)
                and (place := (group.rows == index).nonzero()).numel()
            ):
                return group.env.scene(int(place))
        return None

    def arrays(self) -> dict[str, Tensor]:
        """The tensors of every kind, as "kind.name"."""
        return {
            f"{self._names[group.world]}.{name}": tensor
            for group in self._groups
            for name, tensor in group.env.arrays().items()
        }

    def state(self) -> dict[str, np.ndarray]:
        """Everything that the next steps depend on; the state of each kind as "kind.name"."""
        saved = {
            f"{self._names[group.world]}.{name}": array
            for group in self._groups
            for name, array in group.env.state().items()
            if name != "rng"
        }
        rng = self.generator.get_state().numpy().copy()
        return {"world": self._worlds.copy(), **saved, "rng": rng}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Goes on bit for bit where `state` was taken, be it by another object.

        Raises:
            ValueError: `state` belongs to other kinds or another number of environments.
        """
        rng_shape = tuple(self.generator.get_state().shape)
        rng = matching_shape(state, "rng", rng_shape)
        worlds = matching_shape(state, "world", (self.num_envs,)).copy()
        if not np.isin(worlds, np.arange(len(self._names))).all():
            raise ValueError(
                "the saved environment state was made by another environment: it has kinds "
                f"{sorted(set(worlds.tolist()))}, this one {list(range(len(self._names)))}"
            )
        groups = self._grouped(worlds, torch.Generator(self.device))
        for group in groups:
            prefix = f"{self._names[group.world]}."
            own = {name: array for name, array in state.items() if name.startswith(prefix)}
            group.env.restore({name.removeprefix(prefix): own[name] for name in own} | {"rng": rng})
        self._adopt(worlds, groups)
        self.generator.set_state(torch.from_numpy(rng.copy()))

    def _checked(self, tasks: Sequence[Task]) -> NDArray[np.int64]:
        """The kinds of the tasks, [num_envs]."""
        worlds = task_whole(tasks, "world", range(len(self._names)))
        task_whole(tasks, "level", range(NUM_LEVELS))
        num_actions = task_whole(tasks, "num_actions", range(1, self._spec.action_size + 1))
        for index, (world, number) in enumerate(zip(worlds, num_actions.tolist(), strict=True)):
            name = self._names[world]
            if number not in KINDS[name].num_actions:
                raise ValueError(
                    f"task {index}: 'num_actions' must be in {KINDS[name].num_actions} in "
                    f"{name}, not {number}"
                )
        return worlds

    def _regroup(self, worlds: NDArray[np.int64]) -> None:
        if not self._groups or (worlds != self._worlds).any():
            self._adopt(worlds, self._grouped(worlds, self.generator))

    def _grouped(self, worlds: NDArray[np.int64], generator: torch.Generator) -> list[_Group]:
        """New environments, by kind, that draw from `generator`."""
        groups = []
        for world in np.unique(worlds).tolist():
            rows = torch.from_numpy(np.flatnonzero(worlds == world)).to(self.device)
            # Tensors made in inference mode could never be written to outside of it.
            with torch.inference_mode(False):
                env = KINDS[self._names[world]].make(len(rows), self._spec, self.device)
            env.generator = generator
            groups.append(_Group(world, rows, env))
        return groups

    def _adopt(self, worlds: NDArray[np.int64], groups: list[_Group]) -> None:
        for group in groups:
            group.env.generator = self.generator
        self._worlds, self._groups = worlds, groups
        self._order = torch.cat([group.rows for group in groups]).argsort()

    def _merged(self, parts: Sequence[Tensor]) -> Tensor:
        """Rows of all groups in the order of the environments."""
        return parts[0] if len(parts) == 1 else torch.cat(list(parts))[self._order]


def _part(
    group: _Group, tasks: Sequence[Task] | None, mask: NDArray[np.bool_] | None
) -> dict[str, Any]:
    """What of a reset's options concerns a group.

    The tasks of environments that are not masked are not used, and may be of other kinds: a masked
    one's stands in for them.
    """
    rows = group.rows.cpu().numpy()
    given = None if tasks is None else [tasks[i] for i in rows]
    if mask is None:
        return {} if given is None else {"tasks": given}
    mask = mask[rows]
    if given is None or not mask.any():
        return {"reset_mask": mask}
    stand_in = given[int(mask.argmax())]
    taken = [task if starts else stand_in for task, starts in zip(given, mask, strict=True)]
    return {"reset_mask": mask, "tasks": taken}
