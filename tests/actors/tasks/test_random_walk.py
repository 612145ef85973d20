import math

import numpy as np
import pytest
import torch

from actors.tasks.random_walk import (
    RandomWalkEnv,
    RandomWalkFlip,
    RandomWalkOffPolicy,
    chance_of_right_end,
)

RIGHT, LEFT = 1, 0


def solved_chances(states, right):
    """Chances of leaving at the right end, from the linear equations v = P v + b."""
    transition = right * np.eye(states, k=1) + (1.0 - right) * np.eye(states, k=-1)
    leaving = np.zeros(states)
    leaving[-1] = right
    return np.linalg.solve(np.eye(states) - transition, leaving)


def flipping(turn):
    return (-1.0) ** turn


def golden(turn):
    """Fractions of multiples of the golden ratio, on [−1, 1], in single precision."""
    return float(np.float32(2.0 * math.fmod((turn + 1) * (math.sqrt(5.0) - 1.0) / 2.0, 1.0) - 1.0))


class SingleWalk:
    """The walk written for one environment."""

    def __init__(self, family, right, reward_of, switch_every):
        self.states, self.horizon, self.switch_every = family.states, family.horizon, switch_every
        self.chances = solved_chances(family.states, right)
        self.reward_of, self.turn, self.since_turn = reward_of, 0, 0

    def reset(self):
        self.state, self.steps = self.states // 2, 0
        return self.seen()

    def step(self, action):
        if self.since_turn == self.switch_every:
            self.turn, self.since_turn = self.turn + 1, 0
        wage = self.reward_of(self.turn)
        true_value = wage * self.chances[self.state]
        self.state += 1 if action == RIGHT else -1
        self.steps += 1
        self.since_turn += 1
        reward = wage if self.state == self.states else 0.0
        ended = self.state in (-1, self.states) or self.steps == self.horizon
        return self.seen(), reward, ended, true_value

    def seen(self):
        return [1.0 if state == self.state else 0.0 for state in range(self.states)]


def started(family, num_envs):
    env = family.make(num_envs)
    obs, _ = env.reset(seed=0, options={"tasks": [{}] * num_envs})
    return env, obs


CASES = [
    (RandomWalkFlip(flip_every=7), 0.5, flipping, 7),
    (RandomWalkFlip(states=3, flip_every=1), 0.5, flipping, 1),
    (RandomWalkFlip(states=9, flip_every=50, horizon=12), 0.5, flipping, 50),
    (RandomWalkOffPolicy(), 0.8, golden, 4800),
    (RandomWalkOffPolicy(states=7, right=0.3, horizon=9, switch_every=11), 0.3, golden, 11),
]


@pytest.mark.parametrize(("family", "right", "reward_of", "switch_every"), CASES)
def test_batch_equals_single_environments(family, right, reward_of, switch_every):
    singles = [SingleWalk(family, right, reward_of, switch_every) for _ in range(8)]
    env, obs = started(family, 8)
    np.testing.assert_array_equal(obs, [single.reset() for single in singles])
    ended, rewards, num_episodes = [False] * 8, [], 0
    rng = np.random.default_rng(1)
    for _ in range(200):
        action = rng.integers(2, size=8)
        obs, reward, terminated, truncated, info = env.step(torch.from_numpy(action))
        assert not truncated.any()
        assert set(info) == {"true_value"}
        assert info["true_value"].dtype == torch.float32
        assert info["true_value"].shape == (8,)
        for i, single in enumerate(singles):
            if ended[i]:
                assert terminated[i]
                assert reward[i] == 0
                assert info["true_value"][i] == 0
                continue
            seen, expected, ended[i], true_value = single.step(action[i])
            assert obs[i].tolist() == seen
            assert reward[i].item() == expected
            assert bool(terminated[i]) == ended[i]
            assert info["true_value"][i].item() == pytest.approx(true_value, abs=1e-6)
            rewards.append(expected)
        # Some that have ended go on as they are, and some are started before their end.
        mask = rng.random(8) < np.where(ended, 0.6, 0.05)
        obs, _ = env.reset(options={"reset_mask": mask})
        for i in np.flatnonzero(mask):
            assert obs[i].tolist() == singles[i].reset()
            ended[i] = False
            num_episodes += 1
    assert num_episodes > 30
    turns = {single.turn for single in singles}
    assert set(rewards) <= {0.0, *map(reward_of, range(max(turns) + 1))}
    assert len(set(rewards)) > 1


