"""Named parameters as vectors and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learners.core.params import (
    detach,
    expand_members,
    flatten,
    flatten_members,
    global_norm,
    gradients,
    leaves,
    unflatten,
    unflatten_members,
)

PROFILE = settings.get_profile("learners")
SHAPES = st.dictionaries(
    st.text("abcxyz.019_", min_size=1, max_size=8),
    st.lists(st.integers(1, 4), max_size=3).map(tuple),
    min_size=1,
    max_size=6,
)


def random_params(shapes, *leading: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn((*leading, *shape), generator=generator) for n, shape in shapes.items()}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(
        one[n].shape == other[n].shape and torch.equal(one[n], other[n]) for n in one
    )


@PROFILE
@given(SHAPES)
def test_flatten_and_back(shapes):
    params = random_params(shapes)
    vector = flatten(params)
    assert vector.shape == (sum(p.numel() for p in params.values()),)
    assert same(unflatten(vector, params), params)
    assert torch.equal(flatten(unflatten(vector + 1.0, params)), vector + 1.0)


@PROFILE
@given(SHAPES, st.integers(1, 4))
def test_flatten_members_and_back(shapes, num_members):
    shapes = {name: shape or (1,) for name, shape in shapes.items()}
    like, stacked = random_params(shapes), random_params(shapes, num_members)
    matrix = flatten_members(stacked)
    assert matrix.shape == (num_members, sum(p.numel() for p in like.values()))
    assert same(unflatten_members(matrix, like), stacked)
    for m in range(num_members):
        assert torch.equal(matrix[m], flatten({n: p[m] for n, p in stacked.items()}))


def test_flatten_members_takes_an_entry_that_is_one_number():
    params = {"temperature": torch.tensor(0.5), "bias": torch.zeros(2)}
    matrix = flatten_members(expand_members(params, 3))
    assert same(unflatten_members(matrix, params), expand_members(params, 3))


@PROFILE
@given(SHAPES, st.randoms(use_true_random=False))
def test_order_of_insertion_does_not_matter(shapes, random):
    params = random_params(shapes)
    names = list(params)
    random.shuffle(names)
    turned = {name: params[name] for name in names}
    assert torch.equal(flatten(turned), flatten(params))
    assert same(unflatten(flatten(params), turned), params)


def test_flatten_follows_the_names():
    params = {"b": torch.tensor([3.0, 4.0]), "a": torch.tensor([[1.0], [2.0]])}
    assert flatten(params).tolist() == [1.0, 2.0, 3.0, 4.0]
    stacked = {"b": torch.tensor([[2.0], [4.0]]), "a": torch.tensor([[1.0], [3.0]])}
    assert flatten_members(stacked).tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_unflatten_takes_the_types_of_its_model_and_float32_survives_float64_bitwise():
    params = random_params({"a": (3,), "b": (2, 2)})
    back = unflatten(flatten(params).double(), params)
    assert same(back, params)
    assert all(p.dtype == torch.float32 for p in back.values())


@pytest.mark.parametrize("length", [6, 8])
def test_vector_of_the_wrong_length_is_refused(length):
    params = random_params({"a": (3,), "b": (2, 2)})
    with pytest.raises(RuntimeError):
        unflatten(torch.zeros(length), params)


def test_flatten_and_unflatten_pass_gradient():
    params = leaves(random_params({"a": (3,), "b": ()}))
    slopes = gradients(flatten(params).square().sum(), params)
    assert same(slopes, {n: 2.0 * p.detach() for n, p in params.items()})
    vector = torch.arange(4.0, requires_grad=True)
    (slope,) = torch.autograd.grad(unflatten(vector, params)["a"].square().sum(), [vector])
    assert slope.tolist() == [0.0, 2.0, 4.0, 0.0]


def test_expand_members_repeats_without_copying_and_adds_up_gradient():
    params = leaves(random_params({"a": (3,), "b": ()}))
    stacked = expand_members(params, 4)
    assert {n: tuple(p.shape) for n, p in stacked.items()} == {"a": (4, 3), "b": (4,)}
    assert stacked["a"].data_ptr() == params["a"].data_ptr()
    slopes = gradients(sum(p.sum() for p in stacked.values()), params)
    assert slopes["a"].tolist() == [4.0] * 3
    assert float(slopes["b"]) == 4.0


def test_leaves_are_copies_that_record_gradient():
    source = random_params({"a": (3,)})
    copy = leaves(source)
    assert copy["a"].is_leaf
    assert copy["a"].requires_grad
    assert not source["a"].requires_grad
    with torch.no_grad():
        copy["a"].zero_()
    assert (source["a"] != 0.0).all()
    graph = {"a": 2.0 * copy["a"]}
    assert leaves(graph)["a"].is_leaf
    assert not detach(graph)["a"].requires_grad


def test_gradients_of_what_does_not_depend_are_zero():
    params = leaves(random_params({"a": (3,), "b": (2,)}))
    slopes = gradients(params["a"].sum(), params)
    assert slopes["a"].tolist() == [1.0] * 3
    assert slopes["b"].tolist() == [0.0] * 2


def test_gradients_with_cotangents_and_second_order():
    params = leaves({"a": torch.tensor([2.0, 3.0])})
    outputs = (params["a"] ** 3, params["a"].sum())
    cotangents = (torch.tensor([1.0, 10.0]), torch.tensor(100.0))
    slopes = gradients(outputs, params, cotangents, create_graph=True)
    assert slopes["a"].tolist() == [12.0 + 100.0, 270.0 + 100.0]
    assert gradients(slopes["a"].sum(), params)["a"].tolist() == [12.0, 180.0]


def test_global_norm_is_that_of_the_vector():
    params = random_params({"a": (3,), "b": (2, 2), "c": ()})
    torch.testing.assert_close(global_norm(params), flatten(params).norm())
