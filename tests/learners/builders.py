"""Small random learners, states and windows of data, off every special value."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from learners.config import MamlTrpoConfig
from learners.core.contract import Agents, State
from learners.core.params import expand_members, flatten
from learners.core.trajectory import Params, Spec, Trajectory
from learners.maml import INNER_LR, Block, Linearised, MamlTrpo

SETTINGS = {"inner_lr": 0.3125, "hidden": (2,), "gamma": 0.9, "gae_lambda": 0.95}


def make_learner(discrete: bool = False, **settings) -> MamlTrpo:
    """Two observations, two action dimensions or three actions, two hidden units."""
    spec = Spec(obs_size=2, action_size=3 if discrete else 2, discrete=discrete, horizon=5)
    return MamlTrpo(MamlTrpoConfig(**SETTINGS | settings), spec)


def make_state(learner: MamlTrpo, seed: int = 0, dtype: torch.dtype = torch.float64) -> State:
    """No bias is zero, no standard deviation one, no two learned rates equal."""
    generator = torch.Generator().manual_seed(seed)
    learner.policy.init(generator)  # what is drawn below is then apart from the weights
    params = learner.init([seed])["meta_params"]
    moved = {}
    for name, p in params.items():
        noise = torch.randn(p.shape, generator=generator)
        moved[name] = p * (1.0 + 0.3 * noise.tanh()) if name.startswith(INNER_LR) else p + noise / 4
    return {"meta_params": {name: p.to(dtype) for name, p in moved.items()}}


def make_trajectory(
    learner: MamlTrpo, params: Params, num_members: int, seed: int, num_steps: int = 5
) -> Trajectory:
    """Episodes of unequal length in four environments; padding holds arbitrary numbers.

    Actions come from the policy of `params`, the same for all members; the recorded log
    probabilities are off by a tenth, so that ratios are not 1.
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    dtype = next(iter(params.values())).dtype
    spec, shape = learner.spec, (num_members, num_steps, 4)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    length = torch.randint(1, num_steps + 1, (num_members, 4), generator=generator)
    length[:, 0] = num_steps
    length[:, 1] = torch.arange(num_members) % num_steps + 1
    step = torch.arange(num_steps).view(1, -1, 1)
    valid = step < length.unsqueeze(1)
    last = step == length.unsqueeze(1) - 1
    obs = normal(*shape, spec.obs_size)
    dist = learner.policy.distribution(expand_members(params, num_members), obs.flatten(1, 2))
    noise = learner.policy.noise((num_members, num_steps * 4), generator).to(dtype)
    action = dist.sample(noise)
    log_prob = dist.log_prob(action).view(shape) + 0.1 * normal(*shape)
    action = action.view(*shape, *action.shape[2:])
    reward = normal(*shape) + obs[..., 0] + action.reshape(*shape, -1)[..., 0]
    total = (reward * valid).sum(1, keepdim=True).expand(shape)
    garbage = torch.rand(shape, generator=generator) < 0.5
    trajectory = Trajectory(
        obs=obs,
        action=action,
        reward=reward,
        terminated=last | (~valid & garbage),
        truncated=~valid & ~garbage,
        valid=valid.to(dtype),
        log_prob=log_prob,
        last_obs=normal(num_members, 4, spec.obs_size),
        episode_return=torch.where(last, total, normal(*shape) * ~valid),
        episode_length=(length.unsqueeze(1) * last).to(dtype),
        final_obs=torch.zeros(num_members, 0, 4, spec.obs_size, dtype=dtype),
        discounted_return=torch.zeros(num_members, 0, 4, dtype=dtype),
        true_value=torch.zeros(num_members, 0, 4, dtype=dtype),
    )
    return trajectory.map(Tensor.detach)


def make_window(
    learner: MamlTrpo, state: State, num_members: int = 3, seed: int = 0
) -> tuple[Agents, list[Trajectory]]:
    """The window's first agents, its K support batches and its query batch."""
    params, _ = learner.split(state["meta_params"])
    _, agents = learner.begin(state, num_members)
    batches = [
        make_trajectory(learner, params, num_members, seed + 10 * k)
        for k in range(learner.num_inner_updates + 1)
    ]
    return agents, batches


def pad(trajectory: Trajectory, num_steps: int) -> Trajectory:
    """The same episodes with `num_steps` more invalid steps of arbitrary numbers."""

    def longer(tensor: Tensor) -> Tensor:
        padding = tensor[:, -1:].repeat(1, num_steps, *[1] * (tensor.dim() - 2))
        return torch.cat([tensor, padding], 1)

    padded = replace(trajectory.map(longer), last_obs=trajectory.last_obs)
    padded.valid[:, -num_steps:] = 0.0
    return padded


def linearise(
    learner: MamlTrpo, meta_params: Params, blocks: list[Block]
) -> tuple[Tensor, list[Linearised]]:
    """The meta-gradient [P] and the graphs of all blocks; `meta_params` must record gradient."""
    graphs = [Linearised.at(learner, meta_params, block) for block in blocks]
    return sum(graph.gradient(meta_params) for graph in graphs), graphs


def dense_fisher(graphs: list[Linearised], meta_params: Params) -> Tensor:
    """Jᵀ F J column by column, [P, P]."""
    names = sorted(meta_params)
    columns = []
    for name in names:
        for index in range(meta_params[name].numel()):
            unit = {n: torch.zeros_like(p) for n, p in meta_params.items()}
            unit[name].view(-1)[index] = 1.0
            assert flatten(unit).sum() == 1.0
            columns.append(sum(graph.fisher_product(meta_params, unit) for graph in graphs))
    return torch.stack(columns, 1)
