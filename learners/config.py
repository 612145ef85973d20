"""Hyper-parameters of each learner. Free of torch, so that the command line starts at once."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Literal, get_args

from learners.core.errors import ConfigError

InnerLoss = Literal["log_prob", "likelihood_ratio", "dice"]
Activation = Literal["tanh", "relu"]
LirpgForm = Literal["ppo", "a2c"]
OptimizerName = Literal["sgd", "rmsprop", "adam"]
Outer = Literal["ppo", "trpo"]
Teacher = Literal["rule", "a2c", "reinforce", "none"]
TEACHERS, OUTERS = get_args(Teacher), get_args(Outer)
INNER_LOSSES, ACTIVATIONS = get_args(InnerLoss), get_args(Activation)
LIRPG_FORMS, OPTIMIZER_NAMES = get_args(LirpgForm), get_args(OptimizerName)


@dataclass(frozen=True)
class MamlTrpoConfig:
    """MAML with TRPO as the outer optimizer (Finn et al. 2017) and its variants."""

    inner_lr: float = 0.1
    """α, step size of an inner update; the starting value where it is learned."""
    num_inner_updates: int = 1
    """K, inner updates before the query batch."""
    inner_loss: InnerLoss = "log_prob"
    """Inner objective. All three have the same gradient; the last two keep the term of the second
    derivative that log_prob drops (Foerster et al. 2018, Rothfuss et al. 2019)."""
    first_order: bool = False
    """FOMAML: inner gradients are constants in the meta-gradient."""
    learn_inner_lr: bool = False
    """Meta-SGD (Li et al. 2017): one learned α per parameter."""
    exploration: float = 0.0
    """Weight of E-MAML's term (Stadie et al. 2018) that credits the data before adaptation."""
    gamma: float = 0.99
    """γ, discount per environment step."""
    gae_lambda: float = 1.0
    """λ of generalised advantage estimation."""
    max_kl: float = 0.01
    """δ, largest mean KL divergence of an outer step."""
    cg_steps: int = 10
    """Products of the conjugate gradient."""
    cg_damping: float = 1e-5
    """Added to the diagonal of the curvature."""
    line_search_ratio: float = 0.8
    """Shrinkage of each further try of the line search."""
    line_search_tries: int = 15
    """Largest number of tries."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the policy's hidden layers."""
    activation: Activation = "tanh"
    """Nonlinearity of the hidden layers."""
    init_std: float = 1.0
    """Standard deviation of the untrained Gaussian policy, in units of the action."""
    members_per_block: int = 5
    """Members differentiated together. Blocks run side by side on the learner's threads."""

    def __post_init__(self) -> None:
        """Refuses values that no run could use."""
        for name in ("num_inner_updates", "cg_steps", "line_search_tries", "members_per_block"):
            check_whole(name, getattr(self, name))
        for width in self.hidden:
            check_whole("hidden", width)
        for name in ("inner_lr", "max_kl", "init_std"):
            check_positive(name, getattr(self, name))
        for name in ("gamma", "gae_lambda", "line_search_ratio"):
            check_number(name, getattr(self, name), 0.0, 1.0)
        for name in ("cg_damping", "exploration"):
            check_number(name, getattr(self, name), 0.0, sys.float_info.max)
        for name, allowed in (("inner_loss", INNER_LOSSES), ("activation", ACTIVATIONS)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {allowed}, not {getattr(self, name)!r}")


@dataclass(frozen=True)
class ActorCriticSettings:
    """What the actor-critic methods share."""

    gamma: float = 0.99
    """γ, discount per environment step."""
    num_steps: int = 5
    """T, steps of each environment between two updates."""
    lr: float = 7e-4
    """Step size of policy and value."""
    lr_decay_updates: int = 0
    """Updates after which the step size has fallen linearly to 0; 0 keeps it constant."""
    value_coef: float = 0.5
    """Weight of the value loss."""
    entropy_coef: float = 0.0
    """Weight of the policy's entropy."""
    max_grad_norm: float = 0.5
    """Gradients are scaled down to this Euclidean norm."""
    normalize_obs: bool = False
    """Observations are shifted and scaled by their running mean and deviation, clipped to ±10."""
    normalize_reward: bool = False
    """Rewards are divided by the running deviation of the discounted return, clipped to ±10."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers of policy and value; pixels have a fixed network."""
    activation: Activation = "tanh"
    """Nonlinearity of the hidden layers."""
    init_std: float = 1.0
    """Standard deviation of the untrained Gaussian policy, in units of the action."""
    value_gain: float = 1.0
    """Size of the untrained value: scale of its last layer. An agent that bootstraps follows the
    differences of the first values, whatever they are; near 0 there are none."""

    def __post_init__(self) -> None:
        """Refuses values that no run could use."""
        check_whole("num_steps", self.num_steps)
        for width in self.hidden:
            check_whole("hidden", width)
        for name in ("lr", "max_grad_norm", "init_std"):
            check_positive(name, getattr(self, name))
        check_number("gamma", self.gamma, 0.0, 1.0)
        for name in ("value_coef", "entropy_coef", "value_gain"):
            check_number(name, getattr(self, name), 0.0, sys.float_info.max)
        if self.lr_decay_updates != 0:
            check_whole("lr_decay_updates", self.lr_decay_updates)
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"activation must be one of {ACTIVATIONS}, not {self.activation!r}")


