"""What an exported policy is: everything that acting and adapting need beside the weights.

A pure function of a learner, so that a description which was altered differs from the one that the
learner in it has.
"""

from __future__ import annotations

from typing import Any

import torch

from learners.core import baseline, normalizer, returns
from learners.core.actor_critic import VALUE, part
from learners.core.contract import Learner, State
from learners.core.gru import GruPolicy
from learners.core.intrinsic import REWARD
from learners.core.networks import CONVOLUTIONS, num_layers
from learners.core.policy import MIN_LOG_STD, Policy
from learners.core.population import Agent, Population
from learners.core.replicas import Replicas
from learners.core.target_network import MAX_DENSITY
from learners.core.trajectory import Params, Spec
from learners.frodo import MAX_LOG_GAIN, Frodo
from learners.lirpg import Lirpg
from learners.maml import INNER_LR, LATER_SCALE, MamlTrpo
from learners.rl2 import Rl2

Networks = dict[str, Params]
"""Entries of each network that is exported, without axis M."""

ENTRY = "policy"
"""The network that acts."""


def networks_of(learner: Learner, acting: Params, state: State, member: int) -> Networks:
    """The networks of one member: the policy, and what was learned beside it.

    Args:
        learner: whose they are.
        acting: the policies of all members of the member's kind.
        state: the learner's.
        member: its number among these.
    """
    found = {ENTRY: acting}
    if isinstance(learner, Replicas):
        found["value"] = part(state["params"], VALUE)
    if isinstance(learner, Lirpg):
        found["reward"] = part(state["meta_params"], REWARD)
    if isinstance(learner, Frodo):
        found["target"] = state["meta_params"]
    own = {name: {n: p[member] for n, p in entries.items()} for name, entries in found.items()}
    if isinstance(learner, MamlTrpo):
        meta_params = state["meta_params"]
        own[ENTRY] |= {n: p for n, p in meta_params.items() if n.startswith(INNER_LR)}
    return own


def templates(learner: Learner) -> Networks:
    """Names, shapes and types of all entries; they hold no numbers and take no memory."""
    with torch.device("meta"):
        if isinstance(learner.policy, Population):
            return {ENTRY: learner.policy.policy_of(0).template()}
        generator = torch.Generator()
        found = {ENTRY: learner.policy.template()}
        if isinstance(learner, MamlTrpo):
            found[ENTRY] = learner.init([0])["meta_params"]
        if isinstance(learner, Replicas):
            found["value"] = part(learner.networks.init(generator), VALUE)
        if isinstance(learner, Lirpg):
            found["reward"] = part(learner.intrinsic.init(generator), REWARD)
        if isinstance(learner, Frodo):
            found["target"] = learner.network.init(generator)
    return found


def describe(learner: Learner, spec: Spec, networks: Networks, num_envs: int) -> dict[str, Any]:
    """Observation, action, networks and adaptation.

    Args:
        learner: with the worlds of one member alone, where there are worlds.
        spec: its environments.
        networks: those of a member, or their templates.
        num_envs: episodes of a task that an inner update learns from.
    """
    return {
        "observation": describe_observation(spec, networks[ENTRY]),
        "action": describe_action(spec),
        "networks": {
            name: {**kind_of(learner, name, own), "tensors": shapes(own)}
            for name, own in networks.items()
        },
        "adaptation": describe_adaptation(learner, spec, num_envs),
    }


def shapes(params: Params) -> dict[str, list[int]]:
    """Shapes by name."""
    return {name: list(p.shape) for name, p in sorted(params.items())}


def describe_observation(spec: Spec, policy: Params) -> dict[str, Any]:
    """What the policy sees, and how it is normalized."""
    dtype = "uint8" if spec.image is not None else "int64" if spec.worlds else "float32"
    normalized = normalizer.OBS_MEAN in policy
    return {
        "size": spec.obs_size,
        "dtype": dtype,
        "normalized": normalized,
        "clip": normalizer.CLIP if normalized else None,
    }


