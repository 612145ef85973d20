"""Atari 2600 games through ale-py, an optional extra: `pip install 'metaloop[atari]'`."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from gymnasium.wrappers import AtariPreprocessing

from actors.family import OneTask
from actors.scenes import Frame
from actors.tasks import closest
from actors.tasks.checks import (
    check_flag,
    check_whole,
    mask_at_reset,
    matching_shape,
    tasks_at_reset,
)
from actors.tasks.random_state import generator_bytes, generator_from_bytes
from learners.core.trajectory import Spec

try:
    import ale_py
    import cv2  # noqa: F401 (AtariPreprocessing shrinks frames with it)
    from ale_py import roms
except ImportError as error:
    raise ValueError(
        f"Atari games need ale-py and opencv-python-headless ({error}): "
        "pip install 'metaloop[atari]'"
    ) from error

IMAGE = (4, 84, 84)
"""The last four frames, oldest first, grey: what a policy sees."""

NOOP = 0

_NOT_PLAYABLE = {"combat", "joust", "maze_craze", "warlords", "backgammon", "video_checkers"}
"""ROMs for two players only, on which ALE ends the process, and games without NOOP."""


@functools.cache
def games() -> list[str]:
    """The games' names in lower case with dashes, in alphabetical order."""
    return sorted(
        rom.replace("_", "-") for rom in roms.get_all_rom_ids() if rom not in _NOT_PLAYABLE
    )


@dataclass(frozen=True)
class AtariFamily(OneTask):
    """One task: an Atari game, `atari-<game>`, preprocessed as in OpenAI baselines.

    A step repeats its action for 4 frames. Gymnasium's AtariPreprocessing takes the maximum over
    the last two, in grey, 84 × 84; four of these are stacked, and a reset fills all four with its
    own. Only the minimal actions are offered and no action is sticky (Mnih et al. 2015, Methods).

    Attributes:
        game: such as "space-invaders".
        horizon: H, steps after which a game is `truncated`; 27,000 are 30 minutes.
        episodic_life: a lost life is `terminated`, and the reset after it goes on with the game.
        clip_reward: rewards are their sign; `raw_reward` is not.
        fire: in games that have FIRE a reset presses it, and the action after it, as some of them
            stand still until then. Without `episodic_life` a lost life is no reset.
        noop_max: a game starts after 1 to so many frames of NOOP; 0 starts it at once.
    """

    game: str = "breakout"
    horizon: int = 27_000
    episodic_life: bool = True
    clip_reward: bool = True
    fire: bool = True
    noop_max: int = 30

    def __post_init__(self) -> None:
        if self.game not in games():
            raise ValueError(
                f"there is no Atari game {self.game!r}; closest: {closest(self.game, games())}"
            )
        check_whole(self, "horizon", 1)
        check_whole(self, "noop_max", 0)
        for name in ("episodic_life", "clip_reward", "fire"):
            check_flag(self, name)

    def make_single(self) -> AtariPreprocessing:
        """One game: frames of 84 × 84 bytes.

        ALE's own limit of frames stays off, so that the horizon alone truncates.
        """
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # else it prints a banner
        env = ale_py.AtariEnv(
            game=self.game.replace("-", "_"),
            obs_type="grayscale",
            frameskip=1,
            repeat_action_probability=0.0,
            full_action_space=False,
        )
        return AtariPreprocessing(env, noop_max=self.noop_max)

    @functools.cached_property
    def spec(self) -> Spec:
        """Sizes of a stack of frames and of the minimal action set, from a game that is closed."""
        env = self.make_single()
        try:
            num_actions = len(env.unwrapped.get_action_meanings())  # type: ignore[attr-defined]
        finally:
            env.close()
        return Spec(int(np.prod(IMAGE)), num_actions, True, self.horizon, image=IMAGE)

    def make(self, num_envs: int) -> AtariBatch:
        """A batch of games, one after the other in this process."""
        return AtariBatch(self, num_envs)