@dataclass(frozen=True)
class A2cConfig(ActorCriticSettings):
    """Advantage actor-critic (Mnih et al. 2016) with V-trace (Espeholt et al. 2018)."""

    entropy_coef: float = 0.01
    max_rho: float = 1.0
    """Upper bound of V-trace's importance weight of a step."""
    optimizer: OptimizerName = "rmsprop"
    """What makes steps of gradients."""
    bootstrap: bool = True
    """Whether the value stands for the rewards after the chunk; without it they count as 0."""
    lookahead: int = 0
    """Rewards that a return adds up, without bootstrapping; 0 for all of the chunk."""

    def __post_init__(self) -> None:
        """Refuses values that no run could use."""
        super().__post_init__()
        check_positive("max_rho", self.max_rho)
        check_optimizer("optimizer", self.optimizer)
        if self.lookahead != 0:
            check_whole("lookahead", self.lookahead)
        if self.lookahead > self.num_steps:
            raise ConfigError(
                f"lookahead must lie in [0, num_steps = {self.num_steps}], not {self.lookahead}"
            )
        if self.lookahead != 0 and self.bootstrap:
            raise ConfigError("lookahead does not bootstrap: set bootstrap to False")


@dataclass(frozen=True)
class TdLambdaConfig(ActorCriticSettings):
    """Linear TD(λ): the value of a given policy (Sutton and Barto 2018, section 12.2)."""

    num_steps: int = 16
    lr: float = 0.1
    hidden: tuple[int, ...] = ()
    trace_decay: float = 0.9
    """λ, what is left of a trace after a step, beside γ."""

    def __post_init__(self) -> None:
        """Refuses values that no run could use."""
        super().__post_init__()
        check_number("trace_decay", self.trace_decay, 0.0, 1.0)
        if self.hidden or self.normalize_obs or self.normalize_reward:
            raise ConfigError(
                "td-lambda is linear in what it sees: hidden must be (), and normalize_obs and "
                "normalize_reward off"
            )


@dataclass(frozen=True)
class PpoConfig(ActorCriticSettings):
    """Proximal policy optimization (Schulman et al. 2017)."""

    num_steps: int = 2048
    lr: float = 3e-4
    gae_lambda: float = 0.95
    """λ of generalised advantage estimation."""
    num_epochs: int = 10
    """Passes over a rollout."""
    num_minibatches: int = 32
    """Minibatches of a pass."""
    clip_ratio: float = 0.2
    """Half-width of the interval around 1 in which the probability ratio has gradient."""
    reward_bonus: float = 0.0
    """Added to every step's reward: the constant bonus that learned rewards are compared with."""

    def __post_init__(self) -> None:
        """Refuses values that no run could use."""
        super().__post_init__()
        check_minibatches(self.num_epochs, self.num_minibatches)
        check_number("gae_lambda", self.gae_lambda, 0.0, 1.0)
        check_positive("clip_ratio", self.clip_ratio)
        check_number("reward_bonus", self.reward_bonus, -10.0, 10.0)


