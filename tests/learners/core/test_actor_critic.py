"""Shared parts of the actor-critic methods: directional derivatives, slopes, minibatches."""

import pytest
import torch

from learners.config import PpoConfig
from learners.core.actor_critic import (
    POLICY,
    VALUE,
    ActorCritic,
    clipped_surrogate,
    clipped_value_loss,
    decayed,
    minibatches,
    part,
    prefixed,
    rollout,
    stack,
    standardise_rows,
    standardise_with_pullback,
    surrogate_slope,
    take,
    value_loss_slope,
    values,
)
from learners.core.contract import State
from learners.core.normalizer import OBS_MEAN, OBS_STD
from learners.core.trajectory import Spec, Trajectory

IMAGE = (2, 36, 36)
SPECS = {
    "gaussian": Spec(3, 2, discrete=False, horizon=9),
    "categorical": Spec(3, 4, discrete=True, horizon=9),
    "image": Spec(2 * 36 * 36, 4, discrete=True, horizon=9, image=IMAGE),
}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def networks_and_data(name: str, activation: str = "tanh", num_obs: int = 6):
    """Networks with parameters off every special value, observations and actions; float64."""
    spec = SPECS[name]
    networks = ActorCritic.of(PpoConfig(hidden=(5, 4), activation=activation), spec)
    generator = torch.Generator().manual_seed(1)
    params = stack([networks.init(generator) for _ in range(1 if spec.image else 2)])
    noise = 0.05 if spec.image else 0.4
    params = {n: p.double() + noise * normal(*p.shape, seed=2) for n, p in params.items()}
    num_members = len(next(iter(params.values())))
    shape = (num_members, num_obs)
    obs = normal(*shape, spec.obs_size)
    if spec.image:
        obs = torch.randint(0, 256, obs.shape, generator=generator, dtype=torch.uint8)
    action = normal(*shape, spec.action_size, seed=4)
    if spec.discrete:
        action = torch.randint(0, spec.action_size, shape, generator=generator)
    return networks, params, obs, action


def make_state(learner, num_members: int = 2, seed: int = 0) -> State:
    """A state in float64 as after some updates: nothing at zero, no two members alike."""
    generator = torch.Generator().manual_seed(seed)
    state = learner.init(range(1, num_members + 1))
    for group, entries in state.items():
        for name, p in entries.items():
            if group.endswith("params"):
                noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                entries[name] = p.double() + 0.3 * noise
            elif group.endswith("optimizer"):
                noise = torch.rand(p.shape, generator=generator, dtype=torch.float64)
                entries[name] = torch.full_like(p, 3) if name == "t" else 0.001 + 0.01 * noise
    return state


def make_stream(learner, state: State, num_envs: int = 2, seed: int = 0) -> Trajectory:
    """A chunk with both kinds of ends; recorded log probabilities are a quarter off."""
    generator = torch.Generator().manual_seed(100 + seed)
    params = part(state["params"], POLICY)
    shape = (len(next(iter(params.values()))), learner.config.num_steps, num_envs)
    obs, final_obs = torch.randn(
        2, *shape, learner.spec.obs_size, generator=generator, dtype=torch.float64
    )
    noise = learner.policy.noise((shape[0], shape[1] * shape[2]), generator).double()
    dist = learner.policy.distribution(params, obs.flatten(1, 2))
    action = dist.sample(noise)
    off, reward, total = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    ends = torch.rand(shape, generator=generator)
    return Trajectory(
        obs=obs,
        action=action.view(*shape, *action.shape[2:]),
        reward=reward + obs[..., 0],
        terminated=ends < 0.15,
        truncated=ends > 0.85,
        valid=torch.ones(shape, dtype=torch.float64),
        log_prob=dist.log_prob(action).view(shape) + 0.25 * off,
        last_obs=final_obs[:, -1],
        episode_return=torch.zeros(shape),
        episode_length=torch.zeros(shape),
        final_obs=final_obs,
        discounted_return=total,
        true_value=total[:, :0],
    )


def members(state: State, chosen: slice, num_members: int) -> State:
    """The state of some members; entries that all share stay whole."""
    return {
        group: {n: p[chosen] if len(p) == num_members else p for n, p in entries.items()}
        for group, entries in state.items()
    }


