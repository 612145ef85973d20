"""Networks on indices against products with vectors of zeros and ones, and against perceptrons."""

import pytest
import torch
from torch.nn import functional

from learners.core.index_network import IndexNetwork
from learners.core.params import gradients, leaves
from learners.core.trajectory import World

TABLE = World("table", num_indices=1, num_features=6, tabular=True)
BITS = World("bits", num_indices=4, num_features=7, tabular=False)
PIXELS = World("pixels", num_indices=4, num_features=24, tabular=False, grid=(3, 4))
FLOATS = World("floats", num_indices=0, num_features=5, tabular=False)
NUM_MEMBERS, NUM_OBS, NUM_OUTPUTS = 3, 11, 2


def network_of(world, hidden=(5, 4)):
    return IndexNetwork(world, hidden, NUM_OUTPUTS)


def params_of(network, seed=0):
    """Other parameters for every member in float64, biases off zero, outputs of order one."""
    generator = torch.Generator().manual_seed(seed)
    template = network.init(torch.Generator())
    return {
        name: torch.randn(NUM_MEMBERS, *p.shape, generator=generator, dtype=torch.float64)
        for name, p in template.items()
    }


def observations(world, seed=0, num_absent=2):
    """[M, N, O]: a number of actions, F indices of which some are absent, and padding."""
    generator = torch.Generator().manual_seed(seed)
    shape = (NUM_MEMBERS, NUM_OBS)
    if not world.num_indices:
        return torch.randn(*shape, world.num_features, generator=generator, dtype=torch.float64)
    obs = torch.full((*shape, 1 + world.num_indices + 2), -1)
    obs[..., 0] = 3
    drawn = torch.rand(*shape, world.num_features, generator=generator).argsort(-1)
    obs[..., 1 : 1 + world.num_indices] = drawn[..., : world.num_indices]
    if not world.tabular:
        for n in range(NUM_OBS):
            obs[:, n, 1 : 1 + n % (num_absent + 1)] = -1
    return obs


def one_hot(world, obs):
    """The features as zeros and ones, [M, N, S], one entry after the other."""
    features = torch.zeros(NUM_MEMBERS, NUM_OBS, world.num_features, dtype=torch.float64)
    for m in range(NUM_MEMBERS):
        for n in range(NUM_OBS):
            for index in obs[m, n, 1 : 1 + world.num_indices].tolist():
                if index >= 0:
                    features[m, n, index] += 1.0
    return features


def layer_by_layer(network, params, features):
    """Linear layers with ReLU between them, one member after the other."""
    outputs = []
    for m in range(NUM_MEMBERS):
        hidden = features[m]
        for layer in range(len(network.widths)):
            hidden = functional.relu(hidden) if layer else hidden
            bias = params.get(f"layer{layer}.bias")
            weight = params[f"layer{layer}.weight"][m].T
            hidden = functional.linear(hidden, weight, None if bias is None else bias[m])
        outputs.append(hidden)
    return torch.stack(outputs)


@pytest.mark.parametrize("world", [TABLE, BITS], ids=lambda world: world.name)
def test_rows_are_products_with_zeros_and_ones(world):
    table = params_of(network_of(world))["layer0.weight"]
    obs = observations(world)
    found = network_of(world).rows(table, obs)
    torch.testing.assert_close(found, one_hot(world, obs) @ table, rtol=1e-12, atol=1e-12)


def test_absent_indices_count_nothing():
    """Neither their row nor any other's: with none left there is only the bias."""
    network = network_of(BITS)
    params, obs = params_of(network), observations(BITS)
    gone = obs.clone()
    gone[..., 2:] = -1
    present = gone[..., 1] >= 0
    assert present.any()
    assert not present.all()
    rows = network.rows(params["layer0.weight"], gone)
    assert not rows[~present].any()
    m, n = present.nonzero()[0].tolist()
    row = params["layer0.weight"][m, gone[m, n, 1]]
    torch.testing.assert_close(rows[m, n], row, rtol=0.0, atol=0.0)
    table = leaves({"w": params["layer0.weight"]})
    slope = gradients(network.rows(table["w"], gone).sum(), table)["w"]
    assert float(slope.sum()) == float(present.sum()) * network.widths[0]


def test_padding_behind_a_worlds_own_indices_counts_nothing():
    """In a population the observation is as long as the longest of any world."""
    for world in (TABLE, BITS):
        network, obs = network_of(world), observations(world)
        params = params_of(network)
        padded = obs.clone()
        padded[..., 1 + world.num_indices :] = 2
        torch.testing.assert_close(network(params, padded), network(params, obs), rtol=0, atol=0)
        short = obs[..., : 1 + world.num_indices]
        torch.testing.assert_close(network(params, short), network(params, obs), rtol=0, atol=0)


@pytest.mark.parametrize("hidden", [(), (5,), (5, 4)])
@pytest.mark.parametrize("world", [TABLE, BITS, FLOATS], ids=lambda world: world.name)
def test_outputs_are_those_of_linear_layers(world, hidden):
    network = network_of(world, hidden)
    params, obs = params_of(network), observations(world)
    features = one_hot(world, obs) if world.num_indices else obs
    found = network(params, obs)
    assert found.shape == (NUM_MEMBERS, NUM_OBS, NUM_OUTPUTS)
    expected = layer_by_layer(network, params, features)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("hidden", [(), (5, 4)])
