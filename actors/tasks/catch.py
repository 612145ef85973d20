"""Catch: a ball falls over a board, and a paddle has to be under it.

The game of bsuite (Osband et al. 2020), on the board of 6 x 11 of Xu et al. 2020 (FRODO,
arXiv 2007.08433).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from gymnasium.spaces import Discrete
from torch import Tensor

from actors.family import OneTask, Task
from actors.scenes import Frame
from actors.tasks.array_env import ArrayEnv
from actors.tasks.checks import check_whole
from learners.core.trajectory import Spec

CELL_PIXELS = 20
"""Side of a cell of the board in a picture."""


@dataclass(frozen=True)
class Catch(OneTask):
    """Be under the ball when it lands: the last reward is 1 if the paddle is, −1 if not; others 0.

    The paddle starts in the centre of the bottom row, the ball in a column of the top row, each
    as likely. Actions 0, 1, 2 move the paddle by −1, 0, 1 columns, walls stop it, and the ball
    falls by one row per step. An episode is the rows − 1 steps until the ball has landed. The
    observation is the board in row-major order: 1 where the ball and the paddle are, else 0.

    A ball can be caught from everywhere if columns ≤ 2·rows − 1.

    Attributes:
        rows: of the board.
        columns: of the board; odd, so that there is a centre.
    """

    rows: int = 6
    columns: int = 11

    def __post_init__(self) -> None:
        check_whole(self, "rows", 2)
        check_whole(self, "columns", 3)
        if self.columns % 2 == 0:
            raise ValueError(
                f"Catch: columns must be odd, so that there is a centre, not {self.columns}"
            )

    @property
    def spec(self) -> Spec:
        """A flat board; left, stay, right."""
        return Spec(self.rows * self.columns, 3, discrete=True, horizon=self.rows - 1)

    def make(self, num_envs: int) -> CatchEnv:
        """A batch of environments on the CPU."""
        return CatchEnv(self, num_envs)


class CatchEnv(ArrayEnv):
    """The batch of boards. The ball's row is the number of steps of the episode."""

    steps_per_second = 3.0

    def __init__(self, family: Catch, num_envs: int, device: torch.device | str = "cpu") -> None:
        super().__init__(num_envs, family.spec, Discrete(3), device)
        self._rows, self._columns = family.rows, family.columns
        self._ball = torch.zeros(num_envs, dtype=torch.int64, device=self.device)
        self._paddle = torch.zeros(num_envs, dtype=torch.int64, device=self.device)
        self._env = torch.arange(num_envs, device=self.device)

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """There is nothing to take."""

    def start(self) -> Tensor:
        """Draws the ball's column."""
        self._paddle.fill_(self._columns // 2)
        torch.randint(self._columns, (self.num_envs,), generator=self.generator, out=self._ball)
        return self._board(torch.zeros_like(self._ball))

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor, None]:
        """Moves paddle and ball; the horizon ends the episode in which the ball has landed."""
        self._paddle.add_(action - 1).clamp_(0, self._columns - 1)
        row = self._steps + ~self._ended
        landed = row == self._rows - 1
        reward = torch.where(self._paddle == self._ball, 1.0, -1.0).masked_fill(~landed, 0.0)
        return self._board(row), reward, None

    def scene(self, index: int) -> Frame:
        """The board: the ball red, the paddle blue, and green where both are."""
        row, ball, paddle = (
            int(self._steps[index]),
            int(self._ball[index]),
            int(self._paddle[index]),
        )
        board = np.full((self._rows, self._columns, 3), 235, np.uint8)
        board[-1, paddle] = (40, 90, 200)
        board[row, ball] = (
            (40, 160, 70) if (row, ball) == (self._rows - 1, paddle) else (210, 50, 50)
        )
        return board.repeat(CELL_PIXELS, 0).repeat(CELL_PIXELS, 1)

    def arrays(self) -> dict[str, Tensor]:
        """Columns of ball and paddle, [num_envs]."""
        return {"ball": self._ball, "paddle": self._paddle}

    def _board(self, ball_row: Tensor) -> Tensor:
        """The observation with the ball in that row, [num_envs] → [num_envs, O]."""
        board = torch.zeros(self.num_envs, self._rows, self._columns, device=self.device)
        board[self._env, ball_row, self._ball] = 1.0
        board[self._env, -1, self._paddle] = 1.0
        return board.flatten(1)
