"""The grid worlds of LPG (Oh et al. 2020, appendix A), and levels drawn as GROOVE does.

Of three open implementations (rc2020, jinPrelude, GROOVE) come what the paper leaves open: the
walls, and the order within a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from gymnasium.spaces import Discrete
from numpy.typing import NDArray
from torch import Tensor

from actors.family import Task
from actors.scenes import Plan
from actors.tasks.array_env import ArrayEnv
from actors.tasks.checks import task_array
from learners.core.trajectory import Spec, World

MOVES = 9
"""Action a < 9 is a move by (a // 3 − 1, a % 3 − 1) rows and columns, a + 9 a grab there."""

Cell = tuple[int, int]


@dataclass(frozen=True)
class Thing:
    """A kind of object.

    Attributes:
        reward: at its collection.
        end: probability that its collection ends the episode.
        respawn: probability, per step, that it comes back where it is gone.
    """

    reward: float
    end: float
    respawn: float


@dataclass(frozen=True)
class Level:
    """What stays the same in a lifetime.

    Attributes:
        walls: [height, width] bool.
        things: the objects.
        cells: of the objects, as row · width + column, where they have fixed ones.
        max_steps: of an episode.
    """

    walls: NDArray[np.bool_]
    things: tuple[Thing, ...]
    cells: tuple[int, ...]
    max_steps: int


@dataclass(frozen=True)
class Grid:
    """A world of cells, in which an agent collects objects.

    Episodes begin with all objects present, and the agent at a random free cell: no wall, and no
    object on it. A step is, in this order:

    1. A move leads to one of the 8 neighbours or to the own cell; into walls and off the grid it
       leads nowhere, and the agent stays. An agent of 9 actions collects the object in the cell
       that the move leads to, the own cell too; one of 18 has 9 moves that collect nothing, and 9
       grabs that collect the object in the cell that the same move would lead to, and do not move.
    2. The collected object is gone. Its reward is paid, and it may end the episode.
    3. Each object that was gone before this step may come back: in tabular worlds where it was,
       even under the agent; in the others at a random cell, free of walls, objects and the agent.
       Of two that would come to the same cell in the same step, the later one waits.

    A time limit sets `truncated`. Tabular worlds have one index, cell · 2^objects + Σ_j 2^j over
    the objects j that are present; cells are counted row by row. The others show an image whose
    plane 0 is the agent and each further one a kind of object; walls are not shown. Their indices
    are those of the agent and of each object, in order, −1 for one that is gone.

    Attributes:
        height: rows.
        width: columns.
        things: the objects.
        max_steps: of an episode.
        tabular: whether objects have fixed cells, which differ between levels.
        walls: as (row, column).
        drawn: whether levels differ in size, walls, objects and time limit, of which the ones
            given here are then the largest.
    """

    height: int
    width: int
    things: tuple[Thing, ...]
    max_steps: int
    tabular: bool
    walls: tuple[Cell, ...] = ()
    drawn: bool = False

    @property
    def num_actions(self) -> tuple[int, ...]:
        """Numbers of actions that a lifetime may have."""
        return (MOVES, 2 * MOVES)

    @property
    def planes(self) -> tuple[int, ...]:
        """The plane of each object."""
        kinds = list(dict.fromkeys(self.things))
        return tuple(1 + kinds.index(thing) for thing in self.things)

    def world(self, name: str) -> World:
        """What a policy must know of it."""
        cells, things = self.height * self.width, len(self.things)
        if self.tabular:
            return World(name, 1, cells << things, True, (self.height, self.width))
        planes = 1 + max(self.planes)
        return World(name, 1 + things, planes * cells, False, (self.height, self.width))

    def level(self, seed: int) -> Level:
        """The level of that seed."""
        rng = np.random.default_rng(seed)
        if self.drawn:
            return draw_level(rng, self.height)
        walls = np.zeros((self.height, self.width), bool)
        for cell in self.walls:
            walls[cell] = True
        cells = _draw_cells(rng, walls, len(self.things)) if self.tabular else ()
        return Level(walls, self.things, cells, self.max_steps)

    def make(self, num_envs: int, spec: Spec, device: torch.device | str) -> GridEnv:
        """A batch of environments with the observation and action sizes of `spec`."""
        return (TabularGridEnv if self.tabular else ImageGridEnv)(self, num_envs, spec, device)


def _draw_cells(
    rng: np.random.Generator, walls: NDArray[np.bool_], num_cells: int
) -> tuple[int, ...]:
    """Different cells that are no walls, as row · width + column."""
    return tuple(rng.choice(np.flatnonzero(~walls), num_cells, replace=False).tolist())


def draw_level(rng: np.random.Generator, largest: int) -> Level:
    """A level of GROOVE's distribution "all" (Jackson et al. 2023), in a corner of the largest.

    The side is uniform in 4 … `largest`; the objects are 1 … 5; rewards are U(−1, 1), the first
    U(0, 1); probabilities to end and to come back are log-uniform in [0.01, 1] and [0.001, 0.1],
    and so is the time limit in 20 … 750. Other than there, walls are as many as 15, at most a
    quarter of the cells, and leave all free cells connected by their sides.
    """
    side, num_things = int(rng.integers(4, largest + 1)), int(rng.integers(1, 6))
    rewards = rng.uniform(-1.0, 1.0, num_things)
    rewards[0] = abs(rewards[0])
    ends = np.exp(rng.uniform(math.log(0.01), 0.0, num_things))
    respawns = np.exp(rng.uniform(math.log(0.001), math.log(0.1), num_things))
    max_steps = round(math.exp(rng.uniform(math.log(20), math.log(750))))
    walls = np.ones((largest, largest), bool)
    walls[:side, :side] = draw_walls(rng, side, min(15, side * side // 4))
    numbers = zip(rewards.tolist(), ends.tolist(), respawns.tolist(), strict=True)
    things = tuple(Thing(*three) for three in numbers)
    return Level(walls, things, _draw_cells(rng, walls, num_things), max_steps)


def draw_walls(rng: np.random.Generator, side: int, num_walls: int) -> NDArray[np.bool_]:
    """Walls one by one at random cells, leaving out those that would cut free cells off."""
    walls = np.zeros((side, side), bool)
    for cell in rng.permutation(side * side).tolist():
        if walls.sum() == num_walls:
            break
        walls.flat[cell] = True
        walls.flat[cell] = connected(~walls)
    return walls


def connected(free: NDArray[np.bool_]) -> bool:
    """Whether all cells that are `free`, [height, width], hang together by their sides."""
    left = set(zip(*(axis.tolist() for axis in np.nonzero(free)), strict=True))
    reached = [left.pop()]
    while reached:
        row, column = reached.pop()
        near = left & {(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)}
        left -= near
        reached += near
    return not left


_DENSE = (Thing(1.0, 0.0, 0.05),) * 2 + (Thing(-1.0, 0.5, 0.1), Thing(-1.0, 0.0, 0.5))
_LONG = (Thing(1.0, 0.0, 0.01),) * 2 + (Thing(-1.0, 0.5, 1.0),) * 2
_LONGER = (Thing(1.0, 0.1, 0.01),) * 2 + (Thing(-1.0, 0.8, 1.0),) * 5
_SMALL = (Thing(1.0, 0.0, 0.05),) * 2 + (Thing(-1.0, 0.5, 0.1),) * 2
_SMALL_SPARSE = (Thing(1.0, 1.0, 1.0),) + (Thing(-1.0, 1.0, 1.0),) * 2

_CENTRAL_WALL = (
    *((row, 4) for row in range(7) if row not in (1, 5)),
    *((3, column) for column in (3, 5)),
)
_FOUR_ROOMS = (
    *((row, 5) for row in range(11) if row not in (0, 7)),
    *((4, column) for column in range(11) if column not in (2, 5, 8)),
)

GRIDS: dict[str, Grid] = {
    "tabular-dense": Grid(11, 11, _DENSE, 500, tabular=True),
    "tabular-sparse": Grid(13, 13, (Thing(1.0, 1.0, 0.0), Thing(-1.0, 1.0, 0.0)), 50, tabular=True),
    "tabular-long-horizon": Grid(11, 11, _LONG, 1000, tabular=True),
    "tabular-longer-horizon": Grid(7, 9, _LONGER, 2000, tabular=True, walls=_CENTRAL_WALL),
    "tabular-long-dense": Grid(
        11, 11, (Thing(1.0, 0.0, 0.005),) * 4, 2000, tabular=True, walls=_FOUR_ROOMS
    ),
    "random-dense": Grid(11, 11, _DENSE, 500, tabular=False),
    "random-long-horizon": Grid(11, 11, _LONG, 1000, tabular=False),
    "random-small": Grid(5, 7, _SMALL, 500, tabular=False, walls=((1, 2), (3, 4))),
    "random-small-sparse": Grid(5, 7, _SMALL_SPARSE, 50, tabular=False),
    "random-very-dense": Grid(11, 11, (Thing(1.0, 0.0, 1.0),), 2000, tabular=False),
}
"""The ten of LPG."""

SAMPLED = Grid(10, 10, (Thing(1.0, 1.0, 0.1),) * 5, 750, tabular=True, drawn=True)
"""Levels of GROOVE's distribution."""


class GridEnv(ArrayEnv):
    """The batch of grids of one kind, with K objects.

    Cells are counted row by row on the grid with a wall around it, [height + 2, width + 2].
    """

    horizon_truncates = True
    steps_per_second = 10.0
    draws_per_thing: int

    def __init__(
        self, grid: Grid, num_envs: int, spec: Spec, device: torch.device | str = "cpu"
    ) -> None:
        own = Spec(spec.obs_size, spec.action_size, discrete=True, horizon=grid.max_steps)
        super().__init__(num_envs, own, Discrete(spec.action_size), device, torch.int64)
        self._grid, self._num_things = grid, len(grid.things)
        stride, shape = grid.width + 2, (num_envs, self._num_things)
        num_cells = (grid.height + 2) * stride
        moves = [(a % MOVES // 3 - 1) * stride + a % MOVES % 3 - 1 for a in range(2 * MOVES)]
        self._offset = torch.tensor(moves, device=self.device)
        self._first_wall = torch.arange(num_envs, device=self.device) * num_cells
        inner = np.arange(num_cells).reshape(-1, stride)[1:-1, 1:-1].reshape(-1)
        self._cell_number = self._whole(num_cells)
        self._cell_number[inner] = torch.arange(len(inner), device=self.device)
        self._padding = self._whole(num_envs, spec.obs_size - 1 - grid.world("").num_indices) - 1
        self._limit = self._max_steps = self._whole(num_envs)
        self._num_actions = self._whole(num_envs, 1)
        self._grabs = self._flags(num_envs)
        self._walls = self._flags(num_envs, num_cells)
        self._reward = torch.zeros(shape, device=self.device)
        self._chance = torch.zeros(num_envs, 2 * self._num_things, device=self.device)
        self._agent = self._whole(num_envs)
        self._place = self._whole(*shape)
        self._present = self._flags(*shape)

    def _whole(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.int64, device=self.device)

    def _flags(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.bool, device=self.device)

    def _draw(self, *shape: int) -> Tensor:
        return torch.rand(*shape, device=self.device, generator=self.generator)

    def _level_arrays(self, level: Level) -> dict[str, NDArray[np.generic]]:
        """The rows of the task's arrays."""
        absent = (Thing(0.0, 0.0, 0.0),) * (self._num_things - len(level.things))
        things = level.things + absent
        chance = [thing.end for thing in things] + [thing.respawn for thing in things]
        return {
            "max_steps": np.asarray(level.max_steps),
            "walls": np.pad(level.walls, 1, constant_values=True).reshape(-1),
            "reward": np.array([thing.reward for thing in things], np.float32),
            "chance": np.array(chance, np.float32),
        }

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """Draws the levels of the tasks' seeds, each once."""
        num_actions = torch.from_numpy(task_array(tasks, "num_actions", 1))
        self._num_actions.copy_(num_actions)
        self._grabs.copy_(num_actions[:, 0] > MOVES)
        seeds = [int(seed) for seed in task_array(tasks, "level", 1)[:, 0]]
        levels = {seed: self._level_arrays(self._grid.level(seed)) for seed in dict.fromkeys(seeds)}
        arrays = self.arrays()
        for name in levels[seeds[0]]:
            rows = np.stack([levels[seed][name] for seed in seeds])
            arrays[name].copy_(torch.from_numpy(rows))

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Moves, collects, and brings back.

        One uniform number per environment and object decides whether its collection ends the
        episode, one more whether it comes back, and in worlds that show images one more where.
        Where an environment has 9 actions, action a + 9 is a.
        """
        k = self._num_things
        grabs = (action >= MOVES) & self._grabs
        target = self._agent + self._offset.take(action)
        stays = self._walls.take(target + self._first_wall) | grabs
        self._agent.copy_(torch.where(stays, self._agent, target))
        draws = self._draw(self.num_envs, self.draws_per_thing * k)
        happens = draws[:, : 2 * k] < self._chance
        back = happens[:, k:] & ~self._present
        collects = grabs == self._grabs
        hit = (self._place == target[:, None]) & self._present & collects[:, None]
        self._present ^= hit
        self._bring_back(back, draws[:, 2 * k :])
        reward, ended = (self._reward * hit).sum(1), (happens[:, :k] & hit).any(1)
        return self._observed(), reward, ended

    def _bring_back(self, back: Tensor, draws: Tensor) -> None:
        """Makes the objects of `back`, [num_envs, K] bool, present again."""
        raise NotImplementedError

    def _indices(self) -> Tensor:
        """The features that are 1, [num_envs, F]."""
        raise NotImplementedError

    def _observed(self) -> Tensor:
        return torch.cat([self._num_actions, self._indices(), self._padding], 1)

    def scene(self, index: int) -> Plan:
        """Walls, the objects that are there and the agent; x is the column, y the row."""
        height, width = self._grid.height, self._grid.width

        def coordinates(cells: Tensor) -> NDArray[np.float64]:
            row, column = np.divmod(cells.numpy(force=True), width + 2)
            return np.stack([column - 1.0, row - 1.0], -1)

        there = self._present[index]
        worth = self._reward[index][there].double().numpy(force=True)
        walls = self._walls[index].view(height + 2, width + 2)[1:-1, 1:-1].nonzero()
        return Plan(
            bounds=(-0.5, width - 0.5, height - 0.5, -0.5),
            agent=coordinates(self._agent[index]),
            marks=np.column_stack([coordinates(self._place[index][there]), worth]),
            blocks=walls.double().numpy(force=True)[:, ::-1],
            cell=1.0,
        )

    def episode_arrays(self) -> dict[str, Tensor]:
        """Cells of agents, [num_envs], and of objects, and which are there, [num_envs, K]."""
        return {"agent": self._agent, "place": self._place, "present": self._present}

    def arrays(self) -> dict[str, Tensor]:
        """The levels, and what episodes change."""
        return self.episode_arrays() | {
            "max_steps": self._max_steps,
            "num_actions": self._num_actions,
            "grabs": self._grabs,
            "walls": self._walls,
            "reward": self._reward,
            "chance": self._chance,
        }


class TabularGridEnv(GridEnv):
    """The batch of grids whose objects have fixed cells."""

    draws_per_thing = 2

    def __init__(
        self, grid: Grid, num_envs: int, spec: Spec, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(grid, num_envs, spec, device)
        num_cells = grid.height * grid.width
        self._exists = self._flags(num_envs, self._num_things)
        self._starts = torch.zeros(num_envs, num_cells, dtype=torch.int16, device=self.device)
        self._num_starts = self._whole(num_envs)
        self._bits = 1 << torch.arange(self._num_things, device=self.device)
        self._cell_number <<= self._num_things

    def _level_arrays(self, level: Level) -> dict[str, NDArray[np.generic]]:
        arrays, width = super()._level_arrays(level), self._grid.width
        free = ~level.walls.reshape(-1)
        cells = list(level.cells)
        free[cells] = False
        starts = np.flatnonzero(free)
        unused = np.zeros(self._num_things - len(cells), np.int64)
        return arrays | {
            "place": np.concatenate([inside_wall(np.array(cells), width), unused]),
            "exists": np.arange(self._num_things) < len(cells),
            "starts": np.resize(inside_wall(starts, width), free.shape).astype(np.int16),
            "num_starts": np.asarray(len(starts)),
        }

    def start(self) -> Tensor:
        """Draws the agents' cells, one uniform number each."""
        chosen = (self._draw(self.num_envs) * self._num_starts).long()
        self._agent.copy_(self._starts.gather(1, chosen[:, None])[:, 0])
        self._present.copy_(self._exists)
        return self._observed()

    def _bring_back(self, back: Tensor, draws: Tensor) -> None:
        self._present |= back

    def _indices(self) -> Tensor:
        present = (self._present * self._bits).sum(1)
        return (self._cell_number.take(self._agent) + present)[:, None]

    def arrays(self) -> dict[str, Tensor]:
        """Beside what all grids have, the agents' possible first cells; unused ones repeat."""
        return super().arrays() | {
            "exists": self._exists,
            "starts": self._starts,
            "num_starts": self._num_starts,
        }


class ImageGridEnv(GridEnv):
    """The batch of grids whose objects come to random cells."""

    draws_per_thing = 3

    def __init__(
        self, grid: Grid, num_envs: int, spec: Spec, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(grid, num_envs, spec, device)
        free = np.flatnonzero(~grid.level(0).walls.reshape(-1))
        k, self._num_free = self._num_things, len(free)
        self._free = torch.from_numpy(inside_wall(free, grid.width)).to(self.device)
        self._rank = self._whole(len(self._cell_number))
        self._rank[self._free] = torch.arange(self._num_free, device=self.device)
        self._num_left = self._num_free - torch.arange(k + 1, device=self.device)
        self._plane = torch.tensor(grid.planes, device=self.device) * grid.height * grid.width
        self._earlier = torch.ones(k, k, dtype=torch.bool, device=self.device).tril(-1)

    def start(self) -> Tensor:
        """Draws different free cells: the agent's, then each object's, one uniform number each."""
        # Number i is a rank among the cells that those before it left. What they took is put back
        # in, the latest first.
        rank = (self._draw(self.num_envs, 1 + self._num_things) * self._num_left).long()
        for i in reversed(range(self._num_things)):
            rank[:, i + 1 :] += rank[:, i + 1 :] >= rank[:, i : i + 1]
        cells = self._free.take(rank)
        self._agent.copy_(cells[:, 0])
        self._place.copy_(cells[:, 1:])
        self._present.fill_(True)
        return self._observed()

    def _bring_back(self, back: Tensor, draws: Tensor) -> None:
        # The agent may stand on an object, whose cell then counts once.
        others = self._present & (self._place != self._agent[:, None])
        rank = torch.where(others, self._rank.take(self._place), self._num_free)
        taken = torch.cat([rank, self._rank.take(self._agent)[:, None]], 1)
        # A draw passes a taken cell if it is at least that cell's rank among the cells not taken.
        first = taken - (taken[:, :, None] > taken[:, None, :]).sum(2)
        drawn = (draws * (self._num_free - 1 - others.sum(1, keepdim=True))).long()
        passed = (drawn[:, :, None] >= first[:, None, :]).sum(2)
        cell = self._free.take(drawn + passed)
        same = (cell[:, :, None] == cell[:, None, :]) & back[:, None, :] & self._earlier
        back = back & ~same.any(2)
        self._place.copy_(torch.where(back, cell, self._place))
        self._present |= back

    def _indices(self) -> Tensor:
        things = torch.where(self._present, self._cell_number.take(self._place) + self._plane, -1)
        return torch.cat([self._cell_number.take(self._agent)[:, None], things], 1)


def inside_wall(cells: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """Numbers of cells on the grid with a wall around it, from those on the grid itself."""
    return (cells // width + 1) * (width + 2) + cells % width + 1
