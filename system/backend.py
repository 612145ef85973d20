"""Where actors and learner run: the interface that the serial and the Ray backend share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from actors.rollout import Receipt, Request

AGENTS = "agents"
"""Name under which the acting parameters are published."""


@dataclass(frozen=True)
class Arrival:
    """A collected chunk: what was asked for, handles to it and to its carry, and its receipt."""

    request: Request
    chunk: Any
    receipt: Receipt
    carry: Any


class Backend(Protocol):
    """Runs a `LearnerHost` and rollout workers."""

    device: str
    """Where the learner computes."""

    @property
    def actor_restarts(self) -> int:
        """Workers that died and came back, so far."""
        ...

    @property
    def pids(self) -> list[int]:
        """Processes of driver, learner and workers on this machine."""
        ...

    def learner(self, method: str, *args: Any) -> Any:
        """Calls a method of the learner's host; handles among `args` become chunks there."""
        ...

    def collect(
        self, requests: Sequence[Request], carries: Sequence[Any] | None = None
    ) -> list[Arrival]:
        """Collects all requests; the answers are in their order.

        Args:
            requests: one per slot.
            carries: for streams, the handle of each slot's carry, or None to start episodes.

        Raises:
            RolloutError: an environment or a worker failed for good.
        """
        ...

    def fetch(self, handles: Sequence[Any]) -> list[Any]:
        """What the handles stand for."""
        ...

    def close(self) -> None:
        """Ends what was started."""
        ...


class RolloutError(RuntimeError):
    """Collection failed; the message names tasks, worker, cause and what was done."""


class LearnerDied(RuntimeError):
    """The process of the learner, or of one of several, ended."""


def describe(request: Request, error: BaseException, where: str = "this process") -> str:
    """What a person needs to know of a failed request."""
    first = ", ".join(str(dict(task)) for task in request.tasks[:2])[:300]
    more = f" and {len(request.tasks) - 2} more" if len(request.tasks) > 2 else ""
    return (
        f"collecting slot {request.slot.id} (tasks {first}{more}; seeds {request.seeds}) failed "
        f"in {where}: {type(error).__name__}: {error}"
    )