@dataclass(frozen=True)
class LirpgConfig(ActorCriticSettings):
    """Learned intrinsic rewards for policy gradient (Zheng, Oh and Singh 2018)."""

    form: LirpgForm = "ppo"
    """ppo: clipped ratios, standardised advantages, Adam; for MuJoCo. a2c: neither, RMSProp."""
    num_steps: int = 2048
    lr: float = 3e-4
    meta_lr: float = 1e-4
    """β, step size of the intrinsic reward and the extrinsic value."""
    extrinsic_coef: float = 0.01
    """c_ex, weight of the extrinsic reward in what the policy learns from."""
    intrinsic_coef: float = 1.0
    """c_in, weight of the intrinsic reward in what the policy learns from."""
    extrinsic_value_coef: float = 0.5
    """Weight of the extrinsic value's loss in the outer loss."""
    gae_lambda: float = 0.95
    """λ of generalised advantage estimation; 1 in the a2c form."""
    num_epochs: int = 10
    """Passes over a rollout."""
    num_minibatches: int = 32
    """Minibatches of a pass."""
    clip_ratio: float = 0.2
    """Half-width of PPO's interval; of no effect in the a2c form."""

    def __post_init__(self) -> None:
        """Refuses values that no run could use."""
        super().__post_init__()
        check_minibatches(self.num_epochs, self.num_minibatches)
        check_positive("meta_lr", self.meta_lr)
        check_positive("clip_ratio", self.clip_ratio)
        check_number("gae_lambda", self.gae_lambda, 0.0, 1.0)
        for name in ("extrinsic_coef", "intrinsic_coef", "extrinsic_value_coef"):
            check_number(name, getattr(self, name), 0.0, sys.float_info.max)
        if self.form not in LIRPG_FORMS:
            raise ConfigError(f"form must be one of {LIRPG_FORMS}, not {self.form!r}")


@dataclass(frozen=True)
class FrodoConfig(ActorCriticSettings):
    """A target that is discovered online by meta-gradients (Xu et al. 2020)."""

    num_inner_updates: int = 5
    """K, inner updates of a window."""
    num_outcome_batches: int = 1
    """Q, batches from the query batch on whose rewards the outer loss waits for."""
    inner_optimizer: OptimizerName = "rmsprop"
    """What makes inner steps of the update direction; its slots live as long as the agent."""
    meta_lr: float = 1e-3
    """Step size of the target network."""
    consistency_coef: float = 0.1
    """c, weight of the consistency of successive targets in the outer loss."""
    residual: bool = False
    """The network adds to V-trace's target instead of replacing it."""
    residual_gain: bool = False
    """Instead of adding to it, the network scales how far V-trace's target lies from V."""
    outer_critic: bool = True
    """The outer loss has a critic of its own, which never sees a learned target; without it the
    agent's value rates the targets that it was trained on, as in the paper."""
    critic_lr: float = 1e-3
    """Step size of the outer critic."""
    outer_value_coef: float = 0.5
    """Weight of the value's error in the outer loss, where a policy is learned."""
    outer_entropy_coef: float = 0.0
    """Weight of the policy's entropy in the outer loss."""
    max_rho: float = 1.0
    """Upper bound of V-trace's importance weight of a step."""
    target_width: int = 32
    """Width of the target network's layers."""
    sees_policies: bool = True
    """Whether the target network sees π(a|s) and μ(a|s)."""

    def __post_init__(self) -> None:
        """Refuses values that no run could use."""
        super().__post_init__()
        if self.residual_gain and not self.residual:
            raise ConfigError("residual_gain needs residual: there is nothing to scale without")
        for name in ("num_inner_updates", "num_outcome_batches", "target_width"):
            check_whole(name, getattr(self, name))
        for name in ("meta_lr", "critic_lr", "max_rho"):
            check_positive(name, getattr(self, name))
        for name in ("consistency_coef", "outer_value_coef", "outer_entropy_coef"):
            check_number(name, getattr(self, name), 0.0, sys.float_info.max)
        check_optimizer("inner_optimizer", self.inner_optimizer)


