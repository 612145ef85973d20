"""The networks of a learned reward: derivatives by hand against autograd."""

import pytest
import torch

from learners.core.actor_critic import stack
from learners.core.intrinsic import IntrinsicReward
from tests.learners.core.test_actor_critic import SPECS, networks_and_data, normal


@pytest.mark.parametrize("name", SPECS)
def test_derivatives_by_hand_equal_autograd(name):
    networks, _, obs, action = networks_and_data(name)
    intrinsic, spec = IntrinsicReward(networks), SPECS[name]
    generator = torch.Generator().manual_seed(5)
    eta = stack([intrinsic.init(generator) for _ in range(len(obs))])
    noise = 0.05 if spec.image else 0.4
    eta = {n: p.double() + noise * normal(*p.shape, seed=6) for n, p in eta.items()}
    seen = intrinsic.seen(obs, action)
    cotangent = normal(*obs.shape[:2], seed=7)

    reward, pullback = torch.func.vjp(lambda p: intrinsic.reward(p, seen, action), eta)
    rewarding = intrinsic.rewarding(eta, seen)
    own = intrinsic.read_out(rewarding.outputs, action)
    torch.testing.assert_close(own, reward, rtol=1e-10, atol=1e-12)
    by_outputs = intrinsic.read_out_pullback(cotangent, own, action)
    check(rewarding.pullback(by_outputs)[0], pullback(cotangent)[0])

    value, pullback = torch.func.vjp(lambda p: intrinsic.value(p, obs), eta)
    valuing = intrinsic.valuing(eta, obs)
    torch.testing.assert_close(valuing.outputs.squeeze(-1), value, rtol=1e-10, atol=1e-12)
    check(valuing.pullback(cotangent.unsqueeze(-1))[0], pullback(cotangent)[0])


def check(grads, expected):
    """Entries that a network does not have are zero in autograd's."""
    assert grads.keys() == {name for name, slope in expected.items() if (slope != 0.0).any()}
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-11)
