"""Cutting, joining and averaging trajectories."""

from dataclasses import fields

import pytest
import torch

from learners.core.trajectory import (
    ENV_AXIS,
    Trajectory,
    concatenate,
    masked_mean,
    mean_episode_return,
)
from tests.learners.builders import make_learner, make_state, make_trajectory


def trajectory(discrete: bool, num_members: int = 5) -> Trajectory:
    learner = make_learner(discrete)
    return make_trajectory(learner, make_state(learner)["meta_params"], num_members, seed=3)


def same(one: Trajectory, other: Trajectory) -> bool:
    return all(torch.equal(getattr(one, n), getattr(other, n)) for n in ENV_AXIS)


@pytest.mark.parametrize("discrete", [False, True])
def test_members_and_concatenate_are_inverse(discrete):
    whole = trajectory(discrete)
    parts = [whole.members(0, 2), whole.members(2, 3), whole.members(3, 5)]
    assert [len(part.obs) for part in parts] == [2, 1, 2]
    assert parts[0].obs.data_ptr() == whole.obs.data_ptr()
    assert same(concatenate(parts, "members"), whole)
    assert not same(concatenate(parts[::-1], "members"), whole)


@pytest.mark.parametrize("discrete", [False, True])
def test_concatenate_joins_environments_of_every_field(discrete):
    whole = trajectory(discrete)
    parts = [
        Trajectory(**{n: getattr(whole, n).narrow(ax, *cut) for n, ax in ENV_AXIS.items()})
        for cut in ((0, 1), (1, 3))
    ]
    assert parts[1].last_obs.shape == (5, 3, 2)
    assert same(concatenate(parts, "envs"), whole)


def test_map_and_to_reach_every_field():
    whole = trajectory(discrete=True)
    turned = whole.map(lambda tensor: tensor.flip(0))
    for field in fields(Trajectory):
        assert torch.equal(getattr(turned, field.name), getattr(whole, field.name).flip(0))
    there = whole.to("meta")
    assert all(getattr(there, field.name).is_meta for field in fields(Trajectory))


def test_num_steps_counts_valid_steps():
    whole = trajectory(discrete=False)
    assert whole.num_steps == int(whole.episode_length[whole.valid > 0.0].sum())
    assert 0 < whole.num_steps < whole.valid.numel()


def test_masked_mean_equals_a_loop():
    whole = trajectory(discrete=False)
    expected = torch.stack(
        [r[v > 0.0].mean() for r, v in zip(whole.reward, whole.valid, strict=True)]
    )
    torch.testing.assert_close(masked_mean(whole.reward, whole.valid), expected)


def test_mean_episode_return_counts_each_ended_episode_once():
    whole = trajectory(discrete=False)
    expected = (whole.reward * whole.valid).sum(1).mean(1)
    torch.testing.assert_close(mean_episode_return(whole), expected)
    cut_off = Trajectory(
        **{
            **{name: getattr(whole, name) for name in ENV_AXIS},
            "terminated": torch.zeros_like(whole.terminated),
            "truncated": whole.terminated | whole.truncated,
        }
    )
    torch.testing.assert_close(mean_episode_return(cut_off), expected)
    cut_off.truncated[2] = False
    assert mean_episode_return(cut_off).isnan().tolist() == [False, False, True, False, False]
