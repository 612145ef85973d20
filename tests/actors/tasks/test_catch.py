import numpy as np
import pytest
import torch

from actors.tasks.catch import Catch, CatchEnv


class SingleCatch:
    """The game written for one board, in the order of bsuite's."""

    def __init__(self, rows, columns):
        self.rows, self.columns = rows, columns

    def reset(self, ball_column):
        self.ball = [0, ball_column]
        self.paddle = self.columns // 2
        return self.board()

    def step(self, action):
        self.paddle += [-1, 0, 1][action]
        if self.paddle < 0:
            self.paddle = 0
        if self.paddle >= self.columns:
            self.paddle = self.columns - 1
        self.ball[0] += 1
        if self.ball[0] < self.rows - 1:
            return self.board(), 0.0, False
        return self.board(), 1.0 if self.ball[1] == self.paddle else -1.0, True

    def board(self):
        cells = [[0.0] * self.columns for _ in range(self.rows)]
        cells[self.ball[0]][self.ball[1]] = 1.0
        cells[self.rows - 1][self.paddle] = 1.0
        return np.reshape(cells, -1)


def started(family, num_envs, seed=0):
    env = family.make(num_envs)
    obs, _ = env.reset(seed=seed, options={"tasks": [{}] * num_envs})
    return env, obs


def ball_columns(family, obs):
    return obs.view(-1, family.rows, family.columns)[:, 0].argmax(1)


@pytest.mark.parametrize("size", [(6, 11), (4, 3), (2, 5)])
def test_batch_equals_single_environments(size):
    family = Catch(*size)
    singles = [SingleCatch(*size) for _ in range(8)]
    env, obs = started(family, 8, seed=3)
    generator = torch.Generator().manual_seed(3)

    def draws():
        return torch.randint(family.columns, (8,), generator=generator).tolist()

    for single, start, column in zip(singles, obs, draws(), strict=True):
        np.testing.assert_array_equal(start, single.reset(column))
    ended, rewards = [False] * 8, []
    rng = np.random.default_rng(1)
    for _ in range(150):
        action = rng.integers(3, size=8)
        obs, reward, terminated, truncated, info = env.step(torch.from_numpy(action))
        assert not truncated.any()
        assert info == {}
        for i, single in enumerate(singles):
            if ended[i]:
                assert terminated[i]
                assert reward[i] == 0
                continue
            board, expected, ended[i] = single.step(action[i])
            np.testing.assert_array_equal(obs[i], board)
            assert reward[i].item() == expected
            assert bool(terminated[i]) == ended[i]
            rewards.append(expected)
        # Some that have ended go on as they are, and some are started before their end.
        mask = rng.random(8) < np.where(ended, 0.6, 0.05)
        obs, _ = env.reset(options={"reset_mask": mask})
        for i, column in enumerate(draws()):
            if mask[i]:
                np.testing.assert_array_equal(obs[i], singles[i].reset(column))
                ended[i] = False
    assert {-1.0, 1.0} <= set(rewards) <= {-1.0, 0.0, 1.0}


def test_the_published_board():
    spec = Catch().spec
    assert (spec.obs_size, spec.action_size, spec.discrete, spec.horizon) == (66, 3, True, 5)
    assert spec.target_policy is None
    _, obs = started(Catch(), 2)
    paddle = obs.view(2, 6, 11)[:, -1]
    assert paddle.argmax(1).tolist() == [5, 5]
    assert obs.sum(1).tolist() == [2.0, 2.0]


def test_the_balls_column_is_uniform():
    family = Catch()
    _, obs = started(family, 11000)
    counts = torch.bincount(ball_columns(family, obs), minlength=11)
    assert counts.min() > 880
    assert counts.max() < 1120


def test_going_to_the_ball_always_catches_it_and_standing_still_seldom():
    family = Catch()
    env, obs = started(family, 5500)
    ball = ball_columns(family, obs)
    assert ball.unique().tolist() == list(range(11))
    for t in range(5):
        paddle = obs.view(-1, 6, 11)[:, -1].argmax(1)
        obs, reward, terminated, *_ = env.step((ball - paddle).sign() + 1)
        assert terminated.all() == (t == 4)
        assert reward.unique().tolist() == ([1.0] if t == 4 else [0.0])
    obs, _ = env.reset()
    ball = ball_columns(family, obs)
    for _ in range(5):
        _, reward, *_ = env.step(torch.ones(5500, dtype=torch.int64))
    assert torch.equal(reward, torch.where(ball == 5, 1.0, -1.0))


def test_walls_stop_the_paddle():
    env, _ = started(Catch(rows=9, columns=5), 2)
    columns = []
    for action in ([0, 2],) * 4 + ([2, 0],):
        obs = env.step(torch.tensor(action))[0]
        columns.append(obs.view(2, 9, 5)[:, -1].argmax(1).tolist())
    assert columns == [[1, 3], [0, 4], [0, 4], [0, 4], [1, 3]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_equals_cpu():
    family = Catch()
    envs = [CatchEnv(family, 8, device) for device in ("cpu", "cuda")]
    for env in envs:
        env.reset(seed=0, options={"tasks": [{}] * 8})
    # Their generators draw other columns.
    envs[1].arrays()["ball"].copy_(envs[0].arrays()["ball"])
    for seed in range(6):
        action = torch.randint(3, (8,), generator=torch.Generator().manual_seed(seed))
        left, right = (env.step(action.to(env.device)) for env in envs)
        for a, b in zip(left[:4], right[:4], strict=True):
            assert torch.equal(a, b.cpu())
