"""Populations of small lifetimes, and data for them."""

import torch

from learners.config import LpgAgentConfig, LpgConfig
from learners.core.trajectory import Spec, Trajectory, World
from learners.lpg import Lpg
from learners.lpg_agent import LpgAgent

TABLE = World("table", num_indices=1, num_features=5, tabular=True)
DENSE = World("dense", num_indices=3, num_features=8, tabular=False)

SETTINGS = {
    "num_inner_updates": 3,
    "num_steps": 4,
    "rule_width": 3,
    "num_predictions": 4,
    "embedding_width": 2,
    "hidden": (3,),
    "gamma": 0.9,
    "gae_lambda": 0.8,
    "policy_entropy_coef": 0.1,
    "y_entropy_coef": 0.1,
    "pi_hat_coef": 0.1,
    "y_hat_coef": 0.1,
    "tabular_lrs": (0.5, 1.0),
    "network_lrs": (0.05, 0.1),
    "tabular_updates": 100,
    "network_updates": 100,
    "max_grad_norm": 100.0,
    "members_per_block": 2,
}
AGENT_SETTINGS = {
    name: SETTINGS[name]
    for name in (
        *("num_steps", "rule_width", "num_predictions", "embedding_width", "hidden"),
        *("gamma", "gae_lambda", "max_grad_norm", "members_per_block"),
    )
} | {"tabular_lr": 0.5, "network_lr": 0.05, "alpha_y": 0.7, "lifetime_updates": 100}
NUM_ACTIONS = 3


def spec_of(worlds):
    """Observations of up to three indices; without worlds, of six numbers."""
    size = 1 + max(world.num_indices for world in worlds) if worlds else 6
    return Spec(size, NUM_ACTIONS, True, horizon=50, worlds=tuple(worlds))


def make_learner(worlds=(TABLE, DENSE), **settings):
    """LPG, with two or three actions."""
    return Lpg(LpgConfig(**SETTINGS | settings), spec_of(worlds))


def make_agents(worlds=(TABLE, DENSE), **settings):
    """The learner of those that a rule, or something in its place, teaches."""
    return LpgAgent(LpgAgentConfig(**AGENT_SETTINGS | settings), spec_of(worlds))


def in_double(groups):
    return {
        group: {n: p.double() if p.is_floating_point() else p for n, p in entries.items()}
        for group, entries in groups.items()
    }


def make_state(learner, num_members=4, seed=0):
    """In float64, and off every special value: agents have preferences, critics opinions."""
    state = in_double(learner.init([seed + m for m in range(num_members)]))
    generator = torch.Generator().manual_seed(seed)
    for group in ("params", "critic", "meta_params"):
        state[group] = {
            name: p + 0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
            for name, p in state.get(group, {}).items()
        }
    state["counters"]["renew"] = torch.zeros(num_members, dtype=torch.bool)
    return state


def make_batch(learner, agents, num_members=4, num_envs=2, seed=0):
    """A chunk of a stream with a termination, a time limit and an action fewer for one member."""
    c, spec = learner.config, learner.spec
    generator = torch.Generator().manual_seed(1000 + seed)
    shape = (num_members, c.num_steps, num_envs)

    def observe(*size):
        if not spec.worlds:
            return torch.randn(num_members, *size, spec.obs_size, generator=generator).double()
        obs = torch.full((num_members, *size, spec.obs_size), -1)
        for block in learner.policy.blocks(num_members, num_members):
            world, rows = block.agent.world, slice(*block.members)
            drawn = torch.randint(
                world.num_features,
                (*obs[rows].shape[:-1], world.num_indices),
                generator=generator,
            )
            obs[rows][..., 1 : 1 + world.num_indices] = drawn
            if not world.tabular:
                obs[rows][..., 0, 2] = -1
        obs[..., 0] = NUM_ACTIONS
        obs[0, ..., 0] = NUM_ACTIONS - 1
        return obs

    obs, last_obs = observe(*shape[1:]), observe(num_envs)
    log_prob, action = [], []
    for block in learner.policy.blocks(num_members, num_members):
        rows = slice(*block.members)
        heads = block.agent.heads(block.of(agents.params), obs[rows].flatten(1, 2))
        chosen = heads.policy.sample(torch.rand(heads.log_policy.shape, generator=generator))
        action.append(chosen)
        log_prob.append(heads.policy.log_prob(chosen))
    ends = torch.rand(shape, generator=generator)
    dtype = log_prob[0].dtype

    def zeros():
        return torch.zeros(shape, dtype=dtype)

    return Trajectory(
        obs=obs,
        action=torch.cat(action).view(shape),
        reward=torch.randn(shape, generator=generator).to(dtype),
        terminated=ends < 0.2,
        truncated=ends > 0.85,
        valid=torch.ones(shape, dtype=dtype),
        log_prob=torch.cat(log_prob).view(shape).detach(),
        last_obs=last_obs,
        episode_return=zeros(),
        episode_length=zeros(),
        final_obs=observe(*shape[1:]),
        discounted_return=zeros(),
        true_value=zeros()[:, :0],
    )


def make_window(learner, state, num_members=4, seed=0):
    """Who acted in each batch, and the batches: K of them and the query."""
    trace, batches = [learner.begin(state, num_members)[1]], []
    for k in range(learner.num_inner_updates + 1):
        batches.append(make_batch(learner, trace[-1], num_members, seed=10 * seed + k))
        if k < learner.num_inner_updates:
            trace.append(learner.inner_update(state, trace[-1], batches[-1]))
    return trace, batches
