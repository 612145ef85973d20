"""Networks of one gated recurrent unit against its equations, written out step by step."""

import pytest
import torch

from learners.core.gru import GruNetwork, GruPolicy
from learners.core.trajectory import Spec

DISCRETE = Spec(obs_size=4, action_size=3, discrete=True, horizon=6)
CONTINUOUS = Spec(obs_size=4, action_size=2, discrete=False, horizon=6)


def shared(params, seed=1):
    """With axis 1, in double precision, no bias at 0."""
    generator = torch.Generator().manual_seed(seed)
    moved = {n: p + 0.2 * torch.randn(p.shape, generator=generator) for n, p in params.items()}
    return {name: p.double().unsqueeze(0) for name, p in moved.items()}


def written_out(params, inputs):
    """[T, I] of one sequence → [T, out]."""
    p = {name: entry[0] for name, entry in params.items()}
    width = p["cell.hidden.weight"].shape[1]
    hidden, outputs = torch.zeros(width, dtype=inputs.dtype), []
    for x in inputs:
        below = p["cell.input.weight"] @ x + p["cell.input.bias"]
        across = p["cell.hidden.weight"] @ hidden + p["cell.hidden.bias"]
        reset, update = (
            torch.sigmoid(below[k * width : (k + 1) * width] + across[k * width : (k + 1) * width])
            for k in range(2)
        )
        new = torch.tanh(below[2 * width :] + reset * across[2 * width :])
        hidden = (1.0 - update) * new + update * hidden
        outputs.append(hidden @ p["head.layer0.weight"] + p["head.layer0.bias"])
    return torch.stack(outputs)


@pytest.fixture
def network():
    return GruNetwork(num_inputs=4, width=5, num_outputs=3)


def test_sequences_follow_the_equations(network):
    params = shared(network.init(torch.Generator().manual_seed(0)))
    inputs = torch.randn(6, 7, 4, dtype=torch.float64)
    found = network(params, inputs)
    for row in range(7):
        torch.testing.assert_close(found[:, row], written_out(params, inputs[:, row]))


def test_step_by_step_is_the_whole_sequence(network):
    params = shared(network.init(torch.Generator().manual_seed(0)))
    inputs = torch.randn(6, 7, 4, dtype=torch.float64)
    step = network.stepping(params)
    torch.testing.assert_close(torch.stack([step(x) for x in inputs]), network(params, inputs))


def test_every_function_of_steps_begins_at_zero(network):
    params = shared(network.init(torch.Generator().manual_seed(0)))
    first = torch.randn(7, 4, dtype=torch.float64)
    step = network.stepping(params)
    begun = step(first)
    assert not torch.allclose(step(first), begun)
    torch.testing.assert_close(network.stepping(params)(first), begun)


def test_gradient_reaches_every_entry_and_the_first_input(network):
    params = shared(network.init(torch.Generator().manual_seed(0)))
    for p in params.values():
        p.requires_grad_()
    inputs = torch.randn(6, 7, 4, dtype=torch.float64, requires_grad=True)
    last = network(params, inputs)[-1]
    *grads, by_inputs = torch.autograd.grad(last.square().sum(), [*params.values(), inputs])
    assert all(bool((grad != 0).any()) for grad in grads)
    assert bool((by_inputs[0] != 0).all())


def test_each_gate_begins_orthogonal(network):
    params = network.init(torch.Generator().manual_seed(0))
    for block in params["cell.hidden.weight"].split(5):
        torch.testing.assert_close(block @ block.T, torch.eye(5))
    for block in params["cell.input.weight"].split(5):
        torch.testing.assert_close(block.T @ block, torch.eye(4))
    assert all(not p.any() for name, p in params.items() if "bias" in name)


@pytest.mark.parametrize("spec", [DISCRETE, CONTINUOUS])
def test_acting_remembers_and_says_what_the_distribution_of_the_sequence_says(spec):
    """Three members in two environments: as six sequences, whose actions follow one noise."""
    policy = GruPolicy(spec, width=5, init_std=0.5)
    params = shared(policy.init(torch.Generator().manual_seed(0)))
    assert {n: p.shape[1:] for n, p in params.items()} == {
        n: p.shape for n, p in policy.template().items()
    }
    obs = torch.randn(6, 3, 2, 4, dtype=torch.float64)
    noise = torch.stack(
        [policy.noise((3, 2), torch.Generator().manual_seed(t)).double() for t in range(6)]
    )
    act = policy.acting(params)
    actions, outputs = zip(*(act(o, n) for o, n in zip(obs, noise, strict=True)), strict=True)
    whole = policy.distribution(params, obs.flatten(1, 2))
    flat = torch.stack(actions).flatten(1, 2)
    torch.testing.assert_close(flat, whole.sample(noise.flatten(1, 2)))
    told = policy.from_outputs(params, torch.stack(outputs).flatten(1, 2))
    torch.testing.assert_close(told.log_prob(flat), whole.log_prob(flat))


def test_a_new_policy_is_nearly_uniform():
    policy = GruPolicy(DISCRETE, width=16)
    params = {n: p.unsqueeze(0) for n, p in policy.init(torch.Generator().manual_seed(3)).items()}
    dist = policy.distribution(params, torch.randn(6, 9, 4))
    assert bool((dist.logits.exp() - 1.0 / 3.0).abs().max() < 0.02)