def test_a_convolution_sees_the_image_that_the_indices_make(hidden):
    network = IndexNetwork(PIXELS, hidden, NUM_OUTPUTS, channels=3)
    params, obs = params_of(network), observations(PIXELS)
    assert params["conv.weight"].shape == (NUM_MEMBERS, 3, 2, 3, 3)
    images = one_hot(PIXELS, obs).view(NUM_MEMBERS, NUM_OBS, 2, 3, 4)
    seen = [
        functional.conv2d(images[m], params["conv.weight"][m], params["conv.bias"][m], padding=1)
        for m in range(NUM_MEMBERS)
    ]
    features = functional.relu(torch.stack(seen)).flatten(2)
    expected = layer_by_layer(network, params, features)
    torch.testing.assert_close(network(params, obs), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("world", [TABLE, BITS, FLOATS], ids=lambda world: world.name)
def test_where_there_are_no_pixels_channels_have_no_effect(world):
    plain, other = network_of(world), IndexNetwork(world, (5, 4), NUM_OUTPUTS, channels=3)
    first, again = (n.init(torch.Generator().manual_seed(0)) for n in (plain, other))
    assert first.keys() == again.keys()
    params, obs = params_of(plain), observations(world)
    assert torch.equal(plain(params, obs), other(params, obs))


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("world", [TABLE, BITS, PIXELS, FLOATS], ids=lambda world: world.name)
def test_a_pullback_is_the_gradient(world, create_graph):
    network, obs = IndexNetwork(world, (5, 4), NUM_OUTPUTS, channels=3), observations(world)
    params = leaves(params_of(network))
    outputs = network(params, obs)
    cotangent = torch.randn(outputs.shape, dtype=torch.float64)
    expected = gradients((outputs * cotangent).sum(), params, retain_graph=True)
    found = network.pullback(params, obs, outputs, cotangent, create_graph=create_graph)
    assert found.keys() == expected.keys()
    for name, slope in expected.items():
        torch.testing.assert_close(found[name], slope, rtol=1e-12, atol=1e-12)
        assert slope.any(), name


def test_a_tables_pullback_adds_up_states_seen_twice():
    network = network_of(TABLE)
    obs = torch.full((NUM_MEMBERS, 4, 2), 3)
    obs[:, 0, 1] = torch.tensor([0, 1, 5])
    params = params_of(network)
    cotangent = torch.arange(4.0, dtype=torch.float64).view(1, 4, 1).expand(NUM_MEMBERS, 4, 2) + 1
    found = network.pullback(params, obs, network(params, obs), cotangent, create_graph=False)
    expected = torch.zeros(NUM_MEMBERS, 6, 2, dtype=torch.float64)
    for m, first in enumerate((0, 1, 5)):
        expected[m, first] += 1.0
        expected[m, 3] += 9.0
    assert torch.equal(found["layer0.weight"], expected)


@pytest.mark.parametrize("world", [TABLE, BITS], ids=lambda world: world.name)
def test_gradient_flows_through_a_pullback_to_the_cotangent(world):
    """⟨∂(pullback · V)/∂cotangent, D⟩ is the directional derivative of the outputs along V."""
    network, obs = network_of(world), observations(world)
    params = leaves(params_of(network))
    direction = params_of(network, seed=1)
    outputs = network(params, obs)
    cotangent = torch.randn(outputs.shape, dtype=torch.float64, requires_grad=True)
    pulled = network.pullback(params, obs, outputs, cotangent, create_graph=True)
    along = sum((pulled[name] * direction[name]).sum() for name in pulled)
    (found,) = torch.autograd.grad(along, cotangent)
    plain = {name: p.detach() for name, p in params.items()}
    step = 1e-6
    ends = [
        network({name: plain[name] + s * step * direction[name] for name in plain}, obs)
        for s in (1.0, -1.0)
    ]
    torch.testing.assert_close(found, (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("world", [TABLE, BITS, FLOATS], ids=lambda world: world.name)
def test_a_seed_is_all_that_the_first_parameters_depend_on(world):
    network = network_of(world)
    first, again, other = (network.init(torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert first.keys() == again.keys() == other.keys()
    for name, p in first.items():
        assert torch.equal(p, again[name]), name
        if name.endswith("weight"):
            assert not torch.equal(p, other[name]), name
        else:
            assert not p.any(), name
    assert any("bias" in name for name in first) != world.tabular


def test_first_weights_have_the_variance_of_what_is_active():
    """Layers but the last keep the size of what passes through; the last begins near zero."""
    network = IndexNetwork(World("wide", 16, 4000, tabular=False), (500,), 200)
    params = network.init(torch.Generator().manual_seed(0))
    assert float(params["layer0.weight"].std()) == pytest.approx(1 / 4, rel=0.01)
    assert float(params["layer1.weight"].std()) == pytest.approx(0.01 / 500**0.5, rel=0.01)
    floats = IndexNetwork(World("floats", 0, 400, tabular=False), (500,), 2)
    weight = floats.init(torch.Generator().manual_seed(0))["layer0.weight"]
    assert float(weight.std()) == pytest.approx(1 / 20, rel=0.01)
    table = IndexNetwork(TABLE, (500,), 3000).init(torch.Generator().manual_seed(0))
    assert list(table) == ["layer0.weight"]
    assert float(table["layer0.weight"].std()) == pytest.approx(0.01, rel=0.02)
