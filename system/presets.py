"""The presets: complete configurations by name, <learner>/<task>. Free of torch and ray."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from learners.config import (
    A2cConfig,
    FrodoConfig,
    LearnerConfig,
    LirpgConfig,
    MamlTrpoConfig,
    PpoConfig,
    TdLambdaConfig,
)
from system.config import RunConfig, RuntimeConfig, TaskOption
from system.lpg_presets import LPG_PRESETS
from system.rl2_presets import RL2_PRESETS

MAML = MamlTrpoConfig(inner_loss="likelihood_ratio", gae_lambda=0.9, max_kl=0.02)
"""Common to all presets.

Two settings differ from Finn et al. 2017. λ = 0.9 instead of 1: with the linear baseline the inner
gradients of two members with the same HalfCheetah task then agree twice as well. The likelihood
ratio as the inner loss keeps the part of the meta-gradient that credits the data before adaptation.
"""

LOCOMOTION: dict[str, TaskOption] = {"action_scale": 0.3}
"""A new policy's standard deviation is 0.3 of the torque range: with the whole range most actions
are clipped, and the inner gradient of 20 episodes is all noise."""


def navigation_2d() -> RunConfig:
    """Reach a goal in the plane, one goal a task (Finn et al. 2017, section 5.3)."""
    return RunConfig(
        preset="maml-trpo/navigation-2d",
        task="navigation-2d",
        learner=replace(MAML, max_kl=0.01),
        task_options={"action_scale": 0.1},
        iterations=100,
        num_members=20,
        members_per_slot=10,
        eval_every=25,
    )


def half_cheetah_dir() -> RunConfig:
    """Run forward or backward; 20 million environment steps."""
    return RunConfig(
        preset="maml-trpo/half-cheetah-dir",
        task="half-cheetah-dir",
        learner=MAML,
        task_options=LOCOMOTION,
        iterations=250,
        num_members=20,
        members_per_slot=2,
    )


def half_cheetah_dir_quick() -> RunConfig:
    """The same with smaller batches: about ten minutes on two CPU cores."""
    return replace(
        half_cheetah_dir(),
        preset="maml-trpo/half-cheetah-dir-quick",
        iterations=200,
        num_members=10,
        members_per_slot=1,
        eval_every=20,
    )


def half_cheetah_vel() -> RunConfig:
    """Run at a speed from U[0, 2] m/s; 10 million environment steps."""
    return RunConfig(
        preset="maml-trpo/half-cheetah-vel",
        task="half-cheetah-vel",
        learner=MAML,
        task_options=LOCOMOTION,
        iterations=125,
        num_members=20,
        members_per_slot=2,
    )


def ant(task: str, doc: str) -> Callable[[], RunConfig]:
    """A preset of an Ant family; 10 million environment steps.

    The gradient's signal is weak here: the smaller action scale keeps a new policy on its feet, and
    γ = 0.95 and 40 episodes (as in Finn et al. 2017) lower the variance.
    """

    def preset() -> RunConfig:
        return RunConfig(
            preset=f"maml-trpo/{task}",
            task=task,
            learner=replace(MAML, gamma=0.95),
            task_options={"action_scale": 0.15, "horizon": 100},
            iterations=132,
            num_members=10,
            num_envs=40,
            members_per_slot=1,
            eval_every=42,
            eval_tasks=20,
        )

    preset.__doc__ = doc
    return preset


def bandit() -> RunConfig:
    """Bernoulli bandit of 5 arms: 100 pulls to adapt, then 100 that count (Duan et al. 2016)."""
    return RunConfig(
        preset="maml-trpo/bandit",
        task="bandit",
        learner=replace(
            MAML, inner_lr=0.5, hidden=(32, 32), learn_inner_lr=True, gamma=0.0, max_kl=0.01
        ),
        iterations=200,
        num_envs=1,
        members_per_slot=20,
        eval_tasks=1000,
        eval_every=50,
    )


def tabular_mdp() -> RunConfig:
    """Random MDPs of 10 states and 5 actions, 10 steps (Duan et al. 2016)."""
    return RunConfig(
        preset="maml-trpo/tabular-mdp",
        task="tabular-mdp",
        learner=replace(MAML, inner_lr=0.5, learn_inner_lr=True, gae_lambda=1.0, max_kl=0.01),
        iterations=300,
        members_per_slot=20,
        eval_tasks=200,
        eval_every=50,
    )


# --- Actor-critic baselines and learned intrinsic rewards ---

MUJOCO_STEPS = 1_000_000
"""Environment steps of each replica on MuJoCo (Zheng, Oh and Singh 2018)."""

ROLLOUT = 2048
"""Steps between two updates of the PPO forms."""

DELAYED = ("hopper", "half-cheetah", "walker2d", "ant", "humanoid")
"""Robots with a task delayed-<robot>."""


def on_mujoco(learner: LearnerConfig, preset: str, task: str) -> RunConfig:
    """Five replicas with one environment each, 1 million steps apiece."""
    return RunConfig(
        preset=preset,
        task=task,
        learner=learner,
        iterations=-(-MUJOCO_STEPS // ROLLOUT),
        num_members=5,
        num_envs=1,
        members_per_slot=3,
        eval_every=0,
        eval_tasks=50,
    )


PPO = PpoConfig(normalize_obs=True, normalize_reward=True)

LIRPG = LirpgConfig(normalize_obs=True, normalize_reward=True)

BONUS = 0.01
"""Reward that the constant-bonus baseline adds to every step, in normalized units."""


def delayed_presets(robot: str) -> dict[str, Callable[[], RunConfig]]:
    """The methods that are compared on delayed rewards, and the same PPO without delay."""
    task = f"delayed-{robot}"
    variants: dict[str, tuple[LearnerConfig, str, str]] = {
        f"ppo/{robot}": (PPO, robot, "PPO, every reward at its own step."),
        f"ppo/{task}": (PPO, task, "PPO, rewards paid out every 20 steps."),
        f"ppo/{task}-bonus": (
            replace(PPO, reward_bonus=BONUS),
            task,
            "The same with a constant bonus on every step.",
        ),
        f"lirpg/{task}": (
            LIRPG,
            task,
            "LIRPG: learned intrinsic reward, and 0.01 of the delayed one.",
        ),
        f"lirpg/{task}-intrinsic": (
            replace(LIRPG, extrinsic_coef=0.0),
            task,
            "LIRPG: the policy learns from the intrinsic reward alone.",
        ),
    }

    def preset(name: str) -> Callable[[], RunConfig]:
        learner, on, doc = variants[name]

        def make() -> RunConfig:
            return on_mujoco(learner, name, on)

        make.__doc__ = doc
        return make

    return {name: preset(name) for name in variants}


def a2c_cartpole() -> RunConfig:
    """A2C on CartPole-v1: 5 replicas of 8 environments."""
    return RunConfig(
        preset="a2c/cartpole",
        task="gym:CartPole-v1",
        learner=A2cConfig(num_steps=16, lr=2e-3, max_grad_norm=0.5),
        iterations=1600,
        num_members=5,
        num_envs=8,
        members_per_slot=3,
        eval_every=0,
        eval_tasks=50,
        log_every=10,
    )


def a2c_half_cheetah() -> RunConfig:
    """A2C on HalfCheetah-v5: 5 replicas of 16 environments, 1 million steps each."""
    return RunConfig(
        preset="a2c/half-cheetah",
        task="half-cheetah",
        learner=A2cConfig(
            num_steps=16, lr=7e-4, entropy_coef=0.0, normalize_obs=True, normalize_reward=True
        ),
        iterations=-(-MUJOCO_STEPS // (16 * 16)),
        num_members=5,
        num_envs=16,
        members_per_slot=1,
        eval_every=0,
        eval_tasks=50,
        log_every=20,
    )


def ppo_cartpole() -> RunConfig:
    """PPO on CartPole-v1: 5 replicas of 8 environments."""
    return RunConfig(
        preset="ppo/cartpole",
        task="gym:CartPole-v1",
        learner=PpoConfig(num_steps=128, num_minibatches=4, num_epochs=4, lr=1e-3),
        iterations=100,
        num_members=5,
        num_envs=8,
        members_per_slot=3,
        eval_every=0,
        eval_tasks=50,
    )


ATARI_UPDATES = 625_000
"""Updates of 16 environments × 5 steps over which the step size falls to 0: 50 million steps."""


def on_atari(learner: LearnerConfig, preset: str) -> RunConfig:
    """One replica with 16 environments: 100,000 agent steps, of which many more can follow."""
    return RunConfig(
        preset=preset,
        task="atari-breakout",
        learner=learner,
        iterations=1250,
        num_members=1,
        num_envs=16,
        members_per_slot=1,
        envs_per_slot=8,
        eval_every=0,
        eval_tasks=8,
        log_every=10,
    )


def a2c_breakout() -> RunConfig:
    """A2C on Atari Breakout; --task atari-<game> takes another game."""
    return on_atari(A2cConfig(lr_decay_updates=ATARI_UPDATES), "a2c/atari-breakout")


def lirpg_breakout() -> RunConfig:
    """LIRPG on Atari Breakout, in its A2C form; --task atari-<game> takes another game."""
    learner = LirpgConfig(
        form="a2c",
        num_steps=5,
        lr=7e-4,
        meta_lr=7e-4,
        lr_decay_updates=ATARI_UPDATES,
        extrinsic_coef=1.0,
        intrinsic_coef=0.01,
        extrinsic_value_coef=0.1,
        entropy_coef=0.01,
        num_epochs=1,
        num_minibatches=1,
    )
    return on_atari(learner, "lirpg/atari-breakout")


# --- Discovered targets, and what they are compared with ---

CATCH_ENVS = 64
CATCH_STEPS = 800_000
"""Environment steps of each replica."""

CATCH = FrodoConfig(
    num_steps=3,
    hidden=(128, 128),
    activation="relu",
    lr=5e-4,
    inner_optimizer="adam",
    entropy_coef=0.03,
    value_gain=0.01,
    meta_lr=3e-3,
    consistency_coef=0.0,
    outer_entropy_coef=0.03,
)
CATCH_A2C = A2cConfig(
    num_steps=3,
    hidden=(128, 128),
    activation="relu",
    lr=5e-4,
    optimizer="adam",
    entropy_coef=0.03,
    value_gain=0.01,
)


def catch_presets() -> dict[str, Callable[[], RunConfig]]:
    """FRODO on trajectories of three steps, and actor-critics that see as far, less or more."""
    variants: dict[str, tuple[A2cConfig | FrodoConfig, str]] = {
        "frodo/catch": (CATCH, "FRODO from scratch, trajectories of 3 steps."),
        "frodo/catch-residual": (
            replace(CATCH, residual=True),
            "The same, starting from V-trace's target.",
        ),
        "a2c/catch": (CATCH_A2C, "A2C that bootstraps, trajectories of 3 steps."),
        "a2c/catch-full": (
            replace(CATCH_A2C, num_steps=15),
            "A2C with a full horizon: three episodes at a time.",
        ),
        "a2c/catch-lookahead": (
            replace(CATCH_A2C, num_steps=15, bootstrap=False, lookahead=3),
            "A2C whose returns are the next 3 rewards.",
        ),
        "a2c/catch-no-bootstrap": (
            replace(CATCH_A2C, bootstrap=False),
            "A2C on trajectories of 3 steps, after which nothing is expected.",
        ),
    }

    def preset(name: str) -> Callable[[], RunConfig]:
        learner, doc = variants[name]

        def make() -> RunConfig:
            steps = learner.num_steps * CATCH_ENVS
            return online(learner, name, "catch", CATCH_ENVS, -(-CATCH_STEPS // steps))

        make.__doc__ = doc
        return make

    return {name: preset(name) for name in variants}


def online(
    learner: LearnerConfig, preset: str, task: str, num_envs: int, iterations: int, members: int = 5
) -> RunConfig:
    """Replicas on a toy domain, in one process: chunks are too short to be sent around."""
    return RunConfig(
        preset=preset,
        task=task,
        learner=learner,
        iterations=iterations,
        num_members=members,
        num_envs=num_envs,
        members_per_slot=members,
        eval_every=0,
        eval_tasks=members * 100,
        log_every=50,
        picture_every=5000,
        stagger=task == "catch",
        runtime=RuntimeConfig(backend="serial", learner_threads=1),
    )


WALK_ENVS = 16

OFF_POLICY = FrodoConfig(
    num_inner_updates=1,
    num_steps=4,
    hidden=(),
    value_gain=0.0,
    gamma=1.0,
    lr=0.5,
    inner_optimizer="sgd",
    max_grad_norm=10.0,
    max_rho=10.0,
    meta_lr=1e-3,
    consistency_coef=0.0,
    critic_lr=0.02,
)
"""From scratch: V-trace's target would bring its own correction with it.