def copied(state: State) -> State:
    return {g: {n: p.clone() for n, p in entries.items()} for g, entries in state.items()}


def plain_outputs(learner, params, obs):
    """Distribution and value of one member at `obs` [N, O], layer by layer."""

    def network(prefix: str):
        hidden = obs
        for layer in range(3):
            weight, bias = (params[f"{prefix}layer{layer}.{n}"] for n in ("weight", "bias"))
            hidden = (torch.tanh(hidden) if layer else hidden) @ weight + bias
        return hidden

    outputs, value = network(POLICY), network(VALUE)[:, 0]
    if learner.spec.discrete:
        return torch.distributions.Categorical(logits=outputs), value
    normal = torch.distributions.Normal(outputs, params[POLICY + "log_std"].exp())
    return torch.distributions.Independent(normal, 1), value


def chain_stream(learner, state: State, num_envs: int, generator) -> Trajectory:
    """A chunk of the chain 0 → 1 → 2 → end: action 1 goes on, 0 goes back; the end pays 1."""
    acting = learner.begin(state, 0)[1].params
    shape = (len(next(iter(acting.values()))), num_envs)
    place, steps = torch.arange(num_envs).expand(shape) % 3, []
    for _ in range(learner.config.num_steps):
        obs = torch.eye(3)[place]
        dist = learner.policy.distribution(acting, obs)
        action = dist.sample(learner.policy.noise(shape, generator))
        end = (place == 2) & (action == 1)
        steps.append((obs, action, end.float(), end, dist.log_prob(action)))
        place = torch.where((action == 1) & ~end, place + 1, 0)
    obs, action, reward, end, log_prob = (torch.stack(x, 1) for x in zip(*steps, strict=True))
    return Trajectory(
        obs=obs,
        action=action,
        reward=reward,
        terminated=end,
        truncated=torch.zeros_like(end),
        valid=torch.ones_like(reward),
        log_prob=log_prob,
        last_obs=torch.eye(3)[place],
        episode_return=reward,
        episode_length=torch.zeros_like(reward),
        final_obs=torch.zeros_like(obs),
        discounted_return=torch.zeros_like(reward),
        true_value=reward[:, :0],
    )