class AtariBatch(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """Games one after the other, each with its own random stream.

    An environment that has ended keeps its last observation, with reward 0, until the next reset.
    Rewards that fall while a reset presses buttons are in the next step's `raw_reward` alone.
    """

    steps_per_second = 15.0

    metadata = {"autoreset_mode": AutoresetMode.DISABLED}  # noqa: RUF012 (Gymnasium's own field)

    def __init__(self, family: AtariFamily, num_envs: int) -> None:
        self.family = family
        self.num_envs = num_envs
        self.envs = [family.make_single() for _ in range(num_envs)]
        self._ales: list[Any] = [env.ale for env in self.envs]
        meanings = self.envs[0].unwrapped.get_action_meanings()  # type: ignore[attr-defined]
        # OpenAI baselines, FireResetEnv: FIRE is action 1 wherever there is one.
        self._opening = (1, 2) if family.fire and "FIRE" in meanings else ()
        self.single_observation_space = Box(0, 255, (int(np.prod(IMAGE)),), np.uint8)
        self.single_action_space = self.envs[0].action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._frames = np.zeros((num_envs, *IMAGE), np.uint8)
        self._lives = np.zeros(num_envs, np.int64)
        self._steps = np.zeros(num_envs, np.int64)
        self._unreported = np.zeros(num_envs, np.float32)
        self._terminated = np.ones(num_envs, bool)
        self._truncated = np.zeros(num_envs, bool)
        self._game_over = np.ones(num_envs, bool)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts new games, or new episodes in some environments.

        Args:
            seed: of every draw from now on, an independent stream per environment; without it the
                streams go on.
            options: {"tasks": [{}, ...]}, one per environment, or {"reset_mask": [num_envs] bool}.
                An environment of the mask that has lost a life goes on with its game (OpenAI
                baselines, EpisodicLifeEnv); any other starts a new one.

        Raises:
            ValueError: tasks or mask do not fit.
        """
        tasks_at_reset(options, self.num_envs)
        mask = mask_at_reset(options, self.num_envs)
        seeds: Sequence[int | None] = [None] * self.num_envs
        if seed is not None:
            seeds = np.random.SeedSequence(seed).generate_state(self.num_envs).tolist()
        started = np.arange(self.num_envs) if mask is None else np.flatnonzero(mask)
        for index in started.tolist():
            if mask is not None and self._terminated[index] and not self._game_over[index]:
                self._begin(index, None, (NOOP, *self._opening))
            else:
                self._begin(index, self._new_game(index, seeds[index]), self._opening)
        return self._obs(), {}

    def _new_game(self, index: int, seed: int | None = None) -> np.ndarray:
        """The first frame of a new game."""
        frame: np.ndarray
        frame, _ = self.envs[index].reset(seed=seed)
        self._steps[index] = 0
        self._unreported[index] = 0.0
        return frame

    def _begin(self, index: int, frame: np.ndarray | None, presses: Sequence[int]) -> None:
        """Begins an episode: presses buttons, then fills the stack with the frame of the last."""
        for action in presses:
            frame, paid, over, _, _ = self.envs[index].step(action)
            self._unreported[index] += float(paid)
            if over:
                frame = self._new_game(index)
        assert frame is not None
        self._frames[index] = frame
        self._lives[index] = self._ales[index].lives()
        self._terminated[index] = self._truncated[index] = self._game_over[index] = False

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One step of four frames: observation, reward, terminated, truncated, info.

        Args:
            actions: [num_envs] integers, an array or a CPU tensor.
        """
        chosen = np.asarray(actions).tolist()
        reward = np.zeros(self.num_envs, np.float32)
        raw_reward = np.zeros(self.num_envs, np.float32)
        for index in np.flatnonzero(~(self._terminated | self._truncated)).tolist():
            reward[index] = self._step_one(index, chosen[index])
            raw_reward[index] = reward[index] + self._unreported[index]
            self._unreported[index] = 0.0
        if self.family.clip_reward:
            reward = np.sign(reward)
        info = {"raw_reward": raw_reward, "game_over": self._game_over.copy()}
        return self._obs(), reward, self._terminated.copy(), self._truncated.copy(), info

    def _step_one(self, index: int, action: int) -> float:
        """Steps one environment and returns its points."""
        frame, paid, over, _, _ = self.envs[index].step(action)
        stack = self._frames[index]
        stack[:-1] = stack[1:]
        stack[-1] = frame
        self._steps[index] += 1
        lives = self._ales[index].lives()
        # Some games show no lives for a few frames before they are over: no episode of its own.
        lost_life = 0 < lives < self._lives[index]
        self._lives[index] = lives
        terminated = over or (self.family.episodic_life and lost_life)
        at_horizon = self._steps[index] >= self.family.horizon
        self._terminated[index] = terminated
        self._truncated[index] = at_horizon and not terminated
        self._game_over[index] = over or at_horizon
        return float(paid)

    def _obs(self) -> np.ndarray:
        return self._frames.reshape(self.num_envs, -1).copy()

    def scene(self, index: int) -> Frame:
        """The screen in colour."""
        screen: Frame = self._ales[index].getScreenRGB()
        return screen

    def _arrays(self) -> dict[str, np.ndarray]:
        return {
            "frames": self._frames,
            "lives": self._lives,
            "steps": self._steps,
            "unreported": self._unreported,
            "terminated": self._terminated,
            "truncated": self._truncated,
            "game_over": self._game_over,
        }

    def state(self) -> dict[str, np.ndarray]:
        """Everything that the next steps depend on: emulators, frames, counters, random state.

        The emulators' bytes are filled up with zeros to the longest; `emulator_size` has lengths.
        """
        blobs = [ale.cloneState(include_rng=True).serialize() for ale in self._ales]
        emulator = np.zeros((self.num_envs, max(map(len, blobs))), np.uint8)
        for row, blob in zip(emulator, blobs, strict=True):
            row[: len(blob)] = np.frombuffer(blob, np.uint8)
        return {
            **{name: array.copy() for name, array in self._arrays().items()},
            "game": np.frombuffer(self.family.game.encode(), np.uint8).copy(),
            "emulator": emulator,
            "emulator_size": np.array([len(blob) for blob in blobs], np.int64),
            # A game that ends within a step's four frames shows some of the step before.
            "screens": np.stack([np.stack(env.obs_buffer) for env in self.envs]),
            "rng": np.stack([generator_bytes(env.unwrapped.np_random) for env in self.envs]),
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Goes on bit for bit where `state` was taken, be it by another object.

        Raises:
            ValueError: `state` belongs to another game or another number of environments.
        """
        fitting = self._fitting(state)
        for name, array in self._arrays().items():
            array[:] = fitting[name]
        for index, env in enumerate(self.envs):
            blob = fitting["emulator"][index, : fitting["emulator_size"][index]].tobytes()
            self._ales[index].restoreState(ale_py.ALEState(blob))
            for screen, saved in zip(env.obs_buffer, fitting["screens"][index], strict=True):
                screen[:] = saved
            env.unwrapped.np_random = generator_from_bytes(fitting["rng"][index])

    def _fitting(self, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The arrays of `state`, after their check."""
        own = self.state()
        shapes = {name: array.shape for name, array in own.items()}
        if "emulator" in state:  # as long as the emulators' bytes were then
            shapes["emulator"] = (self.num_envs, *state["emulator"].shape[1:])
        fitting = {name: matching_shape(state, name, shapes[name]) for name in own}
        if not np.array_equal(fitting["game"], own["game"]):
            raise ValueError(
                "the saved environment state was made by another environment: "
                f"the game {fitting['game'].tobytes().decode()!r}, not {self.family.game!r}"
            )
        return fitting

    def close_extras(self, **kwargs: Any) -> None:
        """Closes the games."""
        for env in self.envs:
            env.close()
