"""Perceptrons with one set of parameters per member."""

import math

import pytest
import torch
from torch.nn import functional

from learners.core.networks import (
    FAST_TANH_SIZE,
    Pass,
    Tanh,
    convolve,
    features,
    frames,
    head,
    init_cnn,
    init_mlp,
    mlp,
    perceptron,
    pixel_trunk,
    tanh,
    tanh_,
)


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


# --- The fast hyperbolic tangent ---


def test_fast_tanh_is_torch_s_to_within_2e_7():
    x = torch.cat([random_inputs(500_000) * 3.0, torch.linspace(-100.0, 100.0, 200_001)])
    assert (Tanh.apply(x).double() - torch.tanh(x.double())).abs().max() < 2e-7
    assert Tanh.apply(torch.tensor([-1e30, 0.0, 1e30])).tolist() == [-1.0, 0.0, 1.0]


def test_fast_tanh_has_torch_s_first_and_second_derivative():
    x = torch.cat([random_inputs(1000), torch.tensor([0.0, 50.0, -50.0])]).double()
    x.requires_grad_()
    assert torch.autograd.gradcheck(Tanh.apply, x[:20])
    assert torch.autograd.gradgradcheck(Tanh.apply, x[:20])
    derivatives = []
    for function in (Tanh.apply, torch.tanh):
        (first,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        derivatives.append((first.detach(), second))
    for own, expected in zip(*derivatives, strict=True):
        assert own.isfinite().all()
        torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-14)


def test_members_with_many_entries_use_the_fast_tanh():
    """The choice is by one member's size, so that it does not depend on how many there are."""
    few, many = random_inputs(3, FAST_TANH_SIZE - 1), random_inputs(3, FAST_TANH_SIZE)
    assert torch.equal(tanh(few), torch.tanh(few))
    assert torch.equal(tanh(many), Tanh.apply(many))
    assert torch.equal(tanh(many.double()), torch.tanh(many.double()))
    assert not torch.equal(tanh(many), torch.tanh(many))
    assert torch.equal(tanh(many[:1]), tanh(many)[:1])
    assert torch.equal(tanh_(few.clone()), Tanh.apply(few))
    assert torch.equal(tanh_(few.double()), torch.tanh(few.double()))


# --- Derivatives by hand ---


def direction(params, seed: int = 5):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=generator).to(p.dtype) for n, p in params.items()}


@pytest.mark.parametrize("moving_inputs", [False, True])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("sizes", [[3, 2], [3, 5, 1], [3, 6, 4, 2]])
def test_pass_through_a_perceptron_equals_autograd(sizes, activation, moving_inputs):
    params = stacked(2, sizes, torch.float64)
    inputs = random_inputs(2, 9, 3, dtype=torch.float64)
    passed = Pass.through(perceptron("", len(sizes) - 1, activation), params, inputs)
    along, cotangent = direction(params), random_inputs(*passed.outputs.shape).double()

    def outputs(p, x):
        return mlp(p, x, activation)

    input_along = random_inputs(2, 9, 3, dtype=torch.float64).flip(1) if moving_inputs else None
    given = torch.zeros_like(inputs) if input_along is None else input_along
    value, tangent = torch.func.jvp(outputs, (params, inputs), (along, given))
    assert torch.equal(passed.inputs, inputs)
    torch.testing.assert_close(passed.outputs, value, rtol=1e-12, atol=1e-14)
    moved = passed.tangent(along, input_along)
    torch.testing.assert_close(moved, tangent, rtol=1e-10, atol=1e-12)
    assert (moved != 0.0).all()

    grads, by_inputs = passed.pullback(cotangent, to_inputs=True)
    expected, expected_by_inputs = torch.func.vjp(outputs, params, inputs)[1](cotangent)
    assert grads.keys() == expected.keys()
    for name, grad in (grads | {"": by_inputs}).items():
        other = expected[name] if name else expected_by_inputs
        torch.testing.assert_close(grad, other, rtol=1e-10, atol=1e-12)
    for name, grad in passed.pullback(cotangent)[0].items():
        assert torch.equal(grad, grads[name])


@pytest.mark.parametrize("num_rows", [64, 2048])
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("num_outputs", [1, 3])
def test_a_member_s_pass_does_not_depend_on_the_others_bitwise(num_rows, num_threads, num_outputs):
    """Value and both derivatives, float32, sizes of a real policy."""
    params = stacked(5, [14, 64, 64, num_outputs])
    along, layers = direction(params), perceptron("", 3, "tanh")
    inputs, cotangent = random_inputs(5, num_rows, 14), random_inputs(5, num_rows, num_outputs)

    def results(members: slice):
        own, own_along = ({n: p[members] for n, p in g.items()} for g in (params, along))
        passed = Pass.through(layers, own, inputs[members])
        grads, _ = passed.pullback(cotangent[members])
        return [passed.outputs, passed.tangent(own_along), *grads.values()]

    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        together = results(slice(None))
        for members in (slice(0, 1), slice(3, 4), slice(1, 3), slice(1, 5)):
            for alone, whole in zip(results(members), together, strict=True):
                assert torch.equal(alone, whole[members])
    finally:
        torch.set_num_threads(before)


