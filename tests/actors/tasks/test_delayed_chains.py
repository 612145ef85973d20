import numpy as np
import pytest
import torch

from actors.tasks.delayed_chains import CHAINS
from learners.core.trajectory import Spec, World


class SingleChain:
    """One environment in plain Python, which is handed its coins."""

    def __init__(self, name, length, rewarded):
        self.longest = 50 if "long" in name else 30
        self.noisy, self.shows_bits = name.endswith("noisy"), name == "chain-distractor"
        self.length, self.rewarded = length, rewarded

    def reset(self, bits):
        self.actions = []
        return self.seen(bits)

    def step(self, action, coin, bits):
        self.actions.append(action)
        reward, ended = 0.0, False
        if len(self.actions) == self.length:
            reward, ended = (1.0 if self.actions[0] == self.rewarded else -1.0), True
        elif self.noisy and len(self.actions) > 1:
            reward = 1.0 if coin else -1.0
        return self.seen(bits), reward, ended

    def seen(self, bits):
        begins = not self.actions
        if self.shows_bits:
            right = not begins and self.actions[0] == self.rewarded
            return [i if bit else -1 for i, bit in enumerate([right, begins, *bits])]
        if begins:
            return [0]
        branches = [list(range(1 + a * self.longest, 1 + (a + 1) * self.longest)) for a in (0, 1)]
        return [branches[self.actions[0]][len(self.actions) - 1]]


def spec_of(chain, spare=0):
    return Spec(1 + chain.world("").num_indices + spare, 2, discrete=True, horizon=1)


def started(name, num_envs, seed=0, spare=0):
    env = CHAINS[name].make(num_envs, spec_of(CHAINS[name], spare), "cpu")
    tasks = [{"level": i, "num_actions": 2} for i in range(num_envs)]
    obs, _ = env.reset(seed=seed, options={"tasks": tasks})
    return env, obs


@pytest.mark.parametrize("name", CHAINS)
def test_batch_equals_single_environments(name):
    n, chain = 16, CHAINS[name]
    env, obs = started(name, n, seed=3, spare=2)
    singles = [SingleChain(name, *chain.level(i)) for i in range(n)]
    generator = torch.Generator().manual_seed(3)

    def coins(*shape):
        return (torch.rand(shape, generator=generator) < 0.5).numpy()

    def bits():
        return coins(n, 20) if chain.distractors else [()] * n

    def check(i, seen):
        assert obs[i].tolist() == [2, *seen, -1, -1]

    for i, shown in enumerate(bits()):
        check(i, singles[i].reset(shown))
    ended, rewards = [False] * n, []
    rng = np.random.default_rng(1)
    for _ in range(300):
        action = rng.integers(2, size=n)
        obs, reward, terminated, truncated, info = env.step(torch.from_numpy(action))
        assert not truncated.any()
        assert info == {}
        noise = coins(n) if chain.noisy else [False] * n
        for i, shown in enumerate(bits()):
            if ended[i]:
                assert reward[i] == 0
            else:
                seen, expected, ended[i] = singles[i].step(int(action[i]), noise[i], shown)
                check(i, seen)
                assert reward[i].item() == expected
                rewards.append((expected, ended[i]))
            assert bool(terminated[i]) == ended[i]
        mask = rng.random(n) < np.where(ended, 0.6, 0.01)
        obs, _ = env.reset(options={"reset_mask": mask})
        for i, shown in enumerate(bits()):
            if mask[i]:
                check(i, singles[i].reset(shown))
                ended[i] = False
    assert {(1.0, True), (-1.0, True)} <= set(rewards)
    middle = {reward for reward, over in rewards if not over}
    assert middle == ({-1.0, 0.0, 1.0} if chain.noisy else {0.0})


@pytest.mark.parametrize("name", CHAINS)
def test_lifetimes_differ_in_length_and_rewarded_action(name):
    longest = 50 if "long" in name else 30
    assert CHAINS[name].longest == longest
    levels = [CHAINS[name].level(seed) for seed in range(2000)]
    lengths, rewarded = zip(*levels, strict=True)
    assert levels[7] == CHAINS[name].level(7)
    counts = np.bincount(lengths)
    assert np.flatnonzero(counts).tolist() == list(range(5, longest + 1))
    expected = 2000 / (longest - 4)
    assert abs(counts[5:] - expected).max() < 5 * expected**0.5
    assert sum(rewarded) == pytest.approx(1000, abs=100)


def test_what_policies_are_told():
    assert CHAINS["chain-short"].world("a") == World("a", 1, 61, tabular=True)
    assert CHAINS["chain-long-noisy"].world("a") == World("a", 1, 101, tabular=True)
    assert CHAINS["chain-distractor"].world("a") == World("a", 22, 22, tabular=False)


def test_noise_and_distractors_are_fair_coins():
    env, _ = started("chain-short-noisy", 4000)
    env.step(torch.zeros(4000, dtype=torch.int64))
    _, reward, *_ = env.step(torch.zeros(4000, dtype=torch.int64))
    assert reward.abs().unique().tolist() == [1.0]
    assert reward.mean().abs() < 0.07
    _, obs = started("chain-distractor", 4000)
    shown = (obs[:, 3:] >= 0).double().mean(0)
    assert len(shown) == 20
    assert (shown - 0.5).abs().max() < 0.04


def test_actions_beyond_the_two_begin_again():
    env, _ = started("chain-short", 4)
    obs, *_ = env.step(torch.tensor([0, 1, 16, 17]))
    assert obs.tolist() == [[2, 1], [2, 31], [2, 1], [2, 31]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", CHAINS)
def test_cuda_equals_cpu(name, monkeypatch):
    chain = CHAINS[name]
    envs = [chain.make(16, spec_of(chain), device) for device in ("cpu", "cuda")]
    tasks = [{"level": i, "num_actions": 2} for i in range(16)]
    for env in envs:
        # Their generators draw other coins.
        generator = torch.Generator().manual_seed(0)

        def coins(*shape, env=env, generator=generator):
            return (torch.rand(shape, generator=generator) < 0.5).to(env.device)

        monkeypatch.setattr(env, "_coins", coins)
        env.reset(options={"tasks": tasks})
    for action in torch.randint(2, (60, 16), generator=torch.Generator().manual_seed(0)):
        left, right = (env.step(action.to(env.device)) for env in envs)
        for a, b in zip(left[:4], right[:4], strict=True):
            assert torch.equal(a, b.cpu())
        left, right = (env.reset(options={"reset_mask": left[2].numpy()})[0] for env in envs)
        assert torch.equal(left, right.cpu())
