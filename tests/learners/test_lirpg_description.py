"""What LIRPG shows of its learned reward: the reward itself, at the right steps and inputs."""

from dataclasses import fields

import pytest
import torch

from learners.config import LirpgConfig, PpoConfig
from learners.core.contract import Describes
from learners.core.normalizer import normalize_obs
from learners.core.reward_description import first_episode
from learners.core.trajectory import ENV_AXIS, Spec, Trajectory
from learners.lirpg import Lirpg
from learners.ppo import Ppo

M, T, E = 2, 12, 2
ROBOT = Spec(4, 7, False, horizon=50, velocity=2)
IMAGE = Spec(2 * 36 * 36, 3, True, horizon=50, image=(2, 36, 36))


def make_learner(spec):
    if spec.image is not None:
        return Lirpg(LirpgConfig(form="a2c", num_steps=T, num_minibatches=1), spec)
    return Lirpg(LirpgConfig(hidden=(5,), num_steps=T, normalize_obs=True), spec)


def make_state(learner, num_members=M):
    """Every number in float64, the statistics off 0 and 1."""
    state = learner.init(range(num_members))
    state = {
        group: {n: p.double() if p.is_floating_point() else p for n, p in params.items()}
        for group, params in state.items()
    }
    if "statistics" in state:
        statistics = state["statistics"]
        statistics["obs_mean"] = torch.linspace(-1.0, 1.0, statistics["obs_mean"].numel()).view_as(
            statistics["obs_mean"]
        )
        statistics["obs_var"] = statistics["obs_var"] * 4.0
    return state


def make_batch(spec, num_members=M, ends=()):
    """Random steps; `ends` are (step, length) of episodes that end in environment 0 of member 0."""
    generator = torch.Generator().manual_seed(3)
    shape = (num_members, T, E)
    obs = torch.randn(*shape, spec.obs_size, generator=generator).double()
    action = torch.randn(*shape, spec.action_size, generator=generator).double()
    if spec.image is not None:
        obs = torch.randint(256, obs.shape, generator=generator, dtype=torch.uint8)
    if spec.discrete:
        action = torch.randint(spec.action_size, shape, generator=generator)
    numbers = {f.name: torch.zeros(shape).double() for f in fields(Trajectory)}
    terminated, length = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape)
    for step, steps in ends:
        terminated[0, step, 0], length[0, step, 0] = True, steps
    special = {
        "obs": obs,
        "action": action,
        "reward": torch.randn(shape, generator=generator).double(),
        "terminated": terminated,
        "truncated": torch.zeros(shape, dtype=torch.bool),
        "valid": torch.ones(shape),
        "last_obs": obs[:, -1],
        "episode_length": length,
        "final_obs": obs,
    }
    assert special.keys() <= ENV_AXIS.keys()
    return Trajectory(**numbers | special)


def direct(learner, state, obs, action):
    """r_in of the first replica at raw observations [N, O], by the learner's own function."""
    meta_params = {n: p[:1] for n, p in state["meta_params"].items()}
    statistics = {n: p[:1] for n, p in learner.statistics(state).items()}
    obs = normalize_obs(statistics, obs.unsqueeze(0))
    action = action.unsqueeze(0)
    pair = obs if learner.spec.discrete else torch.cat([obs, action], -1)
    return learner.intrinsic.reward(meta_params, pair, action)[0]


def test_only_learners_with_something_to_show_describe():
    assert isinstance(make_learner(ROBOT), Describes)
    assert not isinstance(Ppo(PpoConfig(), ROBOT), Describes)


def test_the_rewards_are_those_of_the_first_replica():
    learner, batch = make_learner(ROBOT), make_batch(ROBOT, ends=[(2, 9), (7, 5)])
    state = make_state(learner)
    described = learner.describe(state, batch)
    want = direct(learner, state, batch.obs[0].flatten(0, 1), batch.action[0].flatten(0, 1))
    assert want.std() > 0.01
    assert torch.equal(described["intrinsic_reward"], want)
    assert torch.equal(described["episode_intrinsic"], want.view(T, E)[3:8, 0])
    assert torch.equal(described["episode_extrinsic"], batch.reward[0, 3:8, 0])
    assert "frames" not in described
    assert not any(tensor.requires_grad for tensor in described.values())