def chain_probabilities(learner, num_updates: int, num_envs: int = 8):
    """Probability of going on, [3 seeds, 3 places], before and after training on the chain."""
    generator, state = torch.Generator().manual_seed(0), learner.init([1, 2, 3])
    found = []
    for count in range(num_updates + 1):
        if count in (0, num_updates):
            acting = learner.begin(state, 3)[1].params
            dist = learner.policy.distribution(acting, torch.eye(3).expand(3, 3, 3))
            found.append(dist.logits.exp()[..., 1])
        batch = chain_stream(learner, state, num_envs, generator)
        state, _ = learner.meta_update(state, [learner.begin(state, 3)[1]], [batch])
    return found


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("name", SPECS)
def test_derivatives_by_hand_equal_autograd(name, activation):
    networks, params, obs, action = networks_and_data(name, activation)
    along = {n: normal(*p.shape, seed=7) for n, p in params.items()}
    by_log_prob, by_value = (normal(*obs.shape[:2], seed=seed) for seed in (8, 9))

    def outputs(theta):
        dist, value = networks(theta, obs)
        return dist.log_prob(action), value, dist.entropy().expand_as(value)

    acting = networks.acting(params, obs, action)
    valuing = networks.valuing(params, acting)
    log_prob_along, trunk_along = acting.tangent(along)
    value_along = valuing.tangent(along, trunk_along)
    expected, expected_along = torch.func.jvp(outputs, (params,), (along,))
    found = (acting.log_prob, log_prob_along, valuing.outputs[..., 0], value_along[..., 0])
    others = (expected[0], expected_along[0], expected[1], expected_along[1])
    for own, other in zip(found, others, strict=True):
        assert own.shape == obs.shape[:2]
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-10)

    pullback = torch.func.vjp(outputs, params)[1]
    for by_entropy in (0.0, 0.7):
        grads, by_trunk = valuing.pullback(by_value.unsqueeze(-1), acting.trunk is not None)
        grads |= acting.gradient(by_log_prob, by_entropy, by_trunk)
        (slopes,) = pullback((by_log_prob, by_value, torch.full_like(by_value, by_entropy)))
        assert grads.keys() == slopes.keys()
        for entry, slope in slopes.items():
            torch.testing.assert_close(grads[entry], slope, rtol=1e-9, atol=1e-10)
    policy_alone = pullback((by_log_prob, 0.0 * by_value, 0.0 * by_value))[0]
    for entry, grad in acting.gradient(by_log_prob).items():
        assert entry.startswith(POLICY)
        torch.testing.assert_close(grad, policy_alone[entry], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", SPECS)
def test_the_value_alone_is_the_value_of_the_call(name):
    networks, params, obs, _ = networks_and_data(name)
    assert torch.equal(networks.value(params, obs), networks(params, obs)[1])
    assert VALUE + "conv0.weight" not in params
    assert (POLICY + "conv0.weight" in params) is (name == "image")


@pytest.mark.parametrize("name", SPECS)
def test_value_and_policy_share_parameters_only_where_observations_are_pixels(name):
    networks, params, obs, action = networks_and_data(name)
    theta = {n: p.requires_grad_() for n, p in params.items()}
    dist, value = networks(theta, obs)
    reached = {}
    for which, total in (("policy", dist.log_prob(action).sum()), ("value", value.sum())):
        grads = torch.autograd.grad(
            total, list(theta.values()), allow_unused=True, retain_graph=True
        )
        reached[which] = {n for n, g in zip(theta, grads, strict=True) if g is not None}
    assert reached["policy"] == {n for n in theta if n.startswith(POLICY)}
    trunk = {n for n in theta if ".conv" in n or n.startswith(POLICY + "layer0")}
    shared = trunk if name == "image" else set()
    assert reached["value"] == shared | {n for n in theta if n.startswith(VALUE)}


def test_part_is_undone_by_prefixed():
    params = {"policy.a": torch.ones(1), "value.a": torch.zeros(1)}
    assert part(params, POLICY) == {"a": params["policy.a"]}
    assert prefixed(part(params, VALUE), VALUE) == {"value.a": params["value.a"]}


def test_values_see_normalized_observations_and_what_follows_an_end():
    """The value is the observation itself: what follows can be read off."""
    obs = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)
    yes = torch.tensor([False, True, False, False]).view(1, 4, 1)
    zero = torch.zeros(1, 4, 1)
    trajectory = Trajectory(
        obs=obs,
        action=obs,
        reward=zero,
        terminated=yes.roll(1, 1),
        truncated=yes,
        valid=zero + 1.0,
        log_prob=zero,
        last_obs=torch.tensor([[[5.0]]]),
        episode_return=zero,
        episode_length=zero,
        final_obs=10.0 * obs,
        discounted_return=zero,
        true_value=zero[:, :0],
    )
    statistics = {OBS_MEAN: torch.tensor([[1.0]]), OBS_STD: torch.tensor([[2.0]])}
    data = rollout(trajectory, statistics)
    assert data.ended.flatten().tolist() == [0.0, 1.0, 1.0, 0.0]
    now, following = values(lambda obs: obs.squeeze(-1), data, trajectory, statistics)
    assert now.flatten().tolist() == [0.0, 0.5, 1.0, 1.5]
    assert following.flatten().tolist() == [0.5, 9.5, 0.0, 2.0]


# --- Minibatches ---


def test_minibatches_partition_the_steps_in_every_epoch():
    rows = minibatches(torch.tensor([3, 4]), torch.tensor([0, 0]), 24, 3, 4)
    assert rows.shape == (12, 2, 6)
    for epoch in rows.view(3, 4, 2, 6):
        for m in range(2):
            assert epoch[:, m].flatten().sort().values.tolist() == list(range(24))
    orders = rows.view(3, 4, 2, 6).permute(0, 2, 1, 3).reshape(6, 24).tolist()
    assert len({tuple(order) for order in orders}) == 6


