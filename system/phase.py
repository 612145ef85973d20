"""What one collection brought, as its receipts say, and what that means for people."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from actors.rollout import Receipt, Slot
from learners.core.trajectory import Metrics
from system.statistics import landmarks


@dataclass(frozen=True)
class Phase:
    """What one collection brought, as its receipts say."""

    returns: list[list[float]]  # per member, raw returns of the episodes that ended
    lengths: list[list[float]]  # per member, their lengths in steps
    num_steps: int
    busy_seconds: float
    seconds: float
    num_bytes: int
    receipts: Sequence[Receipt]

    @property
    def member_return(self) -> np.ndarray:
        """Mean return of each member, [M], NaN where no episode ended."""
        return means(self.returns)

    @property
    def episodes(self) -> np.ndarray:
        """Return of each episode of members that had as many, in their order, [M, n]."""
        return np.array(self.returns)


def summarise(
    slots: Sequence[Slot], receipts: Sequence[Receipt], num_members: int, seconds: float
) -> Phase:
    """Adds the receipts of one phase up."""
    returns: list[list[float]] = [[] for _ in range(num_members)]
    lengths: list[list[float]] = [[] for _ in range(num_members)]
    of_slot = {slot.id: slot for slot in slots}
    for receipt in receipts:
        first = of_slot[receipt.slot_id].members[0]
        for i, (got, took) in enumerate(zip(receipt.returns, receipt.lengths, strict=True)):
            returns[first + i] += got
            lengths[first + i] += took
    return Phase(
        returns=returns,
        lengths=lengths,
        num_steps=sum(receipt.num_steps for receipt in receipts),
        busy_seconds=sum(receipt.seconds for receipt in receipts),
        seconds=seconds,
        num_bytes=sum(receipt.num_bytes for receipt in receipts),
        receipts=receipts,
    )


def means(values: Sequence[Sequence[float]] | Sequence[deque[float]]) -> np.ndarray:
    """Mean of each entry, NaN where it is empty."""
    return np.array([float(np.mean(entry)) if entry else np.nan for entry in values])


def mean_of_finite(values: np.ndarray) -> float:
    """Mean of the values that are finite; NaN where none is."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")


def by_tenth(curve: np.ndarray) -> np.ndarray:
    """Mean over each tenth of the updates, [M, updates] → [M, 10]; NaN where there is none."""
    parts = np.array_split(curve, 10, 1)
    return np.array([[mean_of_finite(row) for row in part] for part in parts]).T


def trial_metrics(episodes: np.ndarray, best: np.ndarray | None) -> Metrics:
    """Mean return of a trial, of its episodes, and of some of them by their number.

    Args:
        episodes: returns, [M, n].
        best: what an episode returns to who knows the task, [M], or None; regret is measured to it.
    """
    mean = episodes.mean(0).tolist()
    shown = {f"adapt/ep_rew_mean_{k}": mean[k] for k in landmarks(len(mean))}
    if best is not None:
        regret = (best.mean() - episodes.mean(0)).tolist()
        shown |= {f"adapt/regret_{k}": regret[k] for k in landmarks(len(mean))}
        shown["rollout/trial_regret"] = sum(regret)
    return shown | {
        "adapt/gain": mean[-1] - mean[0],
        "rollout/ep_rew_mean": sum(mean) / len(mean),
        "rollout/trial_return": sum(mean),
    }