@pytest.mark.parametrize(
    ("ends", "want"),
    [
        ([], slice(0, T)),
        ([(4, 9)], slice(0, T)),
        ([(4, 5)], slice(0, 5)),
        ([(4, 9), (6, 2), (9, 3)], slice(5, 7)),
        ([(T - 1, T)], slice(0, T)),
    ],
)
def test_the_first_complete_episode(ends, want):
    assert first_episode(make_batch(ROBOT, ends=ends)) == want


def test_slices_vary_velocity_and_one_action_and_nothing_else():
    learner, batch = make_learner(ROBOT), make_batch(ROBOT)
    state = make_state(learner)
    described = learner.describe(state, batch)
    velocity, effort = described["slice_velocity"], described["slice_action"]
    size = len(velocity)
    assert described["slices"].shape == (6, size, size)  # the first six of seven dimensions
    assert (velocity[0], velocity[-1], effort[0], effort[-1]) == (-3.0, 3.0, -1.0, 1.0)
    mean, std = learner.statistics(state).values()
    for dimension, row, column in ((0, 0, 0), (3, 11, size - 1), (5, 40, 7)):
        obs, action = mean[:1].double(), torch.zeros(1, 7).double()
        obs[0, 2] += velocity[column] * std[0, 2]
        action[0, dimension] = effort[row]
        want = direct(learner, state, obs, action)[0]
        torch.testing.assert_close(described["slices"][dimension, row, column], want)


def test_no_slices_where_no_velocity_is_known():
    spec = Spec(4, 7, False, horizon=50)
    learner = make_learner(spec)
    assert "slices" not in learner.describe(make_state(learner), make_batch(spec))


def test_saliency_is_the_derivative_by_the_pixels():
    learner, batch = make_learner(IMAGE), make_batch(IMAGE, num_members=1)
    state = make_state(learner, 1)
    described = learner.describe(state, batch)
    assert described["frames"].shape == described["saliency"].shape == (8, 36, 36)
    assert described["frames"].dtype == torch.uint8
    steps = torch.linspace(0, T * E - 1, 8).long()
    obs, action = batch.obs[0].flatten(0, 1)[steps], batch.action[0].flatten(0, 1)[steps]
    pixels = obs.view(8, 2, 36, 36)
    assert torch.equal(described["frames"], pixels[:, 1])
    torch.testing.assert_close(
        described["frame_reward"], direct(learner, state, obs.double(), action)
    )
    for y, x in ((0, 0), (17, 20), (30, 5)):
        total = 0.0
        for channel in range(2):
            up, down = pixels.double().clone(), pixels.double().clone()
            up[:, channel, y, x] += 1e-4
            down[:, channel, y, x] -= 1e-4
            rise = [direct(learner, state, p.flatten(1), action) for p in (up, down)]
            total = total + ((rise[0] - rise[1]) / 2e-4).abs()
        assert total.max() > 0.0
        torch.testing.assert_close(described["saliency"][:, y, x], total, rtol=1e-5, atol=1e-10)


def test_inputs_stay_as_they_were():
    learner, batch = make_learner(IMAGE), make_batch(IMAGE, num_members=1)
    state = make_state(learner, 1)
    before = {f.name: getattr(batch, f.name).clone() for f in fields(batch)}
    params = {n: p.clone() for n, p in state["meta_params"].items()}
    learner.describe(state, batch)
    assert all(torch.equal(getattr(batch, name), tensor) for name, tensor in before.items())
    assert all(torch.equal(state["meta_params"][name], p) for name, p in params.items())
    assert not any(p.requires_grad for p in state["meta_params"].values())