def test_a_pass_leaves_its_inputs_alone():
    params, inputs = stacked(2, [3, 6, 2]), random_inputs(2, 9, 3)
    cotangent, before = random_inputs(2, 9, 2), [inputs.clone(), random_inputs(2, 9, 2)]
    passed = Pass.through(perceptron("", 2, "tanh"), params, inputs)
    values = [value.clone() for value in passed.values]
    passed.pullback(cotangent, to_inputs=True)
    passed.tangent(direction(params), inputs)
    assert torch.equal(inputs, before[0])
    assert torch.equal(cotangent, before[1])
    assert all(map(torch.equal, passed.values, values))


def cnn(image=(2, 36, 36), num_outputs: int = 3, dtype=torch.float32):
    params = init_cnn(image, num_outputs, torch.Generator().manual_seed(0), 1.0)
    return {n: (p + 0.01 * random_inputs(*p.shape)).to(dtype)[None] for n, p in params.items()}


def pixels(num_frames: int, image) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    size = (1, num_frames, math.prod(image))
    return torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)


def test_pass_through_the_layers_of_pixels_equals_autograd():
    image = (2, 36, 36)
    params, obs = cnn(image, dtype=torch.float64), pixels(3, image)
    trunk = pixel_trunk("")

    def outputs(p):
        return features(p, convolve(p, obs, image), "relu")

    own = {n: p for n, p in params.items() if not n.startswith("layer1")}
    passed = Pass.through(trunk, own, frames(obs, image, torch.float64))
    along, cotangent = direction(own), random_inputs(*passed.outputs.shape).double()
    value, tangent = torch.func.jvp(lambda p: outputs(params | p), (own,), (along,))
    torch.testing.assert_close(passed.outputs, value, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(passed.tangent(along), tangent, rtol=1e-10, atol=1e-12)
    assert 0.1 < (tangent == 0.0).double().mean() < 0.9
    (expected,) = torch.func.vjp(lambda p: outputs(params | p), own)[1](cotangent)
    grads, _ = passed.pullback(cotangent)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-12)
        assert (grad != 0.0).any()


# --- Pixels, and orthogonal weights ---


@pytest.mark.parametrize(("image", "num_features"), [((4, 84, 84), 3136), ((2, 36, 44), 128)])
def test_convolutions_are_those_of_mnih_et_al(image, num_features):
    params, obs = cnn(image), pixels(3, image)
    shapes = [tuple(params[f"conv{layer}.weight"].shape[1:]) for layer in range(3)]
    assert shapes == [(32, image[0], 8, 8), (64, 32, 4, 4), (64, 64, 3, 3)]
    assert params["layer0.weight"].shape == (1, num_features, 512)
    assert params["layer1.weight"].shape == (1, 512, 3)
    hidden = obs[0].float().view(-1, *image) / 255.0
    for layer, stride in enumerate((4, 2, 1)):
        weight, bias = params[f"conv{layer}.weight"][0], params[f"conv{layer}.bias"][0]
        hidden = functional.relu(functional.conv2d(hidden, weight, bias, stride=stride))
    computed = convolve(params, obs, image)
    assert computed.shape == (1, 3, num_features)
    torch.testing.assert_close(computed[0], hidden.reshape(3, -1))
    assert mlp(params, computed, "relu").shape == (1, 3, 3)


def test_a_head_with_one_output_is_the_general_formula():
    params = stacked(3, [3, 6, 1], torch.float64)
    hidden = random_inputs(3, 9, 6, dtype=torch.float64)
    expected = torch.baddbmm(params["layer1.bias"].unsqueeze(1), hidden, params["layer1.weight"])
    torch.testing.assert_close(head(params, hidden), expected, rtol=1e-12, atol=1e-12)


def test_orthogonal_weights_have_their_gain():
    params = init_mlp([7, 12, 4], torch.Generator().manual_seed(0), "orthogonal", head_gain=0.01)
    first, last = params["layer0.weight"], params["layer1.weight"]
    torch.testing.assert_close(first @ first.T, 2.0 * torch.eye(7), rtol=0, atol=1e-5)
    torch.testing.assert_close(last.T @ last, 1e-4 * torch.eye(4), rtol=0, atol=1e-9)
    assert (params["layer0.bias"] == 0.0).all()
    image = init_cnn((2, 36, 36), 3, torch.Generator().manual_seed(0), 0.01)
    kernel, last = image["conv0.weight"].flatten(1), image["layer1.weight"]
    torch.testing.assert_close(kernel @ kernel.T, 2.0 * torch.eye(32), rtol=0, atol=1e-5)
    torch.testing.assert_close(last.T @ last, 1e-4 * torch.eye(3), rtol=0, atol=1e-9)