# True values


@pytest.mark.parametrize("states", [3, 5, 19])
@pytest.mark.parametrize("right", [0.01, 0.3, 0.5, 0.5 + 1e-12, 0.8, 0.999])
def test_chances_solve_the_linear_equations(states, right):
    chances = chance_of_right_end(states, (1.0 - right, right))
    assert chances.shape == (states + 2,)
    assert chances.dtype == torch.float32
    np.testing.assert_allclose(chances[1:-1], solved_chances(states, right), rtol=1e-6, atol=1e-30)
    assert chances[0] == 0
    assert chances[-1].item() == pytest.approx(1.0)


def test_chances_are_those_of_gamblers_ruin():
    symmetric = chance_of_right_end(5, (0.5, 0.5))
    np.testing.assert_allclose(symmetric, np.arange(7) / 6, rtol=1e-6)
    ratio = 0.2 / 0.8
    expected = (1 - ratio ** np.arange(7)) / (1 - ratio**6)
    np.testing.assert_allclose(chance_of_right_end(5, (0.2, 0.8)), expected, rtol=1e-6)


@pytest.mark.parametrize("right", [0.001, 0.999])
def test_chances_of_long_walks_do_not_overflow(right):
    chances = chance_of_right_end(501, (1.0 - right, right))
    assert torch.isfinite(chances).all()
    assert (chances.diff() >= 0).all()
    expected = right if right < 0.5 else 1.0
    assert chances[-2].item() == pytest.approx(expected, rel=2e-3)


WAGE = golden(0)  # what the first turn pays; episodes are far shorter than a turn


@pytest.mark.parametrize("right", [0.8, 0.4])
def test_true_values_are_the_mean_returns_of_the_target_policy(right):
    num_envs = 20000
    family = RandomWalkOffPolicy(right=right)
    assert family.spec.target_policy == (1.0 - right, right)
    env, obs = started(family, num_envs)
    rng = torch.Generator().manual_seed(0)
    seen, values, returns = [], [], torch.zeros(num_envs)
    ended = torch.zeros(num_envs, dtype=torch.bool)
    while not ended.all():
        # The last reward is the only one: every state visited has the episode's return.
        action = (torch.rand(num_envs, generator=rng) < right).long()
        running = ~ended
        following, reward, ended, _, info = env.step(action)
        seen.append(torch.where(running, obs.argmax(1), -1))
        values.append(info["true_value"] / WAGE)
        returns += reward / WAGE
        obs = following
    for state in range(5):
        # An episode counts once, however often it visits the state.
        visited = torch.stack(seen) == state
        episodes = visited.any(0)
        value = torch.stack(values)[visited].unique()
        assert value.numel() == 1
        count = int(episodes.sum())
        assert count > 1000
        error = 4.0 * 0.5 / math.sqrt(count)
        assert returns[episodes].mean().item() == pytest.approx(value.item(), abs=error)


def test_what_the_policy_is_told():
    flip, off_policy = RandomWalkFlip().spec, RandomWalkOffPolicy().spec
    assert flip.target_policy == (0.5, 0.5)
    assert flip.behaviours == ()
    np.testing.assert_allclose(off_policy.behaviours, [(0.7, 0.3), (0.3, 0.7)])
    assert off_policy.switch_every == 4800
    assert RandomWalkOffPolicy(swing=0.0).spec.behaviours == ()
    np.testing.assert_allclose(off_policy.target_policy, (0.2, 0.8))
    for spec in (flip, off_policy):
        assert (spec.obs_size, spec.action_size, spec.discrete, spec.horizon) == (5, 2, True, 1000)


# The sign


def signs_of_life(env, num_steps, idle):
    """Sign of true value and reward at each step of walks to the right, [num_steps, 2].

    The second environment stays `idle` steps in its first end before it goes on.
    """
    values, rewards = [], []
    for t in range(num_steps):
        _, reward, terminated, _, info = env.step(torch.full((2,), RIGHT))
        values.append(info["true_value"].sign())
        rewards.append(reward)
        waits = torch.tensor([False, t < 2 + idle])
        env.reset(options={"reset_mask": (terminated & ~waits).numpy()})
    return torch.stack(values), torch.stack(rewards)