@dataclass(frozen=True)
class LpgConfig:
    """A learned update rule (Oh et al. 2020), meta-trained over a population of lifetimes."""

    num_inner_updates: int = 5
    """K, updates of an agent in a window, each on T steps."""
    num_steps: int = 20
    """T, steps of each environment between two updates."""
    meta_lr: float = 1e-4
    """β, step size of the rule."""
    meta_max_grad_norm: float = 1.0
    """Meta-gradients are scaled down to this Euclidean norm."""
    rule_width: int = 256
    """Width of the rule's LSTM."""
    num_predictions: int = 30
    """m, outcomes of the prediction y."""
    embedding_width: int = 16
    """Width of φ, which makes a number of a prediction."""
    hidden: tuple[int, ...] = (32,)
    """Widths of the agents' hidden layers, where their world is not tabular."""
    channels: int = 0
    """Channels of a convolution of 3 × 3 below these layers, on pixels; 0 for none."""
    gamma: float = 0.995
    """γ, discount per environment step; the rule sees it."""
    gae_lambda: float = 0.95
    """λ of generalised advantage estimation in the outer loss."""
    policy_entropy_coef: float = 0.01
    """β₀, weight of the policy's entropy in the outer loss."""
    y_entropy_coef: float = 0.001
    """β₁, weight of the prediction's entropy in the outer loss."""
    pi_hat_coef: float = 0.001
    """β₂, weight of mean π̂² in the outer loss."""
    y_hat_coef: float = 0.001
    """β₃, weight of mean ‖ŷ‖² in the outer loss."""
    tabular_lrs: tuple[float, ...] = (20.0, 40.0, 80.0)
    """Step sizes that agents on tables are given."""
    network_lrs: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 5e-3)
    """Step sizes that agents with networks are given."""
    alpha_ys: tuple[float, ...] = (0.1, 0.5, 1.0)
    """Weights of the prediction's update that agents are given."""
    tabular_updates: int = 2500
    """N, updates of a lifetime on tables."""
    network_updates: int = 25000
    """N, updates of a lifetime in networks."""
    evaluation_updates: int = 500
    """Updates of a lifetime of an evaluation."""
    max_grad_norm: float = 0.5
    """Agents' gradients are scaled down to this Euclidean norm."""
    critic_rate: float = 0.3
    """Part of the way to the mean return that a tabular critic moves a visited state."""
    critic_lr: float = 1e-3
    """Step size of critics with networks."""
    members_per_block: int = 8
    """Lifetimes differentiated together. Blocks run side by side on the learner's threads."""
    sees_lifetime: bool = False
    """Whether n/N and log N are inputs of the rule (Jackson et al. 2024)."""
    adam_per_lifetime: bool = False
    """Each lifetime's meta-gradient passes through an Adam of its own before the average, as in
    DiscoRL; members_per_block must be 1."""
    ema_advantage: bool = False
    """Advantages of the outer loss are normalised by moments over time and not over the batch, as
    in DiscoRL."""

    def __post_init__(self) -> None:
        """Refuses values that no run could use."""
        for name in (
            "num_inner_updates",
            "num_steps",
            "rule_width",
            "num_predictions",
            "embedding_width",
            "tabular_updates",
            "network_updates",
            "evaluation_updates",
            "members_per_block",
        ):
            check_whole(name, getattr(self, name))
        for width in self.hidden:
            check_whole("hidden", width)
        check_number("channels", self.channels, 0, sys.maxsize)
        for name in ("meta_lr", "meta_max_grad_norm", "max_grad_norm", "critic_lr"):
            check_positive(name, getattr(self, name))
        for name in ("gamma", "gae_lambda", "critic_rate"):
            check_number(name, getattr(self, name), 0.0, 1.0)
        for name in ("policy_entropy_coef", "y_entropy_coef", "pi_hat_coef", "y_hat_coef"):
            check_number(name, getattr(self, name), 0.0, sys.float_info.max)
        for name in ("tabular_lrs", "network_lrs", "alpha_ys"):
            if not getattr(self, name):
                raise ConfigError(f"{name} needs at least one value")
            for value in getattr(self, name):
                check_positive(name, value)
        if self.adam_per_lifetime and self.members_per_block != 1:
            raise ConfigError(
                "adam_per_lifetime needs every lifetime's own meta-gradient: set members_per_block "
                f"to 1, not {self.members_per_block}"
            )


