"""The presets of RL²: trials of bandits, tabular MDPs, mazes and robots. Free of torch and ray."""

from __future__ import annotations

from collections.abc import Callable

from learners.config import Rl2Config
from system.config import RunConfig, TaskOption


def rl2(
    preset: str,
    task: str,
    options: dict[str, TaskOption],
    learner: Rl2Config,
    doc: str,
    **settings: int,
) -> Callable[[], RunConfig]:
    """A preset: as many trials a batch as `num_members`, collected in slots of a fourth."""

    def make() -> RunConfig:
        return RunConfig(
            preset=f"rl2/{preset}",
            task=f"trials:{task}",
            task_options=options,
            learner=learner,
            num_envs=1,
            members_per_slot=settings["num_members"] // 4,
            eval_every=0,
            **settings,  # type: ignore[arg-type]
        )

    make.__doc__ = doc
    return make


def bandit(arms: int, pulls: int, **settings: int) -> tuple[str, Callable[[], RunConfig]]:
    """The preset of one bandit of the paper's table: a pull is an episode, a trial `pulls`."""
    name = "bandit" if (arms, pulls) == (5, 10) else f"bandit-{pulls}-{arms}"
    learner = Rl2Config(width=64, lr=1e-3, num_epochs=4, num_minibatches=8)
    options: dict[str, TaskOption] = {"arms": arms, "pulls": 1, "episodes": pulls}
    doc = f"Bernoulli bandits of {arms} arms, {pulls} pulls a trial (Duan et al. 2016, table 1)."
    return f"rl2/{name}", rl2(name, "bandit", options, learner, doc, **settings)


RL2_PRESETS: dict[str, Callable[[], RunConfig]] = dict(
    [
        bandit(5, 10, num_members=2000, iterations=300, eval_tasks=50_000),
    ]
)
