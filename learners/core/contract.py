"""What every learner offers to the loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from learners.core.errors import NonFiniteError
from learners.core.policy import Policy
from learners.core.population import Population
from learners.core.reduce import Reduce
from learners.core.trajectory import Metrics, Params, Trajectory

State = dict[str, Params]
"""All that a learner remembers between iterations, by group; what a checkpoint holds."""


@dataclass(frozen=True)
class Agents:
    """Who acts: the members' own parameters.

    Attributes:
        params: θ, each entry stacked on M.
        slots: inner-optimizer slots stacked on M; empty for plain gradient descent.
        num_updates: inner updates since the members began.
    """

    params: Params
    slots: Params
    num_updates: int


class Learner(Protocol):
    """One method. Its functions take and return values and keep nothing."""

    @property
    def policy(self) -> Policy | Population:
        """What acts on the members' parameters."""
        ...

    @property
    def num_inner_updates(self) -> int:
        """K, inner updates of a training window."""
        ...

    @property
    def num_evaluation_updates(self) -> int:
        """Inner updates of an evaluation."""
        ...

    @property
    def num_stream_steps(self) -> int | None:
        """T of one chunk of a stream; None where every chunk is whole episodes.

        Without inner updates the members are then replicas of one run: each has its own
        parameters throughout, and adapts online. With them they are lifetimes, which go on from
        window to window.
        """
        ...

    def init(self, seeds: Sequence[int]) -> State:
        """The state before training, with one seed for each member."""
        ...

    def begin(
        self, state: State, num_members: int, *, evaluating: bool = False
    ) -> tuple[list[bool], Agents]:
        """Which of the M members start anew, and who acts first."""
        ...

    def inner_update(
        self,
        state: State,
        agents: Agents,
        batch: Trajectory,
        reduce: Reduce,
        *,
        evaluating: bool = False,
    ) -> Agents:
        """The members after one update on their own data, without a graph.

        Args:
            state: the state that the window began with.
            agents: who acted.
            batch: their data, of all members.
            reduce: shares blocks of members out over learners.
            evaluating: whether nothing is learned from it.

        Raises:
            NonFiniteError: on every learner alike.
        """
        ...

    def meta_update(
        self, state: State, trace: Sequence[Agents], batches: Sequence[Trajectory], reduce: Reduce
    ) -> tuple[State, Metrics]:
        """The state after one outer update.

        Args:
            state: the state that the window began with.
            trace: who acted in each batch, the window's first agents first.
            batches: K support batches and the query batch.
            reduce: shares blocks of members out over learners, and adds what they find.

        Raises:
            NonFiniteError: on every learner alike.
        """
        ...


@runtime_checkable
class Describes(Protocol):
    """A learner that has something to show beside its metrics."""

    def describe(self, state: State, batch: Trajectory) -> dict[str, Tensor]:
        """What a person may want to look at, by name, of a state and its last query batch."""
        ...


def check_finite(trajectory: Trajectory) -> None:
    """Raises `NonFiniteError` for the first member with a non-finite entry."""
    for name in ("obs", "action", "reward", "log_prob", "last_obs", "episode_return"):
        tensor = getattr(trajectory, name)
        if not tensor.is_floating_point():
            continue
        finite = tensor.isfinite().flatten(1).all(1)
        if not bool(finite.all()):
            raise NonFiniteError(name, int((~finite).nonzero()[0, 0]))


def check_params(params: Params, group: str) -> None:
    """Raises `NonFiniteError` for the first entry that is not finite."""
    for name, tensor in params.items():
        if not bool(tensor.isfinite().all()):
            raise NonFiniteError(f"{group}/{name}")