@dataclass(frozen=True)
class LpgAgentConfig:
    """Agents that a rule of LPG teaches, or a hand-written rule in its place."""

    teacher: Teacher = "rule"
    """rule: a learned one, see `rule`. a2c: the advantage. reinforce: the rewards that follow.
    none: nobody, the policy stays as it begins, but for its entropy."""
    rule: str = ""
    """Folder that `metaloop export` wrote; of no effect with another teacher."""
    num_steps: int = 20
    """T, steps of each environment between two updates."""
    tabular_lr: float = 40.0
    """Step size of agents on tables."""
    network_lr: float = 1e-3
    """Step size of agents with networks."""
    alpha_y: float = 0.5
    """Weight of the prediction's update."""
    entropy_coef: float = 0.0
    """Weight of the policy's entropy."""
    lifetime_updates: int = 2500
    """N of a rule that sees lifetimes."""
    hidden: tuple[int, ...] = (32,)
    """Widths of the agents' hidden layers, where their world is not tabular."""
    channels: int = 0
    """Channels of a convolution of 3 × 3 below these layers, on pixels; 0 for none."""
    gamma: float = 0.995
    """γ, discount per environment step."""
    gae_lambda: float = 0.95
    """λ of generalised advantage estimation."""
    max_grad_norm: float = 0.5
    """Gradients are scaled down to this Euclidean norm."""
    critic_rate: float = 0.3
    """Part of the way to the mean return that a tabular critic moves a visited state."""
    critic_lr: float = 1e-3
    """Step size of critics with networks."""
    members_per_block: int = 8
    """Replicas taught together. Blocks run side by side on the learner's threads."""
    rule_width: int = 256
    """Width of the rule's LSTM; with the next three as the rule was made."""
    num_predictions: int = 30
    """m, outcomes of the prediction y."""
    embedding_width: int = 16
    """Width of φ."""
    sees_lifetime: bool = False
    """Whether n/N and log N are inputs of the rule."""

    def __post_init__(self) -> None:
        """Refuses values that no run could use."""
        for name in (
            "num_steps",
            "lifetime_updates",
            "members_per_block",
            "rule_width",
            "num_predictions",
            "embedding_width",
        ):
            check_whole(name, getattr(self, name))
        for width in self.hidden:
            check_whole("hidden", width)
        check_number("channels", self.channels, 0, sys.maxsize)
        for name in ("tabular_lr", "network_lr", "alpha_y", "max_grad_norm", "critic_lr"):
            check_positive(name, getattr(self, name))
        for name in ("gamma", "gae_lambda", "critic_rate"):
            check_number(name, getattr(self, name), 0.0, 1.0)
        check_number("entropy_coef", self.entropy_coef, 0.0, sys.float_info.max)
        if self.teacher not in TEACHERS:
            raise ConfigError(f"teacher must be one of {TEACHERS}, not {self.teacher!r}")