def describe_action(spec: Spec) -> dict[str, Any]:
    """What the policy's outputs mean for actions."""
    if spec.discrete:
        return {"distribution": "categorical", "size": spec.action_size}
    return {"distribution": "normal", "size": spec.action_size, "min_log_std": MIN_LOG_STD}


# --- Networks ---


def kind_of(learner: Learner, name: str, entries: Params) -> dict[str, Any]:
    """How a network computes what it does from its entries."""
    policy = learner.policy
    if isinstance(policy, Population):
        return indexed(policy.agents[0])
    if isinstance(policy, GruPolicy):
        return {"kind": "gru", "width": policy.width}
    if name == "target" and isinstance(learner, Frodo):
        return target(learner)
    if name == "value" and policy.spec.image is not None:
        return {"kind": "perceptron", "sees": "policy's hidden layer", **layers(policy, entries)}
    seen = "observation"
    if name == "reward" and not policy.spec.discrete:
        seen = "observation and action"
    network = {"kind": "perceptron", "sees": seen, **layers(policy, entries)}
    if policy.spec.image is not None:
        network |= {"kind": "convolutional", "image": policy.spec.image}
        network |= {"convolutions": CONVOLUTIONS}
    return network | ({"output": "tanh"} if name == "reward" else {})


def layers(policy: Policy, entries: Params) -> dict[str, Any]:
    """The layers of a perceptron."""
    weights = [entries[f"layer{number}.weight"] for number in range(num_layers(entries))]
    widths = [*(w.shape[0] for w in weights), weights[-1].shape[1]]
    activation = "relu" if policy.spec.image is not None else policy.activation
    return {"widths": widths, "activation": activation}


def indexed(agent: Agent) -> dict[str, Any]:
    """An agent that sees indices into binary features, or a table."""
    return {
        "kind": "table" if agent.world.tabular else "features",
        "num_indices": agent.world.num_indices,
        "num_features": agent.world.num_features,
        "grid": agent.world.grid if agent.network.convolves else None,
        "widths": agent.network.widths,
        "activation": "relu",
        "num_actions": agent.num_actions,
        "num_predictions": agent.num_predictions,
    }


def target(learner: Frodo) -> dict[str, Any]:
    """The target of FRODO."""
    c = learner.config
    return {
        "kind": "backward lstm",
        "width": learner.network.width,
        "sees": learner.network.inputs,
        "max_density": MAX_DENSITY,
        "gamma": c.gamma,
        "max_rho": c.max_rho,
        "residual": c.residual,
        "residual_gain": c.residual_gain,
        "max_log_gain": MAX_LOG_GAIN,
    }


# --- Adaptation ---


def describe_adaptation(learner: Learner, spec: Spec, num_envs: int) -> dict[str, Any] | None:
    """How a policy becomes that of a task; None where it is one of a single task."""
    if isinstance(learner, Rl2):
        inner_size = spec.obs_size - spec.action_size - 2
        return {
            "kind": "hidden state",
            "num_episodes": spec.num_episodes,
            "observation": {
                "observation": inner_size,
                "action": spec.action_size,
                "reward": 1,
                "end": 1,
            },
        }
    if not isinstance(learner, MamlTrpo):
        return None
    c = learner.config
    return {
        "kind": "policy gradient",
        "num_updates": learner.num_inner_updates,
        "num_evaluation_updates": learner.num_evaluation_updates,
        "num_episodes": num_envs,
        "inner_lr": c.inner_lr,
        "learned_inner_lr": c.learn_inner_lr,
        "later_lr_scale": LATER_SCALE,
        "loss": c.inner_loss,
        "gamma": c.gamma,
        "gae_lambda": c.gae_lambda,
        "baseline": {"kind": "linear", "clip": baseline.CLIP, "ridge": baseline.RIDGE},
        "standardised_advantages": True,
        "deviation_eps": returns.EPS,
    }
