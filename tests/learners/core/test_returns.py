"""Returns, GAE and standardisation against slow loops over single episodes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learners.core.returns import (
    bootstraps,
    discounted_returns,
    gae,
    gae_matrix,
    reverse_scan,
    standardise,
    stream_gae,
    vtrace,
)
from learners.core.trajectory import masked_mean

PROFILE = settings.get_profile("learners")


def data(seed: int, num_members: int = 2, num_steps: int = 9, num_envs: int = 4):
    """Reward, value, terminated, valid: several episodes in a row, then padding of any numbers."""
    rng = np.random.default_rng(seed)
    shape = (num_members, num_steps, num_envs)
    length = rng.integers(0, num_steps + 1, (num_members, 1, num_envs))
    valid = np.arange(num_steps)[None, :, None] < length
    terminated = (rng.random(shape) < 0.25) | (np.arange(num_steps)[None, :, None] == length - 1)
    reward, value = rng.normal(size=shape), rng.normal(size=shape)
    return reward, value * valid, terminated, valid.astype(np.float64)


def slow(reward, value, terminated, valid, gamma, lam):
    """Per step, the sum over the rest of its episode, spelt out: returns and advantages."""
    returns, advantages = np.zeros_like(reward), np.zeros_like(reward)
    for m, e in np.ndindex(reward.shape[0], reward.shape[2]):
        steps = [t for t in range(reward.shape[1]) if valid[m, t, e] > 0.0]
        for t in steps:
            rest = []
            for u in range(t, steps[-1] + 1):
                rest.append(u)
                if terminated[m, u, e]:
                    break
            for i, u in enumerate(rest):
                returns[m, t, e] += gamma**i * reward[m, u, e]
                following = value[m, u + 1, e] if u != rest[-1] else 0.0
                delta = reward[m, u, e] + gamma * following - value[m, u, e]
                advantages[m, t, e] += (gamma * lam) ** i * delta
    return returns, advantages


def tensors(arrays):
    return [torch.from_numpy(array) for array in arrays]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("gamma", "lam"), [(0.9, 0.7), (1.0, 1.0), (0.99, 0.0), (0.0, 0.5)])
def test_returns_and_gae_equal_the_slow_loop(seed, gamma, lam):
    arrays = data(seed)
    reward, value, terminated, valid = tensors(arrays)
    returns, advantages = slow(*arrays, gamma, lam)
    computed = discounted_returns(reward, terminated, valid, gamma).numpy()
    np.testing.assert_allclose(computed, returns, rtol=0, atol=1e-12)
    computed = gae(reward, value, terminated, valid, gamma, lam).numpy()
    np.testing.assert_allclose(computed, advantages, rtol=0, atol=1e-12)
    assert (valid == 0.0).any()
    assert (computed[valid.numpy() == 0.0] == 0.0).all()


@PROFILE
@given(
    seed=st.integers(0, 2**31),
    gamma=st.floats(0.0, 1.0),
    num_steps=st.integers(1, 12),
    num_envs=st.integers(1, 3),
)
def test_gae_with_lambda_one_is_returns_minus_value(seed, gamma, num_steps, num_envs):
    reward, value, terminated, valid = tensors(data(seed, 2, num_steps, num_envs))
    expected = discounted_returns(reward, terminated, valid, gamma) - value * valid
    computed = gae(reward, value, terminated, valid, gamma, 1.0)
    torch.testing.assert_close(computed, expected, rtol=0, atol=1e-11)


def test_gae_with_lambda_zero_is_the_one_step_error():
    reward = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1)
    value = torch.tensor([10.0, 20.0, 40.0]).view(1, 3, 1)
    terminated = torch.tensor([False, True, False]).view(1, 3, 1)
    computed = gae(reward, value, terminated, torch.ones(1, 3, 1), 0.5, 0.0).flatten()
    assert computed.tolist() == [1.0 + 10.0 - 10.0, 2.0 - 20.0, 3.0 - 40.0]


def test_truncation_alone_does_not_cut_but_padding_does():
    """Nothing stops the sum between two valid steps but `terminated`."""
    reward = torch.tensor([1.0, 1.0, 100.0]).view(1, 3, 1)
    valid = torch.tensor([1.0, 1.0, 0.0]).view(1, 3, 1)
    going = torch.zeros(1, 3, 1, dtype=torch.bool)
    assert discounted_returns(reward, going, valid, 0.5).flatten().tolist() == [1.5, 1.0, 0.0]


def test_sums_do_not_cross_a_gap():
    reward = torch.tensor([1.0, 50.0, 2.0]).view(1, 3, 1)
    valid = torch.tensor([1.0, 0.0, 1.0]).view(1, 3, 1)
    going = torch.zeros(1, 3, 1, dtype=torch.bool)
    assert discounted_returns(reward, going, valid, 0.5).flatten().tolist() == [1.0, 0.0, 2.0]
    advantage = gae(reward, torch.zeros(1, 3, 1), going, valid, 0.5, 1.0)
    assert advantage.flatten().tolist() == [1.0, 0.0, 2.0]


def test_value_in_padding_counts_as_zero():
    """As documented, whatever the caller put there; matters where `truncated` ends an episode."""
    reward, value = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 100.0])
    going, valid = torch.tensor([False, False]), torch.tensor([1.0, 0.0])
    columns = [tensor.view(1, 2, 1) for tensor in (reward, value, going, valid)]
    assert gae(*columns, 1.0, 1.0).flatten().tolist() == [1.0, 0.0]


def test_returns_and_gae_pass_gradient_to_reward_and_value():
    reward, value, terminated, valid = tensors(data(7, 1, 5, 2))
    reward.requires_grad_()
    value.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda r, v: (
            discounted_returns(r, terminated, valid, 0.9),
            gae(r, v, terminated, valid, 0.9, 0.7),
        ),
        (reward, value),
    )


def test_reverse_scan_is_the_recursion():
    rng = np.random.default_rng(0)
    increment, decay = rng.normal(size=(2, 3, 6, 2))
    expected = np.zeros_like(increment)
    for t in reversed(range(6)):
        later = expected[:, t + 1] if t < 5 else 0.0
        expected[:, t] = increment[:, t] + decay[:, t] * later
    computed = reverse_scan(torch.from_numpy(increment), torch.from_numpy(decay))
    np.testing.assert_allclose(computed.numpy(), expected, rtol=0, atol=1e-14)


@PROFILE
@given(seed=st.integers(0, 2**31), scale=st.floats(0.1, 1e3), shift=st.floats(-1e3, 1e3))
def test_standardise_gives_each_member_mean_0_and_deviation_1(seed, scale, shift):
    rng = np.random.default_rng(seed)
    value = rng.normal(size=(3, 6, 4)) * scale * np.array([1.0, 5.0, 0.2])[:, None, None] + shift
    valid = (rng.random((3, 6, 4)) < 0.6).astype(np.float64)
    valid[:, 0, :2] = 1.0
    computed = standardise(*tensors((value, valid))).numpy()
    for m in range(3):
        chosen = valid[m] > 0.0
        expected = (value[m][chosen] - value[m][chosen].mean()) / value[m][chosen].std()
        np.testing.assert_allclose(computed[m][chosen], expected, rtol=0, atol=1e-5)
        assert (computed[m][~chosen] == 0.0).all()


def test_standardise_in_numbers():
    value = torch.tensor([[1.0, 3.0, 99.0], [5.0, 5.0, 5.0]]).double().unsqueeze(-1)
    valid = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]).double().unsqueeze(-1)
    computed = standardise(value, valid).squeeze(-1)
    expected = torch.tensor([[-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]).double()
    torch.testing.assert_close(computed, expected, rtol=0, atol=1e-7)


def test_member_without_valid_steps_is_zero():
    value, nothing = torch.ones(1, 3, 2), torch.zeros(1, 3, 2)
    assert (standardise(value, nothing) == 0.0).all()
    assert masked_mean(value, nothing).tolist() == [0.0]


# --- Streams: episodes follow one another, the chunk ends in the middle of one ---


def stream(seed: int, num_members: int = 2, num_steps: int = 9, num_envs: int = 3):
    """Reward, value, last value, final value, terminated, truncated; both ends occur."""
    rng = np.random.default_rng(seed)
    shape = (num_members, num_steps, num_envs)
    ends = rng.random(shape)
    arrays = [rng.normal(size=shape), rng.normal(size=shape), rng.normal(size=(shape[0], shape[2]))]
    arrays += [rng.normal(size=shape), ends < 0.2, (ends >= 0.2) & (ends < 0.4)]
    return arrays


def pieces(terminated, truncated, m: int, e: int):
    """The steps of each episode, or part of one, in the order of time."""
    steps = []
    for t in range(terminated.shape[1]):
        steps.append(t)
        if terminated[m, t, e] or truncated[m, t, e] or t == terminated.shape[1] - 1:
            yield steps
            steps = []


def value_after(arrays, m: int, t: int, e: int):
    """What is expected after the last step of a piece."""
    _, _, last_value, final_value, terminated, truncated = arrays
    if terminated[m, t, e]:
        return 0.0
    return final_value[m, t, e] if truncated[m, t, e] else last_value[m, e]


def slow_stream_gae(arrays, gamma, lam):
    """Following values and advantages, each episode by itself."""
    reward, value, _, _, terminated, truncated = arrays
    following, advantages = np.zeros_like(reward), np.zeros_like(reward)
    for m, e in np.ndindex(reward.shape[0], reward.shape[2]):
        for steps in pieces(terminated, truncated, m, e):
            tail = [*value[m, steps, e], value_after(arrays, m, steps[-1], e)]
            deltas = [reward[m, t, e] + gamma * tail[i + 1] - tail[i] for i, t in enumerate(steps)]
            for i, t in enumerate(steps):
                following[m, t, e] = tail[i + 1]
                advantages[m, t, e] = sum(
                    (gamma * lam) ** k * delta for k, delta in enumerate(deltas[i:])
                )
    return following, advantages


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("gamma", "lam"), [(0.9, 0.7), (1.0, 1.0), (0.99, 0.0)])
def test_bootstraps_and_stream_gae_equal_the_slow_loop(seed, gamma, lam):
    arrays = stream(seed)
    reward, value, last_value, final_value, terminated, truncated = tensors(arrays)
    assert terminated.any()
    assert truncated.any()
    expected_next, expected = slow_stream_gae(arrays, gamma, lam)
    next_value = bootstraps(value, last_value, final_value, terminated, truncated)
    np.testing.assert_array_equal(next_value.numpy(), expected_next)
    ended = (terminated | truncated).double()
    computed = stream_gae(reward, value, next_value, ended, gamma, lam)
    np.testing.assert_allclose(computed.numpy(), expected, rtol=0, atol=1e-12)


def test_termination_counts_where_both_ends_are_set():
    yes, no = torch.tensor([[[True]]]), torch.tensor([[[False]]])
    one = torch.ones(1, 1, 1)
    after = [
        bootstraps(one, 2 * one[:, 0], 3 * one, *ends) for ends in ((yes, yes), (no, yes), (no, no))
    ]
    assert [float(value) for value in after] == [0.0, 3.0, 2.0]


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize(("gamma", "lam"), [(0.9, 0.7), (1.0, 1.0), (0.99, 0.0)])
def test_gae_matrix_is_the_map_from_delta_to_advantage(num_envs, gamma, lam):
    reward, value, last_value, final_value, terminated, truncated = tensors(
        stream(4, num_steps=12, num_envs=num_envs)
    )
    ended = (terminated | truncated).double()
    assert ended[:, :-1].any()
    next_value = bootstraps(value, last_value, final_value, terminated, truncated)
    expected = stream_gae(reward, value, next_value, ended, gamma, lam)
    matrix = gae_matrix(ended, gamma, lam)
    assert matrix.shape == (2, 12 * num_envs, 12 * num_envs)
    delta = (reward + gamma * next_value - value).flatten(1)
    computed = (matrix @ delta.unsqueeze(-1)).view_as(expected)
    torch.testing.assert_close(computed, expected, rtol=0, atol=1e-12)


def slow_vtrace(arrays, log_ratio, gamma, max_rho):
    """Equation 1 as a sum of products, then the advantages."""
    reward, value, _, _, terminated, truncated = arrays
    ratio = np.exp(log_ratio)
    targets, advantages = np.zeros_like(reward), np.zeros_like(reward)
    for m, e in np.ndindex(reward.shape[0], reward.shape[2]):
        for steps in pieces(terminated, truncated, m, e):
            end = value_after(arrays, m, steps[-1], e)
            tail = [*value[m, steps, e], end]
            for i, s in enumerate(steps):
                targets[m, s, e] = value[m, s, e]
                weight = 1.0
                for k in range(i, len(steps)):
                    t = steps[k]
                    delta = reward[m, t, e] + gamma * tail[k + 1] - tail[k]
                    rho = min(max_rho, ratio[m, t, e])
                    targets[m, s, e] += gamma ** (k - i) * weight * rho * delta
                    weight *= min(1.0, ratio[m, t, e])
            after = [*targets[m, steps, e], end]
            for i, s in enumerate(steps):
                gap = reward[m, s, e] + gamma * after[i + 1] - value[m, s, e]
                advantages[m, s, e] = min(max_rho, ratio[m, s, e]) * gap
    return targets, advantages


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("max_rho", [1.0, 0.6, 1.5])
def test_vtrace_equals_the_slow_loop(seed, max_rho):
    arrays = stream(seed)
    log_ratio = np.random.default_rng(seed + 50).normal(size=arrays[0].shape)
    assert (np.exp(log_ratio) > 1.5).any()
    expected = slow_vtrace(arrays, log_ratio, 0.9, max_rho)
    reward, value, last_value, final_value, terminated, truncated = tensors(arrays)
    next_value = bootstraps(value, last_value, final_value, terminated, truncated)
    ended = (terminated | truncated).double()
    computed = vtrace(reward, value, next_value, ended, torch.from_numpy(log_ratio), 0.9, max_rho)
    for tensor, array in zip(computed, expected, strict=True):
        np.testing.assert_allclose(tensor.numpy(), array, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.9, 1.0])
def test_vtrace_on_own_data_is_the_bootstrapped_return(gamma):
    arrays = stream(3)
    reward, value, last_value, final_value, terminated, truncated = tensors(arrays)
    next_value = bootstraps(value, last_value, final_value, terminated, truncated)
    ended = (terminated | truncated).double()
    target, advantage = vtrace(reward, value, next_value, ended, torch.zeros_like(reward), gamma)
    expected = np.zeros_like(arrays[0])
    for m, e in np.ndindex(2, 3):
        for steps in pieces(terminated, truncated, m, e):
            total = value_after(arrays, m, steps[-1], e)
            for t in reversed(steps):
                total = arrays[0][m, t, e] + gamma * total
                expected[m, t, e] = total
    np.testing.assert_allclose(target.numpy(), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(advantage, target - value, rtol=0, atol=1e-12)
