"""A maze seen from inside: the visual navigation of RL² (Duan et al. 2016, section 3.3).

What the agent sees is a short vector in place of an image; rewards, sizes and horizons are the
paper's.
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
from actors.tasks.checks import check_number, check_whole, task_array
from learners.core.trajectory import Spec

SIZES: dict[str, tuple[int, int]] = {"small": (5, 250), "large": (9, 500)}
"""Cells per side, and horizon."""

STEPS = ((-1, 0), (0, 1), (1, 0), (0, -1))
"""Row and column of a step north, east, south and west: headings 0 to 3, in the order of a turn to
the right."""

TURN_LEFT, TURN_RIGHT, FORWARD = range(3)

NUM_SEEN = 4
"""Features of each cell in the line of sight."""


@dataclass(frozen=True)
class Maze:
    """Find a target in an unknown maze, then find it again on the way that is now known.

    Cells lie in a square with walls between some of them. Mazes are perfect: one way, and no
    other, leads from any cell to any other, and every such maze is equally likely. Start and
    target are two different cells, start and heading uniform. Maze, start, heading and target are
    the task; every episode of it begins in the same place.

    Actions 0, 1, 2: turn left, turn right, one cell forward; a wall stops that move. Every step
    costs `step_cost`, one into a wall `wall_cost` too, and that onto the target, which ends the
    episode, earns `target_reward`.

    The observation has four numbers, 0 or 1, for the agent's own cell and each of the view − 1
    cells straight ahead, nearest first: [no wall to the next cell ahead, no wall to its left, no
    wall to its right, the target is here], left and right as the agent faces. A cell behind a wall
    is not seen: all four are 0. Neither position nor heading is told.

    Task: {"walls": [2·N·(N − 1)], "start": [row, column, heading], "target": [row, column]} for N
    cells per side, row 0 in the north. "walls" is 1 where there is a wall, 0 where there is none:
    first those east of the cells of the first N − 1 columns, then those south of the cells of the
    first N − 1 rows, each in row-major order. The outer wall is not told.

    Attributes:
        size: "small", 5 × 5 cells and horizon 250, or "large", 9 × 9 and 500.
        horizon: H, steps of an episode; 0 for that of the size.
        view: cells in the line of sight, the agent's own included; it does not depend on the size,
            so that a policy for one size fits the other.
        target_reward: of the step onto the target.
        wall_cost: of a step into a wall, beside that of a step.
        step_cost: of every step.
    """

    size: str = "small"
    horizon: int = 0
    view: int = 5
    target_reward: float = 1.0
    wall_cost: float = 0.001
    step_cost: float = 0.04

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"Maze: size must be {' or '.join(SIZES)}, not {self.size!r}")
        check_whole(self, "horizon", 0)
        check_whole(self, "view", 1)
        for name in ("target_reward", "wall_cost", "step_cost"):
            check_number(self, name, 0.0)

    @property
    def side(self) -> int:
        """N, cells per side."""
        return SIZES[self.size][0]

    @property
    def spec(self) -> Spec:
        """Four numbers for each cell in the line of sight; left, right, forward."""
        horizon = self.horizon or SIZES[self.size][1]
        return Spec(NUM_SEEN * self.view, 3, discrete=True, horizon=horizon)

    @property
    def finite_tasks(self) -> list[Task] | None:
        """None: mazes are many."""
        return None

    def sample(self, rng: np.random.Generator, num_tasks: int) -> list[Task]:
        """Mazes, starts and targets, independent."""
        return [self._sample_one(rng) for _ in range(num_tasks)]

    def _sample_one(self, rng: np.random.Generator) -> Task:
        num_cells = self.side**2
        start = int(rng.integers(num_cells))
        target = (start + 1 + int(rng.integers(num_cells - 1))) % num_cells
        return {
            "walls": _random_walls(rng, self.side),
            "start": [*divmod(start, self.side), int(rng.integers(len(STEPS)))],
            "target": [*divmod(target, self.side)],
        }

    def show(
        self, task: Task, action: NDArray[np.int64], ended: NDArray[np.float32]
    ) -> dict[str, NDArray[np.float64]]:
        """One maze and the way through it, found again from the actions [T] of several episodes.

        Args:
            task: the maze.
            action: of every step, [T].
            ended: 1.0 where the step ended an episode, [T].

        Returns:
            "maze_lines" as `maze_lines` has them; "maze_path" [T + episodes, 3]: row, column and
            number of the episode, from each episode's start on; "maze_target" [2].
        """
        env = self.make(1)
        env.reset(options={"tasks": [task]})
        path, number = [[*env.positions[0].tolist(), 0]], 0
        for step, end in zip(torch.as_tensor(action), ended, strict=True):
            env.step(step.view(1))
            path.append([*env.positions[0].tolist(), number])
            if end > 0:
                number += 1
                env.reset()
                path.append([*env.positions[0].tolist(), number])
        if ended[-1] > 0:
            path.pop()
        return {
            "maze_lines": maze_lines(task),
            "maze_path": np.array(path, np.float64),
            "maze_target": np.array(task["target"], np.float64),
        }

    def make(self, num_envs: int) -> MazeEnv:
        """A batch of environments on the CPU."""
        return MazeEnv(self, num_envs)


def _random_walls(rng: np.random.Generator, side: int) -> list[float]:
    """The walls of a perfect maze, each as likely, as a task has them.

    A random walk opens the wall through which it first enters a cell (Aldous 1990, Broder 1989).
    """
    east = np.ones((side, side - 1), np.int64)
    south = np.ones((side - 1, side), np.int64)
    row = col = 0
    entered = {(row, col)}
    while len(entered) < side**2:
        for heading in rng.integers(len(STEPS), size=side**2).tolist():
            next_row, next_col = row + STEPS[heading][0], col + STEPS[heading][1]
            if not (0 <= next_row < side and 0 <= next_col < side):
                continue
            if (next_row, next_col) not in entered:
                entered.add((next_row, next_col))
                walls = south if next_col == col else east
                walls[min(row, next_row), min(col, next_col)] = 0
            row, col = next_row, next_col
    walls_of_task: list[float] = [*east.ravel().tolist(), *south.ravel().tolist()]
    return walls_of_task


def _split_walls(walls: NDArray[np.float64]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Walls [B, 2·N·(N − 1)] as those to the east, [B, N, N − 1], and south, [B, N − 1, N]."""
    side = (1 + math.isqrt(1 + 2 * walls.shape[1])) // 2
    east, south = np.split(walls != 0, 2, axis=1)
    return east.reshape(-1, side, side - 1), south.reshape(-1, side - 1, side)