def test_minibatches_depend_on_the_member_s_seed_and_count_alone():
    both = minibatches(torch.tensor([3, 4]), torch.tensor([7, 5]), 24, 2, 4)
    alone = minibatches(torch.tensor([4]), torch.tensor([5]), 24, 2, 4)
    assert torch.equal(both[:, 1:], alone)
    for seed, count in ((4, 6), (5, 5)):
        other = minibatches(torch.tensor([seed]), torch.tensor([count]), 24, 2, 4)
        assert not torch.equal(other, alone)


def test_take_picks_rows_of_each_member():
    tensor, rows = normal(2, 5, 3), torch.tensor([[4, 0], [1, 1]])
    expected = torch.stack([tensor[0, [4, 0]], tensor[1, [1, 1]]])
    assert torch.equal(take(tensor, rows), expected)


def test_standardise_rows_gives_each_member_mean_0_and_deviation_1():
    value = normal(3, 20) * torch.tensor([1.0, 50.0, 0.1]).view(3, 1) + 7.0
    computed = standardise_rows(value)
    torch.testing.assert_close(computed.mean(1), torch.zeros(3).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(
        computed.std(1, correction=0), torch.ones(3).double(), rtol=1e-6, atol=0
    )
    assert torch.autograd.gradcheck(standardise_rows, value[:, :5].clone().requires_grad_())
    standard, pullback = standardise_with_pullback(value)
    assert torch.equal(standard, computed)
    cotangent = normal(3, 20, seed=1)
    (expected,) = torch.func.vjp(standardise_rows, value)[1](cotangent)
    torch.testing.assert_close(pullback(cotangent), expected, rtol=1e-10, atol=1e-12)


def test_step_size_falls_linearly_to_zero():
    assert [decayed(2.0, count, 4) for count in (0, 1, 3, 4, 9)] == [2.0, 1.5, 0.5, 0.0, 0.0]
    assert decayed(2.0, 10**9, 0) == 2.0


# --- Slopes of the clipped losses ---


@pytest.mark.parametrize("clip", [0.2, None])
def test_surrogate_and_its_slope(clip):
    log_ratio, advantage = 0.4 * normal(2, 500).requires_grad_(), normal(2, 500, seed=1)
    loss = clipped_surrogate(log_ratio, advantage, clip)
    ratio = log_ratio.detach().exp()
    expected = -ratio * advantage
    if clip is not None:
        expected = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    torch.testing.assert_close(loss.detach(), expected)
    (slope,) = torch.autograd.grad(loss.sum(), log_ratio)
    computed = surrogate_slope(log_ratio.detach(), advantage, clip) * advantage
    torch.testing.assert_close(computed, slope, rtol=1e-12, atol=1e-14)
    assert bool((slope == 0.0).any()) is (clip is not None)


@pytest.mark.parametrize("clip", [0.2, None])
def test_value_loss_and_its_slopes(clip):
    value, old = normal(2, 500).requires_grad_(), normal(2, 500, seed=1)
    returns = normal(2, 500, seed=2).requires_grad_()
    loss = clipped_value_loss(value, old, returns, clip)
    expected = (value - returns) ** 2 / 2
    if clip is not None:
        near = torch.minimum(torch.maximum(value, old - clip), old + clip)
        expected = torch.maximum(expected, (near - returns) ** 2 / 2)
    torch.testing.assert_close(loss, expected)
    (slope,) = torch.autograd.grad(loss.sum(), value, create_graph=True)
    (by_return,) = torch.autograd.grad(slope.sum(), returns, materialize_grads=True)
    with torch.no_grad():
        computed = value_loss_slope(value, old, returns, clip)
    torch.testing.assert_close(computed[0], slope.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(computed[1], by_return, rtol=1e-12, atol=1e-14)
    assert bool((by_return == 0.0).any()) is (clip is not None)


def test_slopes_where_the_policy_has_not_moved():
    """A ratio of 1 and V = V_old, as in the first minibatch: nothing is clipped."""
    zero, advantage = torch.zeros(1, 4), torch.tensor([[-2.0, -0.5, 0.5, 2.0]])
    assert surrogate_slope(zero, advantage, 0.2).tolist() == [[-1.0] * 4]
    slope, by_return = value_loss_slope(zero, zero, advantage, 0.2)
    assert torch.equal(slope, -advantage)
    assert by_return.tolist() == [[-1.0] * 4]