The bound of the ratios is above what they come to. With one of 1 V-trace evaluates a policy between
the two (Espeholt et al. 2018, section 4.1), and the outer loss would ask for the values of that."""

FLIP = replace(
    OFF_POLICY,
    num_steps=2,
    num_outcome_batches=8,
    meta_lr=3e-3,
    residual=True,
    residual_gain=True,
    outer_critic=False,
)
"""Short chunks, since values are wrong until the first update after a flip; an outcome of 16 steps,
most of which end an episode: what it bootstraps from has not flipped yet, and a critic of its own
would learn of it too late."""


def walk_presets() -> dict[str, Callable[[], RunConfig]]:
    """Values of a random walk, discovered target against fixed TD(λ)."""
    variants: dict[str, tuple[LearnerConfig, int, str]] = {
        "frodo/random-walk-flip": (
            FLIP,
            40_000,
            "FRODO predicts a random walk whose reward changes its sign every 960 steps.",
        ),
        "td-lambda/random-walk-flip": (
            TdLambdaConfig(gamma=1.0, lr=0.5, trace_decay=0.3),
            2_500,
            "TD(λ) on the same walk, the best of a grid.",
        ),
        "frodo/random-walk-off-policy": (
            OFF_POLICY,
            15_000,
            "FRODO predicts the value of another policy than the one that walks.",
        ),
        "frodo/random-walk-off-policy-blind": (
            replace(OFF_POLICY, sees_policies=False),
            15_000,
            "The same without both policies' probabilities among the target's inputs.",
        ),
        "td-lambda/random-walk-off-policy": (
            TdLambdaConfig(gamma=1.0, lr=0.02),
            2_500,
            "TD(λ) with importance ratios.",
        ),
    }

    def preset(name: str) -> Callable[[], RunConfig]:
        learner, iterations, doc = variants[name]
        task = name.split("/")[1].removesuffix("-blind")

        def make() -> RunConfig:
            return online(learner, name, task, WALK_ENVS, iterations, members=10)

        make.__doc__ = doc
        return make

    return {name: preset(name) for name in variants}


def frodo_breakout() -> RunConfig:
    """FRODO on Atari Breakout, asynchronous; --task atari-<game> takes another game."""
    learner = FrodoConfig(
        num_steps=20,
        lr=6e-4,
        entropy_coef=0.01,
        meta_lr=3e-4,
        target_width=256,
        residual=True,
    )
    return replace(
        on_atari(learner, "frodo/atari-breakout"), iterations=313, envs_per_slot=4, max_lag=4
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "maml-trpo/navigation-2d": navigation_2d,
    "maml-trpo/half-cheetah-dir": half_cheetah_dir,
    "maml-trpo/half-cheetah-dir-quick": half_cheetah_dir_quick,
    "maml-trpo/half-cheetah-vel": half_cheetah_vel,
    "maml-trpo/ant-dir": ant("ant-dir", "Ant: run forward or backward."),
    "maml-trpo/ant-vel": ant("ant-vel", "Ant: run at a speed from U[0, 3] m/s."),
    "maml-trpo/ant-goal": ant("ant-goal", "Ant: reach a point of the square of ±3 m."),
    "maml-trpo/bandit": bandit,
    "maml-trpo/tabular-mdp": tabular_mdp,
    "a2c/cartpole": a2c_cartpole,
    "a2c/half-cheetah": a2c_half_cheetah,
    "a2c/atari-breakout": a2c_breakout,
    "ppo/cartpole": ppo_cartpole,
    **{name: make for robot in DELAYED for name, make in delayed_presets(robot).items()},
    "lirpg/atari-breakout": lirpg_breakout,
    **catch_presets(),
    **walk_presets(),
    "frodo/atari-breakout": frodo_breakout,
    **LPG_PRESETS,
    **RL2_PRESETS,
}
