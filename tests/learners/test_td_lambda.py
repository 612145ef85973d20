"""TD(λ) against a slow loop, over chunks of any length, and on a walk with known values."""

import numpy as np
import pytest
import torch

from learners.config import TdLambdaConfig
from learners.core.errors import ConfigError, NonFiniteError
from learners.core.trajectory import Spec, Trajectory
from learners.td_lambda import BIAS, WEIGHT, TdLambda

TARGET = (0.3, 0.7)
SPEC = Spec(3, 2, discrete=True, horizon=100, target_policy=TARGET)


def make_learner(**settings) -> TdLambda:
    return TdLambda(
        TdLambdaConfig(**{"gamma": 0.9, "trace_decay": 0.8, "lr": 0.2} | settings), SPEC
    )


def stream(num_steps: int, num_members: int = 2, num_envs: int = 2, seed: int = 0) -> Trajectory:
    """Random observations, rewards and ends; `final_obs` is not looked at: nothing is truncated."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_members, num_steps, num_envs)
    obs = torch.randn(num_members, num_steps + 1, num_envs, 3, generator=generator).double()
    reward = torch.randn(shape, generator=generator).double()
    return Trajectory(
        obs=obs[:, :-1],
        action=torch.randint(2, shape, generator=generator),
        reward=reward,
        terminated=torch.rand(shape, generator=generator) < 0.2,
        truncated=torch.zeros(shape, dtype=torch.bool),
        valid=torch.ones_like(reward),
        log_prob=torch.full_like(reward, 0.5).log(),
        last_obs=obs[:, -1],
        episode_return=reward,
        episode_length=reward,
        final_obs=obs[:, :-1],
        discounted_return=reward,
        true_value=torch.full_like(reward, 0.5),
    )


def double(state):
    return state | {"params": {n: p.double() for n, p in state["params"].items()}}


def slow_weights(batch: Trajectory, m: int, lr: float, decay: float) -> np.ndarray:
    """Weights of one member after a chunk, step by step and environment by environment."""
    num_steps, num_envs = batch.reward.shape[1:]
    weight, traces = np.zeros(4), np.zeros((num_envs, 4))
    for t in range(num_steps):
        step = np.zeros(4)
        for e in range(num_envs):
            following = batch.last_obs[m, e] if t == num_steps - 1 else batch.obs[m, t + 1, e]
            x, y = (np.append(obs.numpy(), 1.0) for obs in (batch.obs[m, t, e], following))
            over = bool(batch.terminated[m, t, e])
            error = float(batch.reward[m, t, e]) + (0.0 if over else 0.9 * weight @ y) - weight @ x
            ratio = TARGET[int(batch.action[m, t, e])] / 0.5
            traces[e] = ratio * (0.9 * decay * traces[e] + x)
            step += lr * error * traces[e] / num_envs
            if over:
                traces[e] = 0.0
        weight = weight + step
    return weight


@pytest.mark.parametrize("trace_decay", [0.0, 0.8, 1.0])
def test_weights_equal_those_of_a_slow_loop(trace_decay):
    learner, batch = make_learner(lr=0.05, trace_decay=trace_decay), stream(7)
    state = double(learner.init([1, 2]))
    after, metrics = learner.meta_update(state, None, [batch])
    for m in range(2):
        expected = torch.from_numpy(slow_weights(batch, m, 0.05, trace_decay))
        torch.testing.assert_close(after["params"][WEIGHT][m, :, 0], expected[:3])
        torch.testing.assert_close(after["params"][BIAS][m], expected[3:])
    assert metrics["rollout/value_error"] == pytest.approx(0.25)


def test_chunks_leave_no_mark():
    learner, whole = make_learner(), stream(8)
    first, second = (whole.map(lambda x, s=s: x[:, 4 * s : 4 * s + 4]) for s in (0, 1))
    parts = [vars(first) | {"last_obs": whole.obs[:, 4]}, vars(second)]
    parts[1]["last_obs"] = whole.last_obs
    state = double(learner.init([1, 2]))
    together, _ = learner.meta_update(state, None, [whole])
    for part in parts:
        state, _ = learner.meta_update(state, None, [Trajectory(**part)])
    for name, p in together["params"].items():
        torch.testing.assert_close(state["params"][name], p)


def test_values_of_a_walk_become_the_true_ones():
    """Three states, the target steps right with 0.7, which pays 1 behind the last state."""
    learner, generator = make_learner(lr=0.02, gamma=1.0), torch.Generator().manual_seed(0)
    state, place = learner.init([1]), torch.ones(16, dtype=torch.int64)
    eye = torch.eye(3)
    for _ in range(150):
        steps = []
        for _ in range(16):
            action = torch.randint(2, (16,), generator=generator)
            to = place + 2 * action - 1
            end = (to < 0) | (to > 2)
            steps.append((eye[place], action, (to > 2).float(), end))
            place = torch.where(end, 1, to)
        obs, action, reward, end = (torch.stack(x).unsqueeze(0) for x in zip(*steps, strict=True))
        batch = stream(16, 1, 16).map(lambda x: x.float() if x.is_floating_point() else x)
        fields = {"obs": obs, "action": action, "reward": reward, "terminated": end}
        fields |= {"last_obs": eye[place].unsqueeze(0), "truncated": torch.zeros_like(end)}
        state, _ = learner.meta_update(state, None, [Trajectory(**vars(batch) | fields)])
    value = state["params"][WEIGHT][0, :, 0] + state["params"][BIAS][0]
    ratio = 3 / 7
    expected = [(1 - ratio**i) / (1 - ratio**4) for i in (1, 2, 3)]
    assert value.tolist() == pytest.approx(expected, abs=0.05)


def test_it_never_learns_to_act():
    learner = make_learner()
    state = learner.init([1, 2])
    dist = learner.policy.distribution(learner.begin(state, 2)[1].params, torch.randn(2, 4, 3))
    torch.testing.assert_close(dist.logits.exp(), torch.full((2, 4, 2), 0.5))


def test_a_reward_of_nan_is_refused():
    learner, batch = make_learner(), stream(4)
    batch.reward[1, 2, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="params/"):
        learner.meta_update(double(learner.init([1, 2])), None, [batch])


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ConfigError, match="asks to find one"):
        TdLambda(TdLambdaConfig(), Spec(3, 2, discrete=True, horizon=5)).init([1])
    with pytest.raises(ConfigError, match=r"hidden must be \(\)"):
        TdLambdaConfig(hidden=(4,))
    with pytest.raises(ConfigError, match=r"^trace_decay "):
        TdLambdaConfig(trace_decay=1.5)
