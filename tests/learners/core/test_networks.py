"""Perceptrons with one set of parameters per member."""

import pytest
import torch
from torch.nn import functional

from learners.core.networks import init_mlp, mlp


def stacked(num_members: int, sizes: list[int], dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Other parameters for every member, biases off zero."""
    generator = torch.Generator().manual_seed(0)
    each = [init_mlp(sizes, generator) for _ in range(num_members)]
    params = {name: torch.stack([one[name] for one in each]) for name in each[0]}
    for name, p in params.items():
        if name.endswith("bias"):
            p += torch.randn(p.shape, generator=generator)
    return {name: p.to(dtype) for name, p in params.items()}


def random_inputs(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("sizes", [[3, 2], [3, 5, 2], [3, 6, 4, 2]])
def test_mlp_equals_linear_layers_per_member(activation, sizes):
    params = stacked(4, sizes, torch.float64)
    inputs = random_inputs(4, 9, 3, dtype=torch.float64)
    outputs = mlp(params, inputs, activation)
    assert outputs.shape == (4, 9, 2)
    for m in range(4):
        hidden = inputs[m]
        for layer in range(len(sizes) - 1):
            if layer > 0:
                hidden = getattr(functional, activation)(hidden)
            weight, bias = params[f"layer{layer}.weight"], params[f"layer{layer}.bias"]
            hidden = functional.linear(hidden, weight[m].T, bias[m])
        torch.testing.assert_close(outputs[m], hidden, rtol=1e-12, atol=1e-12)


def test_other_entries_are_left_alone():
    params = stacked(2, [3, 4, 2])
    inputs = random_inputs(2, 5, 3)
    more = params | {"log_std": torch.ones(2, 2)}
    assert torch.equal(mlp(more, inputs, "tanh"), mlp(params, inputs, "tanh"))


def test_gradient_flows_to_parameters_and_inputs():
    params = stacked(2, [2, 3, 2], torch.float64)
    inputs = random_inputs(2, 4, 2, dtype=torch.float64)
    tensors = [t.requires_grad_() for t in (*params.values(), inputs)]

    def outputs(*values):
        return mlp(dict(zip(params, values[:-1], strict=True)), values[-1], "tanh")

    assert torch.autograd.gradcheck(outputs, tensors)
    assert torch.autograd.gradgradcheck(outputs, tensors)


@pytest.mark.parametrize("num_rows", [1, 2, 20, 400])
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "expanded"])
def test_a_member_s_result_does_not_depend_on_the_others_bitwise(num_rows, num_threads, shared):
    """Forward and backward, float32, sizes of a real policy."""
    params = stacked(1 if shared else 7, [20, 64, 64, 6])
    params = {name: p.expand(7, *p.shape[1:]) for name, p in params.items()}
    inputs = random_inputs(7, num_rows, 20)
    cotangent = random_inputs(7, num_rows, 6)

    def forward_and_backward(members: slice):
        theta = {n: p[members].detach().requires_grad_() for n, p in params.items()}
        outputs = mlp(theta, inputs[members], "tanh")
        grads = torch.autograd.grad(outputs, list(theta.values()), cotangent[members])
        return [outputs.detach(), *grads]

    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        together = forward_and_backward(slice(None))
        for members in (slice(0, 1), slice(3, 4), slice(0, 2), slice(2, 5), slice(1, 7)):
            for alone, whole in zip(forward_and_backward(members), together, strict=True):
                assert torch.equal(alone, whole[members])
    finally:
        torch.set_num_threads(before)


def test_init_is_xavier_uniform_with_zero_bias():
    params = init_mlp([300, 200, 5], torch.Generator().manual_seed(0))
    assert list(params) == ["layer0.weight", "layer0.bias", "layer1.weight", "layer1.bias"]
    for layer, (fan_in, fan_out) in enumerate([(300, 200), (200, 5)]):
        weight, bound = params[f"layer{layer}.weight"], (6.0 / (fan_in + fan_out)) ** 0.5
        assert weight.shape == (fan_in, fan_out)
        assert weight.abs().max() <= bound
        assert weight.max() > 0.97 * bound
        assert weight.min() < -0.97 * bound
        spread = float(weight.std()) / (bound / 3.0**0.5)
        assert spread == pytest.approx(1.0, abs=0.05)
        assert (params[f"layer{layer}.bias"] == 0.0).all()
