"""Running statistics against those of all data at once."""

import dataclasses

import pytest
import torch

from learners.core.normalizer import (
    OBS_MEAN,
    OBS_STD,
    REWARD_STD,
    Normalizer,
    merged,
    normalize_obs,
)
from learners.core.trajectory import Trajectory

NORMALIZER = Normalizer(obs=True, reward=True, gamma=0.9)


def chunk(seed: int, num_steps: int) -> Trajectory:
    """Two members in three environments with unlike scales; some steps are invalid."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, num_steps, 3)
    scale = torch.tensor([1.0, 20.0]).view(2, 1, 1)
    empty = torch.zeros(shape)
    obs = torch.randn(*shape, 4, generator=generator) * scale.unsqueeze(-1) + 5.0 + seed
    total = torch.randn(shape, generator=generator) * scale - seed
    valid = (torch.rand(shape, generator=generator) < 0.7).float()
    return Trajectory(
        obs=torch.where(valid.unsqueeze(-1) > 0.0, obs, 1e6),
        action=torch.zeros(*shape, 1),
        reward=empty,
        terminated=empty.bool(),
        truncated=empty.bool(),
        valid=valid,
        log_prob=empty,
        last_obs=obs[:, -1],
        episode_return=empty,
        episode_length=empty,
        final_obs=obs,
        discounted_return=torch.where(valid > 0.0, total, -1e6),
        true_value=empty[:, :0],
    )


def test_merged_statistics_are_those_of_all_valid_steps_at_once():
    chunks = [chunk(seed, num_steps) for seed, num_steps in enumerate((5, 1, 12, 7))]
    state = NORMALIZER.init(2, 4)
    for part in chunks:
        state = NORMALIZER.merge(state, part)
    for m in range(2):
        chosen = [part.valid[m].flatten() > 0.0 for part in chunks]
        for name, field, size in (("obs", "obs", 4), ("return", "discounted_return", 1)):
            values = [getattr(part, field)[m].reshape(-1, size).double() for part in chunks]
            whole = torch.cat([v[c] for v, c in zip(values, chosen, strict=True)])
            assert state[f"{name}_count"][m].tolist() == [len(whole)]
            torch.testing.assert_close(state[f"{name}_mean"][m], whole.mean(0))
            torch.testing.assert_close(
                state[f"{name}_var"][m], whole.var(0, correction=0), rtol=1e-9, atol=0
            )


def test_entries_are_float32_roots_with_members_first():
    state = NORMALIZER.merge(NORMALIZER.init(2, 4), chunk(0, 9))
    entries = NORMALIZER.entries(state)
    shapes = {name: tuple(entry.shape) for name, entry in entries.items()}
    assert shapes == {OBS_MEAN: (2, 4), OBS_STD: (2, 4), REWARD_STD: (2, 1)}
    assert {entry.dtype for entry in entries.values()} == {torch.float32}
    torch.testing.assert_close(
        entries[OBS_STD].double(), state["obs_var"].sqrt(), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        entries[REWARD_STD].double(), state["return_var"].sqrt(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("obs", [False, True])
@pytest.mark.parametrize("reward", [False, True])
def test_only_what_is_asked_for_is_kept(obs, reward):
    normalizer = Normalizer(obs, reward, 0.9)
    state = normalizer.merge(normalizer.init(2, 4), chunk(0, 3))
    assert any(name.startswith("obs") for name in state) is obs
    assert any(name.startswith("return") for name in state) is reward
    assert (OBS_MEAN in normalizer.entries(state)) is obs
    assert (REWARD_STD in normalizer.entries(state)) is reward


def test_statistics_of_nothing_are_mean_0_and_deviation_1():
    entries = NORMALIZER.entries(NORMALIZER.init(2, 4))
    assert (entries[OBS_MEAN] == 0.0).all()
    torch.testing.assert_close(entries[OBS_STD], torch.ones(2, 4))
    torch.testing.assert_close(entries[REWARD_STD], torch.ones(2, 1))


@pytest.mark.parametrize("begun", [False, True])
def test_merging_nothing_changes_nothing(begun):
    state = NORMALIZER.init(2, 4)
    if begun:
        state = NORMALIZER.merge(state, chunk(0, 9))
    nothing = chunk(1, 3)
    nothing = dataclasses.replace(nothing, valid=torch.zeros_like(nothing.valid))
    after = NORMALIZER.merge(state, nothing)
    for name, tensor in state.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-14, atol=0)


def test_merge_leaves_its_inputs_alone():
    state, part = NORMALIZER.merge(NORMALIZER.init(2, 4), chunk(0, 9)), chunk(1, 3)
    before = {name: tensor.clone() for name, tensor in state.items()}, part.map(torch.clone)
    after = NORMALIZER.merge(state, part)
    for name, tensor in state.items():
        assert torch.equal(tensor, before[0][name])
        assert not torch.equal(tensor, after[name])
    for name, tensor in vars(part).items():
        assert torch.equal(tensor, getattr(before[1], name))


def test_a_variance_far_from_zero_keeps_its_digits():
    """Values of mean 1e4: a difference of sums of squares would lose them."""
    state = {"x_mean": torch.zeros(1, 1).double(), "x_var": torch.ones(1, 1).double()}
    state["x_count"] = torch.zeros(1, 1).double()
    value = 1e4 + torch.arange(10.0).view(1, 10, 1).double() * 1e-3
    for _ in range(3):
        state = merged(state, "x", value, torch.ones(1, 10))
    torch.testing.assert_close(state["x_var"], value.var(1, correction=0), rtol=1e-6, atol=0)


def test_observations_are_shifted_scaled_and_clipped_per_member():
    params = {OBS_MEAN: torch.tensor([[1.0], [2.0]]), OBS_STD: torch.tensor([[2.0], [0.5]])}
    obs = torch.tensor([[3.0, 1000.0], [1.5, -1000.0]]).unsqueeze(-1)
    assert normalize_obs(params, obs).squeeze(-1).tolist() == [[1.0, 10.0], [-1.0, -10.0]]
    assert normalize_obs(params, obs, clip=0.5).squeeze(-1).tolist() == [[0.5, 0.5], [-0.5, -0.5]]
    assert normalize_obs({}, obs) is obs