def _openings(walls: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether one can leave a cell by a heading, [B, 2·N·(N − 1)] → [B, N², 4]."""
    east, south = _split_walls(walls)
    side = east.shape[1]
    opening = np.zeros((len(walls), side, side, len(STEPS)), bool)
    opening[:, 1:, :, 0] = opening[:, :-1, :, 2] = ~south
    opening[:, :, :-1, 1] = opening[:, :, 1:, 3] = ~east
    return opening.reshape(len(walls), side**2, len(STEPS))


def _strides(side: int) -> list[int]:
    """What each heading adds to the number of a cell, row · N + column."""
    return [row * side + col for row, col in STEPS]


def shortest_path(task: Task) -> int:
    """The fewest actions, turns included, from start to target.

    Raises:
        ValueError: there is no way.
    """
    opening = _openings(np.array([task["walls"]], np.float64))[0]
    side = math.isqrt(len(opening))
    strides = _strides(side)
    row, col, heading = np.asarray(task["start"], np.int64).tolist()
    target_row, target_col = np.asarray(task["target"], np.int64).tolist()
    frontier, seen, num_actions = {(row * side + col, heading)}, set[tuple[int, int]](), 0
    while all(cell != target_row * side + target_col for cell, _ in frontier):
        seen |= frontier
        turned = {(cell, (heading + turn) % 4) for cell, heading in frontier for turn in (-1, 1)}
        moved = {(cell + strides[way], way) for cell, way in frontier if opening[cell, way]}
        frontier = (turned | moved) - seen
        num_actions += 1
        if not frontier:
            raise ValueError("the target cannot be reached from the start")
    return num_actions


def maze_lines(task: Task) -> NDArray[np.float64]:
    """Every wall as a line, to be drawn: [number of walls, 2 ends, (row, column)].

    The centre of a cell is at its whole row and column, walls are half a cell from it, and the four
    outer ones come last.
    """
    east, south = (walls[0] for walls in _split_walls(np.array([task["walls"]], np.float64)))
    side = len(east)
    low, high = -0.5, side - 0.5
    corners = np.array([[low, low], [low, high], [high, high], [high, low]])
    along_rows = np.argwhere(east)[:, None] + [[-0.5, 0.5], [0.5, 0.5]]
    along_columns = np.argwhere(south)[:, None] + [[0.5, -0.5], [0.5, 0.5]]
    outer = np.stack([corners, np.roll(corners, -1, axis=0)], 1)
    return np.concatenate([along_rows, along_columns, outer])


class MazeEnv(ArrayEnv):
    """The batch of mazes. Cells are numbered row · N + column; a pose is a cell and a heading."""

    steps_per_second = 10.0

    def __init__(self, family: Maze, num_envs: int, device: torch.device | str = "cpu") -> None:
        super().__init__(num_envs, family.spec, Discrete(3), device)
        self._family, self._side = family, family.side
        self._opening = torch.zeros(
            num_envs, self._side**2 * len(STEPS), dtype=torch.bool, device=self.device
        )
        self._start = torch.zeros(num_envs, 2, dtype=torch.int64, device=self.device)
        self._pose = torch.zeros_like(self._start)
        self._target = torch.zeros(num_envs, dtype=torch.int64, device=self.device)
        self._strides = torch.tensor(_strides(self._side), device=self.device)
        self._depth = torch.arange(family.view, device=self.device)
        self._sides = torch.tensor([0, -1, 1], device=self.device)  # ahead, left, right

    @property
    def positions(self) -> Tensor:
        """Row and column of the agents' cells, [num_envs, 2] int64."""
        cell = self._pose[:, 0]
        return torch.stack([cell // self._side, cell % self._side], 1)

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """Takes mazes, starts and targets.

        Raises:
            ValueError: a task's numbers are not those of a maze of this size, or its target cannot
                be reached.
        """
        side = self._side
        walls = task_array(tasks, "walls", 2 * side * (side - 1))
        start, target = task_array(tasks, "start", 3), task_array(tasks, "target", 2)
        cells = f"whole numbers, row and column below {side}"
        _refuse(tasks, "walls", _outside(walls, [2]), "0 or 1 each")
        _refuse(tasks, "start", _outside(start, [side, side, 4]), f"{cells}, heading below 4")
        _refuse(tasks, "target", _outside(target, [side, side]), cells)
        start_cell, target_cell = (
            (place[:, 0] * side + place[:, 1]).astype(np.int64) for place in (start, target)
        )
        _refuse(tasks, "target", start_cell == target_cell, "another cell than the start")
        opening = _openings(walls)
        reached = _reachable(opening, start_cell)[np.arange(len(tasks)), target_cell]
        _refuse(tasks, "target", ~reached, "a cell that can be reached from the start")
        self._opening.copy_(torch.from_numpy(opening).flatten(1))
        self._start.copy_(torch.from_numpy(np.stack([start_cell, start[:, 2]], 1)))
        self._target.copy_(torch.from_numpy(target_cell))

    def start(self) -> Tensor:
        """All agents at their starts."""
        self._pose.copy_(self._start)
        return self._seen()

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Turns or moves; who has ended stays as it is."""
        cell, heading = self._pose.unbind(1)
        forward = (action == FORWARD) & ~self._ended
        is_open = self._opening.gather(1, (cell * len(STEPS) + heading)[:, None])[:, 0]
        turn = ((action == TURN_RIGHT).long() - (action == TURN_LEFT).long()) * ~self._ended
        cell = cell + self._strides[heading] * (forward & is_open)
        self._pose.copy_(torch.stack([cell, (heading + turn) % len(STEPS)], 1))
        reached = cell == self._target
        reward = (
            self._family.target_reward * reached
            - self._family.wall_cost * (forward & ~is_open)
            - self._family.step_cost
        )
        return self._seen(), reward, reached

    def scene(self, index: int) -> Plan:
        """The walls, the target and the agent's cell; x is the column, y the row."""
        side = self._side
        cells = np.stack(np.divmod(np.arange(side**2), side), 1)[:, ::-1]
        closed = ~self._opening[index].numpy(force=True).reshape(-1, len(STEPS))
        cell, heading = np.nonzero(closed)
        ahead = np.array(STEPS)[:, ::-1][heading]
        middle, half = cells[cell] + 0.5 * ahead, 0.5 * ahead[:, ::-1]
        target = [*divmod(int(self._target[index]), side)][::-1]
        return Plan(
            bounds=(-0.6, side - 0.4, side - 0.4, -0.6),
            agent=self.positions[index].double().numpy(force=True)[::-1].copy(),
            marks=np.array([[*target, 1.0]]),
            lines=np.stack([middle - half, middle + half], 1),
            cell=1.0,
        )

    def _seen(self) -> Tensor:
        """The observation, [num_envs, O]."""
        own_cell, heading = self._pose.unbind(1)
        cell = own_cell[:, None] + self._strides[heading][:, None] * self._depth
        # What would be numbered beyond the outer wall is out of sight, whatever cell is read.
        cell = cell.clamp(0, self._side**2 - 1)
        way = (heading[:, None] + self._sides) % len(STEPS)
        index = cell[:, :, None] * len(STEPS) + way[:, None]
        is_open = self._opening.gather(1, index.flatten(1)).view_as(index)
        in_sight = torch.ones_like(cell)
        in_sight[:, 1:] = is_open[:, :-1, 0].long().cumprod(1)
        is_target = cell == self._target[:, None]
        seen = torch.cat([is_open, is_target[:, :, None]], 2) * in_sight[:, :, None]
        return seen.flatten(1).float()

    def episode_arrays(self) -> dict[str, Tensor]:
        """Poses, [num_envs, 2]."""
        return {"pose": self._pose}

    def arrays(self) -> dict[str, Tensor]:
        """Openings [num_envs, 4·N²], poses at the start and now, cells of the targets."""
        task = {"opening": self._opening, "start": self._start, "target": self._target}
        return task | self.episode_arrays()


def _outside(values: NDArray[np.float64], limits: list[int]) -> NDArray[np.bool_]:
    """Rows in which not each is a whole number from 0 to below its limit, [B, n] → [B]."""
    outside: NDArray[np.bool_] = (values % 1 != 0) | (values < 0) | (values >= limits)
    return np.asarray(outside.any(1))


def _reachable(opening: NDArray[np.bool_], start: NDArray[np.int64]) -> NDArray[np.bool_]:
    """The cells to which a way leads from the start, [B, N², 4], [B] → [B, N²]."""
    cell = np.arange(opening.shape[1])
    # Numbers beyond the outer wall count on from the other end: that way is closed in any case.
    neighbour = (cell[:, None] + _strides(math.isqrt(len(cell)))) % len(cell)
    reached: NDArray[np.bool_] = cell == start[:, None]
    num_reached = 0
    while reached.sum() > num_reached:
        num_reached = int(reached.sum())
        reached |= (opening & reached[:, neighbour]).any(2)
    return reached


def _refuse(tasks: Sequence[Task], name: str, bad: NDArray[np.bool_], allowed: str) -> None:
    """Raises ValueError for the first task whose entry `name` is `bad`, [len(tasks)]."""
    if bad.any():
        index = int(bad.argmax())
        raise ValueError(f"task {index}: {name!r} must be {allowed}, not {tasks[index][name]!r}")