@dataclass(frozen=True)
class Rl2Config:
    """RL²: a recurrent policy that learns inside a trial (Duan et al. 2016)."""

    outer: Outer = "ppo"
    """How the policy learns: ppo, or trpo as in the paper. The value's epochs are the same."""
    gamma: float = 0.99
    """γ, discount per environment step, the ends of inner episodes notwithstanding."""
    gae_lambda: float = 0.3
    """λ of generalised advantage estimation."""
    num_epochs: int = 8
    """Passes over a batch of trials."""
    num_minibatches: int = 10
    """Minibatches of a pass, each of whole trials."""
    clip_ratio: float = 0.1
    """Half-width of the interval around 1 in which the probability ratio has gradient."""
    lr: float = 2e-4
    """Step size of policy and value."""
    lr_decay_updates: int = 0
    """Updates after which the step size has fallen linearly to 0; 0 keeps it constant."""
    weight_decay: float = 0.0
    """w, share of the parameters, times the step size, that every step takes away."""
    value_coef: float = 1.0
    """Weight of the value loss."""
    entropy_coef: float = 0.01
    """Weight of the policy's entropy."""
    standardise_advantages: bool = True
    """Whether a batch's advantages are given mean 0 and deviation 1."""
    max_grad_norm: float = 1.0
    """Gradients of each network are scaled down to this Euclidean norm."""
    width: int = 256
    """Units of the GRU of the policy, and of that of the value."""
    init_std: float = 1.0
    """Standard deviation of the untrained Gaussian policy, in units of the action."""
    max_kl: float = 0.01
    """δ of trpo, largest mean KL divergence of a step."""
    cg_steps: int = 10
    """Products of trpo's conjugate gradient."""
    cg_damping: float = 1e-3
    """Added to the diagonal of trpo's curvature."""
    line_search_ratio: float = 0.8
    """Shrinkage of each further try of trpo's line search."""
    line_search_tries: int = 15
    """Its largest number of tries."""

    def __post_init__(self) -> None:
        """Refuses values that no run could use."""
        check_minibatches(self.num_epochs, self.num_minibatches)
        for name in ("width", "cg_steps", "line_search_tries"):
            check_whole(name, getattr(self, name))
        if self.outer not in OUTERS:
            raise ConfigError(f"outer must be one of {OUTERS}, not {self.outer!r}")
        check_number("line_search_ratio", self.line_search_ratio, 0.0, 1.0)
        check_positive("max_kl", self.max_kl)
        check_number("cg_damping", self.cg_damping, 0.0, sys.float_info.max)
        for name in ("gamma", "gae_lambda"):
            check_number(name, getattr(self, name), 0.0, 1.0)
        for name in ("clip_ratio", "lr", "max_grad_norm", "init_std"):
            check_positive(name, getattr(self, name))
        for name in ("weight_decay", "value_coef", "entropy_coef"):
            check_number(name, getattr(self, name), 0.0, sys.float_info.max)
        if self.lr_decay_updates != 0:
            check_whole("lr_decay_updates", self.lr_decay_updates)


LearnerConfig = (
    MamlTrpoConfig
    | A2cConfig
    | PpoConfig
    | TdLambdaConfig
    | LirpgConfig
    | FrodoConfig
    | LpgConfig
    | LpgAgentConfig
    | Rl2Config
)

METHODS: dict[str, type[LearnerConfig]] = {
    "maml-trpo": MamlTrpoConfig,
    "a2c": A2cConfig,
    "ppo": PpoConfig,
    "td-lambda": TdLambdaConfig,
    "lirpg": LirpgConfig,
    "frodo": FrodoConfig,
    "lpg": LpgConfig,
    "lpg-agent": LpgAgentConfig,
    "rl2": Rl2Config,
}
"""Configurations by the name of their method."""


def method_of(config: LearnerConfig) -> str:
    """The name of a configuration's method."""
    return next(name for name, kind in METHODS.items() if type(config) is kind)


def check_optimizer(name: str, value: str) -> None:
    """Raises ConfigError unless `value` names an optimizer."""
    if value not in OPTIMIZER_NAMES:
        raise ConfigError(f"{name} must be one of {OPTIMIZER_NAMES}, not {value!r}")


def check_minibatches(num_epochs: int, num_minibatches: int) -> None:
    """Raises ConfigError unless both are whole numbers above 0."""
    check_whole("num_epochs", num_epochs)
    check_whole("num_minibatches", num_minibatches)


def check_whole(name: str, value: object) -> None:
    """Raises ConfigError unless `value` is a whole number above 0."""
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a whole number above 0, not {value}")


def check_positive(name: str, value: float) -> None:
    """Raises ConfigError unless 0 < value < ∞."""
    if not 0.0 < value < math.inf:
        wanted = "finite" if value > 0.0 else "above 0"
        raise ConfigError(f"{name} must be {wanted}, not {value}")


def check_number(name: str, value: float, low: float, high: float) -> None:
    """Raises ConfigError unless low ≤ value ≤ high."""
    if not low <= value <= high:
        raise ConfigError(f"{name} must lie in [{low:g}, {high:g}], not {value}")