def test_the_sign_flips_every_960_steps_of_a_life():
    idle = 10
    env, _ = started(RandomWalkFlip(), 2)
    values, rewards = signs_of_life(env, 3000, idle)
    steps = torch.arange(3000)
    expected = torch.where(steps // 960 % 2 == 0, 1.0, -1.0)
    assert expected[[959, 960, 1919, 1920]].tolist() == [1.0, -1.0, -1.0, 1.0]
    assert torch.equal(values[:, 0], expected)
    # From the centre, the third step leaves.
    assert torch.equal(rewards[:, 0], expected * (steps % 3 == 2))
    # Steps after an end are no part of a life.
    lived = torch.cat([steps[:3], steps[3 + idle :]])
    assert (values[3 : 3 + idle, 1] == 0).all()
    assert torch.equal(values[lived, 1], expected[: 3000 - idle])
    assert torch.equal(rewards[lived, 1], (expected * (steps % 3 == 2))[: 3000 - idle])


def test_the_sign_of_a_step_that_leaves_is_the_one_before_the_flip():
    for flip_every, expected in [(2, -1.0), (3, 1.0)]:
        env, _ = started(RandomWalkFlip(flip_every=flip_every), 1)
        for _ in range(3):
            _, reward, *_ = env.step(torch.tensor([RIGHT]))
        assert reward.item() == expected


def test_only_tasks_begin_a_new_life():
    env, _ = started(RandomWalkFlip(flip_every=4), 2)

    def sign():
        return env.step(torch.full((2,), LEFT))[4]["true_value"].sign().tolist()

    for _ in range(2):
        assert sign() == [1.0, 1.0]
    env.reset()
    for _ in range(2):
        assert sign() == [1.0, 1.0]
    env.reset(seed=5)
    assert sign() == [-1.0, -1.0]
    env.reset(options={"reset_mask": np.array([True, False])})
    assert sign() == [-1.0, -1.0]
    assert env.state()["life"].tolist() == [6, 6]
    env.reset(options={"tasks": [{}, {}]})
    assert env.state()["life"].tolist() == [0, 0]
    assert sign() == [1.0, 1.0]


@pytest.mark.parametrize("taken_after", [18, 20, 21])
def test_restored_before_or_after_a_flip_it_goes_on_bit_for_bit(taken_after):
    family = RandomWalkFlip(flip_every=10)
    actions = torch.randint(2, (60, 4), generator=torch.Generator().manual_seed(0))

    def run(env, actions):
        steps = []
        for action in actions:
            *parts, info = env.step(action)
            obs, _ = env.reset(options={"reset_mask": parts[2].numpy()})
            steps.append([*parts, obs, info["true_value"]])
        return [torch.stack(part) for part in zip(*steps, strict=True)]

    env, _ = started(family, 4)
    run(env, actions[:taken_after])
    state = env.state()
    assert state["life"].tolist() == [taken_after] * 4
    expected = run(env, actions[taken_after:])
    assert {-1.0, 1.0} <= set(expected[1].unique().tolist())
    other, _ = started(family, 4)
    run(other, actions[:7])
    fresh = family.make(4)
    for again in (other, fresh):
        again.restore(state)
        for left, right in zip(run(again, actions[taken_after:]), expected, strict=True):
            assert torch.equal(left, right)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(
    ("make", "family"),
    [(RandomWalkEnv, RandomWalkOffPolicy()), (RandomWalkEnv, RandomWalkFlip(flip_every=7))],
)
def test_cuda_equals_cpu(make, family):
    envs = [make(family, 8, device) for device in ("cpu", "cuda")]
    for env in envs:
        env.reset(seed=0, options={"tasks": [{}] * 8})
    for seed in range(30):
        action = torch.randint(2, (8,), generator=torch.Generator().manual_seed(seed))
        left, right = (env.step(action.to(env.device)) for env in envs)
        for a, b in zip(left[:4], right[:4], strict=True):
            assert torch.equal(a, b.cpu())
        assert torch.equal(left[4]["true_value"], right[4]["true_value"].cpu())
        for env in envs:
            env.reset(options={"reset_mask": left[2].numpy()})
