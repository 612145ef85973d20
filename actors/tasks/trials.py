"""Trials: several episodes of one task in a row, as one long episode.

In a trial a policy with memory finds out what its task is, and makes use of it (Duan et al. 2016,
RL², section 2.2): each observation also tells the action before it, what that paid, and whether it
ended an episode.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from actors.family import Task, TaskFamily
from actors.tasks.checks import check_whole, mask_at_reset, matching_shape
from learners.core.trajectory import Spec


@dataclass(frozen=True)
class Trials:
    """A family whose episodes are trials: `episodes` episodes of another family, in one task.

    The observation is [observation of the family, previous action, previous reward, previous end],
    of length O + A + 2; the action is one-hot where it is discrete. At a trial's first step there
    is no previous action, 0, nor reward, 0, and the end is 1 as after an episode (the author's
    environments). After the last step of an episode the observation of the family is the first of
    the next one, and the rest tells of that last step.

    Attributes:
        family: whose episodes they are.
        episodes: n, episodes of a trial.
    """

    family: TaskFamily
    episodes: int = 2

    def __post_init__(self) -> None:
        check_whole(self, "episodes", 1)
        spec = self.family.spec
        options = [field.name for field in fields(self.family)]  # type: ignore[arg-type]
        for refused, reason in (
            (spec.image is not None, "its observations are pixels, and trials add numbers to them"),
            (spec.worlds, "its lifetimes differ in kind, and trials need one kind of observation"),
            (spec.target_policy is not None, "it asks for a value, and trials are for control"),
            (spec.reward_delay > 1, "its rewards are delayed, and trials show each at its step"),
            ("episodes" in options, "its own option episodes would be hidden by that of trials"),
        ):
            if refused:
                raise ValueError(f"there are no trials of {self.family}: {reason}")

    @property
    def spec(self) -> Spec:
        """Sizes of the longer observation and of the family's action; at most n·H steps."""
        inner = self.family.spec
        return replace(
            inner,
            obs_size=inner.obs_size + inner.action_size + 2,
            horizon=self.episodes * inner.horizon,
            num_episodes=self.episodes,
        )

    @property
    def finite_tasks(self) -> list[Task] | None:
        """Those of the family."""
        return self.family.finite_tasks

    def sample(self, rng: np.random.Generator, num_tasks: int) -> list[Task]:
        """Tasks of the family."""
        return self.family.sample(rng, num_tasks)

    def make(self, num_envs: int) -> TrialsEnv:
        """A batch of environments, whose state can be saved if that of the family's can."""
        env = self.family.make(num_envs)
        return SavedTrialsEnv(self, env) if hasattr(env, "state") else TrialsEnv(self, env)


class TrialsEnv(VectorEnv[np.ndarray, Any, np.ndarray]):
    """Trials in a batch of another family's environments.

    A trial that is over stays so, `terminated` with reward 0, and keeps its last observation. The
    time limit of an episode ends it like anything else, and never a trial.
    """

    metadata = {"autoreset_mode": AutoresetMode.DISABLED}  # noqa: RUF012 (Gymnasium's own field)

    def __init__(self, family: Trials, env: VectorEnv) -> None:
        self.env = env
        self.num_envs = env.num_envs
        self.episodes = family.episodes
        inner, size = family.family.spec, family.spec.obs_size
        self.single_observation_space = Box(-np.inf, np.inf, (size,), np.float32)
        self.single_action_space = env.single_action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = env.action_space
        self._one_hot = np.eye(inner.action_size, dtype=np.float32) if inner.discrete else None
        self._num_ended = np.full(self.num_envs, self.episodes, np.int64)
        self._obs = np.zeros((self.num_envs, size), np.float32)
        self._inner_obs = self._obs[:, : inner.obs_size]
        self._action = self._obs[:, inner.obs_size : -2]
        self._reward, self._end = self._obs[:, -2], self._obs[:, -1]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts trials; seed and options are those of the family.

        Returns:
            Observation [num_envs, O + A + 2] float32, and an empty dict.

        Raises:
            ValueError: the family's environments refuse tasks or mask.
        """
        inner_obs, _ = self.env.reset(seed=seed, options=options)
        mask = mask_at_reset(options, self.num_envs, with_tasks=True)
        begun = np.ones(self.num_envs, bool) if mask is None else mask
        self._num_ended[begun] = 0
        self._obs[begun] = 0.0
        np.copyto(self._inner_obs, np.asarray(inner_obs), where=begun[:, None])
        self._end[begun] = 1.0
        return self._obs.copy(), {}

    def step(
        self, actions: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One step: observation, reward, terminated, truncated (always False), info.

        The info has `episode_over`, and `raw_reward` where the family's has.

        Args:
            actions: [num_envs, A] float32 or [num_envs] int64, an array or a CPU tensor.
        """
        running = self._num_ended < self.episodes
        stepped = self.env.step(actions)
        inner_obs, reward, terminated, truncated = map(np.asarray, stepped[:4])
        episode_over = (terminated | truncated) & running
        self._num_ended += episode_over
        over = self._num_ended >= self.episodes
        again = episode_over & ~over
        if np.count_nonzero(again):
            inner_obs = np.asarray(self.env.reset(options={"reset_mask": again})[0])
        kept = self._obs[~running]
        self._inner_obs[:] = inner_obs
        action = np.asarray(actions)
        self._action[:] = action if self._one_hot is None else self._one_hot.take(action, 0)
        self._reward[:] = reward
        self._end[:] = episode_over
        self._obs[~running] = kept
        info = {"episode_over": episode_over}
        if "raw_reward" in stepped[4]:
            info["raw_reward"] = masked(stepped[4]["raw_reward"], running)
        truncated = np.zeros(self.num_envs, bool)
        return self._obs.copy(), masked(reward, running), over, truncated, info

    def close_extras(self, **kwargs: Any) -> None:
        """Closes the family's environments."""
        self.env.close()


def masked(values: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Float32 `values` where `kept`, else 0, which NaN is no exception to; a new array."""
    return np.where(kept, values, np.float32(0.0))


INNER = "family."
"""Before the names of the family's arrays in a saved state."""


class SavedTrialsEnv(TrialsEnv):
    """Trials in environments whose state can be saved."""

    def state(self) -> dict[str, np.ndarray]:
        """Everything that the next steps depend on, that of the family's environments included."""
        inner: dict[str, np.ndarray] = self.env.state()  # type: ignore[attr-defined]
        saved: dict[str, np.ndarray] = {INNER + name: array for name, array in inner.items()}
        return saved | {"num_ended": self._num_ended.copy(), "obs": self._obs.copy()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Goes on bit for bit where `state` was taken, be it by another object.

        Raises:
            ValueError: `state` belongs to another kind or number of environments.
        """
        num_ended = matching_shape(state, "num_ended", self._num_ended.shape)
        obs = matching_shape(state, "obs", self._obs.shape)
        self.env.restore(  # type: ignore[attr-defined]
            {n.removeprefix(INNER): array for n, array in state.items() if n.startswith(INNER)}
        )
        self._num_ended[:] = num_ended
        self._obs[:] = obs
