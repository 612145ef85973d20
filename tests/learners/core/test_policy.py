"""Policies and their distributions against torch.distributions."""

import math

import pytest
import torch

from learners.core.networks import mlp
from learners.core.normalizer import OBS_MEAN, OBS_STD, REWARD_STD, Normalizer
from learners.core.params import expand_members
from learners.core.policy import Categorical, Gaussian, Policy
from learners.core.trajectory import Spec


def gaussian(seed: int) -> tuple[Gaussian, torch.distributions.Distribution]:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(3, 7, 2, generator=generator).double()
    log_std = 0.5 * torch.randn(3, 1, 2, generator=generator).double()
    normal = torch.distributions.Normal(mean, log_std.exp().expand_as(mean))
    return Gaussian(mean, log_std), torch.distributions.Independent(normal, 1)


def categorical(seed: int) -> tuple[Categorical, torch.distributions.Distribution]:
    logits = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(seed)).double()
    return Categorical(logits.log_softmax(-1)), torch.distributions.Categorical(logits=logits)


@pytest.mark.parametrize("make", [gaussian, categorical])
def test_log_prob_and_kl_equal_those_of_torch(make):
    (one, torch_one), (other, torch_other) = make(0), make(1)
    torch.manual_seed(0)
    action = torch_one.sample()
    log_prob = one.log_prob(action)
    assert log_prob.shape == (3, 7)
    torch.testing.assert_close(log_prob, torch_one.log_prob(action), rtol=1e-12, atol=1e-12)
    expected = torch.distributions.kl_divergence(torch_one, torch_other)
    assert (expected > 0.01).all()
    torch.testing.assert_close(one.kl(other), expected, rtol=1e-12, atol=1e-12)
    reverse = torch.distributions.kl_divergence(torch_other, torch_one)
    assert not torch.allclose(one.kl(other), reverse, rtol=1e-3)
    torch.testing.assert_close(one.kl(one), torch.zeros(3, 7).double(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("make", [gaussian, categorical])
def test_tensors_are_the_parameters(make):
    dist, _ = make(0)
    assert all(torch.equal(a, b) for a, b in zip(dist.tensors, vars(dist).values(), strict=True))
    assert type(dist)(*dist.tensors) == dist


def test_fisher_of_a_gaussian_equals_the_dense_matrix():
    dist, _ = gaussian(2)
    weight = torch.rand(3, 7, generator=torch.Generator().manual_seed(5)).double()
    weight[:, 3] = 0.0
    tangents = [t + 1.0 for t in gaussian(3)[0].tensors]
    mean_part, log_std_part = dist.fisher(tangents, weight)
    assert mean_part.shape == dist.mean.shape
    assert log_std_part.shape == dist.log_std.shape
    for m in range(3):
        variance = (2.0 * dist.log_std[m, 0]).exp()
        for n in range(7):
            expected = weight[m, n] * (1.0 / variance).diag() @ tangents[0][m, n]
            torch.testing.assert_close(mean_part[m, n], expected)
        expected = weight[m].sum() * 2.0 * torch.eye(2).double() @ tangents[1][m, 0]
        torch.testing.assert_close(log_std_part[m, 0], expected)


def test_fisher_of_a_categorical_equals_the_dense_matrix():
    dist, torch_dist = categorical(2)
    weight = torch.rand(3, 7, generator=torch.Generator().manual_seed(5)).double()
    (tangent,) = categorical(3)[0].tensors
    (product,) = dist.fisher((tangent,), weight)
    for m in range(3):
        for n in range(7):
            p = torch_dist.probs[m, n]
            expected = weight[m, n] * (p.diag() - p.outer(p)) @ tangent[m, n]
            torch.testing.assert_close(product[m, n], expected, rtol=1e-11, atol=1e-13)


def test_gaussian_samples_have_the_stated_moments():
    policy = Policy(Spec(2, 2, discrete=False, horizon=1), (4,), "tanh", 1.0)
    noise = policy.noise((1, 40_000), torch.Generator().manual_seed(3))
    mean, log_std = torch.tensor([[[1.0, -2.0]]]), torch.tensor([[[0.5, -1.0]]])
    action = Gaussian(mean.expand(1, 40_000, 2), log_std).sample(noise)[0]
    error = log_std.exp().flatten() / 200.0
    assert ((action.mean(0) - mean.flatten()).abs() < 4.0 * error).all()
    assert ((action.std(0) / log_std.exp().flatten() - 1.0).abs() < 4.0 / 283.0).all()
    assert torch.corrcoef(action.T)[0, 1].abs() < 4.0 / 200.0
    third = ((action - action.mean(0)) / action.std(0)).pow(3).mean(0)
    assert (third.abs() < 4.0 * math.sqrt(6.0) / 200.0).all()


def test_categorical_samples_have_the_stated_frequencies():
    policy = Policy(Spec(2, 4, discrete=True, horizon=1), (4,), "tanh", 1.0)
    noise = policy.noise((1, 40_000), torch.Generator().manual_seed(3))
    prob = torch.tensor([0.5, 0.3, 0.15, 0.05])
    action = Categorical(prob.log().expand(1, 40_000, 4)).sample(noise)[0]
    assert action.dtype == torch.int64
    frequency = torch.bincount(action, minlength=4) / 40_000
    assert ((frequency - prob).abs() < 4.0 * (prob * (1.0 - prob)).sqrt() / 200.0).all()


def test_sampling_is_the_stated_transform_of_noise():
    dist, _ = gaussian(4)
    noise = torch.randn(3, 7, 2, generator=torch.Generator().manual_seed(1)).double()
    torch.testing.assert_close(dist.sample(noise), dist.mean + noise * dist.log_std.exp())
    assert torch.equal(dist.sample(torch.zeros(3, 7, 2).double()), dist.mean)
    dist, _ = categorical(4)
    assert torch.equal(dist.sample(torch.zeros(3, 7, 4).double()), dist.logits.argmax(-1))
    push = torch.zeros(3, 7, 4).double()
    push[..., 2] = 100.0
    assert (dist.sample(push) == 2).all()


@pytest.mark.parametrize("discrete", [False, True])
def test_policy_is_the_network_s_output_read_as_a_distribution(discrete):
    policy = Policy(Spec(3, 4, discrete, horizon=1), (5, 6), "tanh", 0.5)
    params = policy.init(torch.Generator().manual_seed(0))
    assert params["layer0.weight"].shape == (3, 5)
    assert params["layer1.weight"].shape == (5, 6)
    assert params["layer2.weight"].shape == (6, 4)
    assert ("log_std" in params) is not discrete
    members = expand_members(params, 2)
    obs = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(1))
    dist = policy.distribution(members, obs)
    output = mlp(members, obs, "tanh")
    if discrete:
        torch.testing.assert_close(dist.logits.exp(), output.softmax(-1))
        torch.testing.assert_close(dist.logits.exp().sum(-1), torch.ones(2, 7))
    else:
        assert torch.equal(dist.mean, output)
        assert dist.log_std.shape == (2, 1, 4)
        torch.testing.assert_close(dist.log_std.exp(), torch.full((2, 1, 4), 0.5))


def test_standard_deviation_has_a_floor():
    policy = Policy(Spec(1, 1, discrete=False, horizon=1), (), "tanh", 1.0)
    params = expand_members(policy.init(torch.Generator().manual_seed(0)), 1)
    params["log_std"] = torch.full((1, 1), -1000.0)
    dist = policy.distribution(params, torch.zeros(1, 1, 1))
    assert float(dist.log_std.exp()) == pytest.approx(1e-6, rel=1e-4)
    assert dist.log_prob(torch.zeros(1, 1, 1)).isfinite().all()


@pytest.mark.parametrize("discrete", [False, True])
def test_noise_follows_its_generator(discrete):
    policy = Policy(Spec(1, 3, discrete, horizon=1), (), "tanh", 1.0)
    draws = [policy.noise((2, 5), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert draws[0].shape == (2, 5, 3)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


# --- Entropy and derivatives along a direction ---


@pytest.mark.parametrize("make", [gaussian, categorical])
def test_entropy_equals_that_of_torch(make):
    dist, torch_dist = make(0)
    expected = torch_dist.entropy()
    assert (expected != 0.0).all()
    computed = dist.entropy().expand(3, 7)
    torch.testing.assert_close(computed, expected, rtol=1e-12, atol=1e-12)


# --- Normalized observations ---


def test_template_has_every_published_entry():
    normalizer = Normalizer(obs=True, reward=True, gamma=0.9)
    spec = Spec(3, 2, discrete=False, horizon=1)
    policy = Policy(spec, (5,), "tanh", 0.5, normalizer=normalizer)
    shapes = {name: tuple(p.shape) for name, p in policy.template().items()}
    own = {name: tuple(p.shape) for name, p in policy.init(torch.Generator()).items()}
    assert shapes == own | {OBS_MEAN: (3,), OBS_STD: (3,), REWARD_STD: (1,)}
    plain = Policy(spec, (5,), "tanh", 0.5)
    assert plain.template().keys() == own.keys()


def test_distribution_normalizes_raw_observations():
    policy = Policy(Spec(3, 2, discrete=False, horizon=1), (5,), "tanh", 0.5)
    params = expand_members(policy.init(torch.Generator().manual_seed(0)), 2)
    generator = torch.Generator().manual_seed(1)
    mean, std = torch.randn(2, 3, generator=generator), torch.rand(2, 3, generator=generator) + 0.5
    obs = 3.0 * torch.randn(2, 7, 3, generator=generator)
    obs[0, 0, 0] = 1e6
    own = (obs - mean.unsqueeze(1)) / std.unsqueeze(1)
    assert (own.abs() > 10.0).any()
    expected = policy.distribution(params, own.clamp(-10.0, 10.0)).mean
    computed = policy.distribution(params | {OBS_MEAN: mean, OBS_STD: std}, obs).mean
    assert torch.equal(computed, expected)
    assert not torch.allclose(computed, policy.distribution(params, obs).mean)


@pytest.mark.parametrize("normalizer", [None, Normalizer(obs=True, reward=True, gamma=0.9)])
@pytest.mark.parametrize(("discrete", "size"), [(False, 3), (False, 1), (True, 4)])
@pytest.mark.parametrize("num_members", [1, 3])
def test_acting_is_sampling_from_the_distribution_to_the_bit(
    num_members, discrete, size, normalizer
):
    spec = Spec(obs_size=5, action_size=size, discrete=discrete, horizon=10)
    policy = Policy(spec, (8, 7), "tanh", 0.5, normalizer=normalizer)
    generator = torch.Generator().manual_seed(0)
    params = {
        name: p + 0.3 * torch.rand(p.shape, generator=generator)
        for name, p in expand_members(policy.template(), num_members).items()
    }
    act = policy.acting(params)
    for _ in range(3):
        obs = 20.0 * torch.randn(num_members, 2, 5, generator=generator)
        noise = policy.noise((num_members, 2), generator)
        action, outputs = act(obs, noise)
        dist = policy.distribution(params, obs)
        assert torch.equal(action, dist.sample(noise))
        given = policy.from_outputs(params, outputs).tensors
        assert all(torch.equal(a, b) for a, b in zip(given, dist.tensors, strict=True))
