"""The backward LSTM against torch's own cell, and what each target depends on."""

import pytest
import torch

from learners.core.recurrent import init_lstm, lstm_backward
from learners.core.target_network import TargetNetwork

WIDTH = 3


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def cells(num_inputs: int, num_members: int = 2):
    """Parameters of every member's cell, off every special value."""
    made = [
        init_lstm(num_inputs, WIDTH, torch.Generator().manual_seed(m)) for m in range(num_members)
    ]
    stacked = {n: torch.stack([p[n] for p in made]).double() for n in made[0]}
    return {n: p + 0.3 * normal(*p.shape, seed=5) for n, p in stacked.items()}


def test_every_member_runs_its_own_cell_from_the_last_step_to_the_first():
    params, inputs = cells(4), normal(2, 6, 3, 4, seed=1)
    ended = torch.zeros(2, 6, 3, dtype=torch.float64)
    ended[0, 2, 1] = ended[1, 5, 0] = ended[1, 0, 2] = ended[1, 1, 2] = 1.0
    found = lstm_backward(params, inputs, ended)
    for m in range(2):
        cell = torch.nn.LSTMCell(4, WIDTH, dtype=torch.float64)
        with torch.no_grad():
            cell.weight_ih.copy_(params["input.weight"][m].T)
            cell.weight_hh.copy_(params["hidden.weight"][m].T)
            cell.bias_ih.copy_(params["bias"][m])
            cell.bias_hh.zero_()
        for e in range(3):
            state = (torch.zeros(1, WIDTH).double(), torch.zeros(1, WIDTH).double())
            for t in reversed(range(6)):
                if ended[m, t, e]:
                    state = tuple(torch.zeros_like(part) for part in state)
                state = cell(inputs[m, t, e].unsqueeze(0), state)
                torch.testing.assert_close(found[m, t, e], state[0][0])


def test_derivatives_of_the_cell_equal_finite_differences():
    params, inputs = cells(2), normal(2, 3, 2, 2, seed=1).requires_grad_()
    ended = torch.zeros(2, 3, 2, dtype=torch.float64)
    ended[:, 1, 0] = 1.0
    names = list(params)
    flat = [params[name].requires_grad_() for name in names]

    def of_tensors(inputs, *tensors):
        return lstm_backward(dict(zip(names, tensors, strict=True)), inputs, ended)

    assert torch.autograd.gradcheck(of_tensors, [inputs, *flat])


def test_the_forget_gate_begins_open_and_the_target_near_zero():
    network = TargetNetwork(16)
    params = {n: p.unsqueeze(0) for n, p in network.init(torch.Generator()).items()}
    assert params["cell.bias"][0].tolist() == [0.0] * 16 + [1.0] * 16 + [0.0] * 32
    target = network(params, normal(1, 5, 7, 6).float(), torch.zeros(1, 5, 7))
    assert 0.0 < float(target.abs().max()) < 0.05


@pytest.mark.parametrize("sees_policies", [True, False])
def test_the_target_of_a_step_depends_on_the_rest_of_its_episode_alone(sees_policies):
    network = TargetNetwork(4, sees_policies)
    params = {n: p.unsqueeze(0) for n, p in network.init(torch.Generator()).items()}
    parts = [normal(1, 4, 1, seed=s).float().requires_grad_() for s in range(6)]
    inputs = network.gather(*parts)
    assert inputs.shape == (1, 4, 1, len(network.inputs))
    ended = torch.zeros(1, 4, 1)
    ended[0, 2, 0] = 1.0
    target = network(params, inputs, ended)
    for t, seen in enumerate([[0, 1, 2], [1, 2], [2], [3]]):
        grads = torch.autograd.grad(
            target[0, t, 0], parts, retain_graph=True, materialize_grads=True
        )
        for number, grad in enumerate(grads):
            used = number < 4 or sees_policies
            expected = [step in seen and used for step in range(4)]
            assert (grad[0, :, 0] != 0.0).tolist() == expected


def test_densities_are_bounded():
    network, ones = TargetNetwork(2), torch.ones(1, 1, 1)
    inputs = network.gather(ones, ones, ones, ones, 5.0 * ones, -2.0 * ones)
    assert inputs.flatten().tolist() == pytest.approx([1.0, 1.0, 1.0, 1.0, 10.0, 0.1353353])
