"""Films in TensorBoard while a run trains."""

from __future__ import annotations

import io
from collections.abc import Callable

from system import episodes, frames
from system.backend import LearnerDied
from system.loop import Loop
from system.telemetry import Telemetry

NUM_TASKS = 2
"""Tasks, or replicas, of a film."""


class Videos:
    """Shows every so many iterations what is learned so far, until that fails once.

    Args:
        every: iterations; 0 for never.
    """

    def __init__(self, every: int) -> None:
        self.every = every

    def due(self, iteration: int) -> bool:
        """Whether `iteration` iterations end with a film."""
        return self.every > 0 and iteration % self.every == 0

    def show(
        self, loop: Loop, telemetry: Telemetry, env_steps: int, say: Callable[[str], None]
    ) -> None:
        """Adds a film at `env_steps`; where there can be none, `say` why, and never try again.

        Raises:
            LearnerDied: which has nothing to do with the film.
        """
        try:
            shown = episodes.watch(loop, NUM_TASKS)
            file = io.BytesIO()
            frames.write_gif(frames.film(shown), file)
            telemetry.show_film(env_steps, f"videos/{shown.what}", file.getvalue())
        except LearnerDied:
            raise
        except Exception as error:
            self.every = 0
            say(f"no more videos: {error}")
