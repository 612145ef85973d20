"""The presets of RL²: trials of bandits, tabular MDPs, mazes and robots. Free of torch and ray."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from learners.config import Rl2Config
from system.config import RunConfig, TaskOption

SMALL = Rl2Config(width=64, lr=1e-3, num_epochs=4, num_minibatches=8)
"""Minutes on two cores."""

LARGE = replace(SMALL, width=128, num_minibatches=5, entropy_coef=0.04, max_grad_norm=0.5)
"""For longer trials; with less entropy the policy settles before it has found how to explore. The
paper's own size is `--width 256 --num-epochs 8 --num-members 2500`."""

LONG_BANDIT = replace(LARGE, entropy_decay_updates=800)
"""Entropy costs reward once exploring is learned: some half a pull of a hundred."""


def rl2(
    name: str,
    task: str,
    options: dict[str, TaskOption],
    learner: Rl2Config,
    doc: str,
    **settings: int,
) -> tuple[str, Callable[[], RunConfig]]:
    """A preset: `num_members` trials a batch, collected in slots of a fourth."""

    def make() -> RunConfig:
        return RunConfig(
            preset=f"rl2/{name}",
            task=f"trials:{task}",
            task_options=options,
            learner=learner,
            num_envs=1,
            members_per_slot=settings["num_members"] // 4,
            eval_every=0,
            **settings,  # type: ignore[arg-type]
        )

    make.__doc__ = doc
    return f"rl2/{name}", make


def bandit(pulls: int, arms: int) -> tuple[str, Callable[[], RunConfig]]:
    """A bandit of the paper's table: a pull is an episode."""
    name = "bandit" if (pulls, arms) == (10, 5) else f"bandit-{pulls}-{arms}"
    options: dict[str, TaskOption] = {"arms": arms, "pulls": 1, "episodes": pulls}
    doc = f"Bernoulli bandits of {arms} arms, {pulls} pulls a trial (Duan et al. 2016)."
    num_members, iterations, eval_tasks = {
        10: (2000, 400, 50_000),
        100: (500, 1000, 10_000),
        500: (200, 1000, 10_000),
    }[pulls]
    return rl2(
        name,
        "bandit",
        options,
        SMALL if pulls == 10 else LONG_BANDIT,
        doc,
        num_members=num_members,
        iterations=iterations,
        eval_tasks=eval_tasks,
    )


def tabular_mdp(episodes: int) -> tuple[str, Callable[[], RunConfig]]:
    """A random MDP of 10 states and 5 actions: an episode is 10 steps."""
    return rl2(
        "tabular-mdp" if episodes == 10 else f"tabular-mdp-{episodes}",
        "tabular-mdp",
        {"episodes": episodes},
        LARGE,
        f"Random tabular MDPs, {episodes} episodes a trial (Duan et al. 2016).",
        num_members=500 if episodes == 10 else 200,
        iterations=1000,
        eval_tasks=10_000,
    )


ROBOT = replace(
    LARGE, gae_lambda=0.95, clip_ratio=0.2, entropy_coef=0.0, init_std=0.6, num_epochs=8
)
"""The settings of others' RL² on robots (λ, clip)."""

MAZE = replace(LARGE, gae_lambda=0.99, num_minibatches=8)
"""λ as the paper has it for its mazes."""

RL2_PRESETS: dict[str, Callable[[], RunConfig]] = dict(
    [
        *(bandit(pulls, arms) for pulls in (10, 100, 500) for arms in (5, 10, 50)),
        *(tabular_mdp(episodes) for episodes in (10, 25, 50, 75, 100)),
        rl2(
            "navigation-2d",
            "navigation-2d",
            {"action_scale": 0.1, "episodes": 2},
            replace(ROBOT, width=64),
            "Find a goal in the plane in the first episode, go there in the second.",
            num_members=200,
            iterations=300,
            eval_tasks=200,
        ),
        *(
            rl2(
                robot,
                robot,
                {"action_scale": 0.3, "episodes": 2},
                ROBOT,
                f"HalfCheetah, {what}: two episodes a trial.",
                num_members=40,
                iterations=500,
                eval_tasks=40,
            )
            for robot, what in (
                ("half-cheetah-dir", "forward or backward"),
                ("half-cheetah-vel", "at a speed from U[0, 2] m/s"),
            )
        ),
        rl2(
            "maze",
            "maze",
            {"size": "small", "episodes": 2},
            MAZE,
            "Small mazes seen from within: the way to the target, twice (Duan et al. 2016).",
            num_members=160,
            iterations=600,
            eval_tasks=1000,
        ),
        rl2(
            "maze-large",
            "maze",
            {"size": "large", "episodes": 2},
            MAZE,
            "Large mazes seen from within, twice.",
            num_members=80,
            iterations=1000,
            eval_tasks=1000,
        ),
    ]
)
