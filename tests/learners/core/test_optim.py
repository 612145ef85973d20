"""Optimizers against torch.optim and slow loops; their derivatives against finite differences."""

import pytest
import torch

from learners.config import OPTIMIZER_NAMES
from learners.core.optim import OPTIMIZERS, Adam, RMSProp, Sgd, clip_by_norm, clip_pullback

LR = 0.01


def random_entries(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Two members with a matrix and a vector each."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"weight": (2, 3, 2), "bias": (2, 4)}
    return {
        n: scale * torch.randn(s, generator=generator, dtype=torch.float64)
        for n, s in shapes.items()
    }


def used_slots(optimizer, params):
    """Slots as after some updates, off every special value; members differ in their t."""
    generator = torch.Generator().manual_seed(9)
    slots = {
        n: torch.rand(s.shape, generator=generator, dtype=torch.float64) + 0.1
        for n, s in optimizer.init(params).items()
    }
    if "t" in slots:
        slots["t"] = torch.tensor([3, 7])
    return slots


def step(optimizer, params, grads, slots):
    return optimizer.update(params, grads, slots, LR)[0]


def gradcheck(function, *groups: dict[str, torch.Tensor]) -> bool:
    """Central differences of a function of groups of entries, by every entry."""
    names = [list(group) for group in groups]
    flat = [p.clone().requires_grad_() for group in groups for p in group.values()]

    def of_tensors(*tensors):
        rest = iter(tensors)
        given = [{name: next(rest) for name in group} for group in names]
        return tuple(function(*given).values())

    return torch.autograd.gradcheck(of_tensors, flat)


def test_adam_equals_torch_for_every_member():
    optimizer, params = Adam(eps=1e-3), random_entries(0)
    slots = optimizer.init(params)
    theirs = [{n: p[m].clone().requires_grad_() for n, p in params.items()} for m in range(2)]
    torch_optimizers = [torch.optim.Adam(t.values(), lr=LR, eps=1e-3) for t in theirs]
    for count in range(20):
        grads = random_entries(100 + count, scale=10.0 ** (count % 5 - 3))
        params, slots = optimizer.update(params, grads, slots, LR)
        for m, (own, torch_optimizer) in enumerate(zip(theirs, torch_optimizers, strict=True)):
            for name, p in own.items():
                p.grad = grads[name][m]
            torch_optimizer.step()
    for m, own in enumerate(theirs):
        for name, p in own.items():
            torch.testing.assert_close(params[name][m], p.detach(), rtol=1e-12, atol=1e-14)
    assert slots["t"].tolist() == [20, 20]


def test_members_of_adam_count_their_own_updates():
    optimizer, params, grads = Adam(), random_entries(0), random_entries(1)
    together = used_slots(optimizer, params)
    new = step(optimizer, params, grads, together)
    for m in range(2):
        own = [{n: p[m : m + 1] for n, p in group.items()} for group in (params, grads, together)]
        for name, p in step(optimizer, *own).items():
            assert torch.equal(p[0], new[name][m])


def test_rmsprop_equals_the_slow_loop_of_tensorflow():
    optimizer, params = RMSProp(decay=0.9, eps=1e-2), random_entries(0)
    slots = optimizer.init(params)
    slow = {n: p.flatten().tolist() for n, p in params.items()}
    ms = {n: [1.0] * len(p) for n, p in slow.items()}
    for count in range(20):
        grads = random_entries(100 + count)
        params, slots = optimizer.update(params, grads, slots, LR)
        for name, values in slow.items():
            for i, g in enumerate(grads[name].flatten().tolist()):
                ms[name][i] = 0.9 * ms[name][i] + 0.1 * g**2
                values[i] -= LR * g / (ms[name][i] + 1e-2) ** 0.5
    for name, values in slow.items():
        assert params[name].flatten().tolist() == pytest.approx(values, rel=1e-12)
        assert slots[f"ms.{name}"].flatten().tolist() == pytest.approx(ms[name], rel=1e-12)


@pytest.mark.parametrize("optimizer", [RMSProp(), Adam(stop_second_moment=False)])
def test_derivative_through_the_whole_step_equals_finite_differences(optimizer):
    params, grads = random_entries(0), random_entries(1)
    slots = used_slots(optimizer, params)
    assert gradcheck(lambda p, g: step(optimizer, p, g, slots), params, grads)


def test_derivative_of_adam_with_its_second_moment_held_equals_finite_differences():
    optimizer, params, grads = Adam(), random_entries(0), random_entries(1)
    slots = used_slots(optimizer, params)

    def held(p, g):
        """The step as a formula, v taken from the base point."""
        out, t = {}, slots["t"].double() + 1.0
        for name in p:
            column = (-1, *[1] * (p[name].ndim - 1))
            m = 0.9 * slots[f"m.{name}"] + 0.1 * g[name]
            v = 0.999 * slots[f"v.{name}"] + 0.001 * grads[name] ** 2
            m_hat = m / (1.0 - 0.9**t).view(column)
            v_hat = v / (1.0 - 0.999**t).view(column)
            out[name] = p[name] - LR * m_hat / (v_hat.sqrt() + 1e-8)
        return out

    assert gradcheck(held, params, grads)
    cotangent = random_entries(2)
    found = {}
    for which, function in (("own", lambda p, g: step(optimizer, p, g, slots)), ("held", held)):
        leaves = [
            {n: p.clone().requires_grad_() for n, p in group.items()} for group in (params, grads)
        ]
        new = function(*leaves)
        total = sum((new[name] * cotangent[name]).sum() for name in new)
        found[which] = torch.autograd.grad(total, [p for group in leaves for p in group.values()])
        for name, p in new.items():
            expected = step(optimizer, params, grads, slots)[name]
            torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-14)
    for own, expected in zip(found["own"], found["held"], strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("optimizer", [RMSProp(eps=1e-2), Adam(eps=1e-2)])
@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_derivatives_by_hand_equal_autograd(optimizer, max_norm):
    """Of the step by the gradient, and through the clipping where it acts and where not."""
    params, cotangent = random_entries(0), random_entries(2)
    slots = used_slots(optimizer, params)
    grads = {n: g.requires_grad_() for n, g in random_entries(1).items()}
    clipped, norm = clip_by_norm(grads, max_norm)
    new, kept = optimizer.update(params, clipped, slots, LR)
    total = sum((new[name] * cotangent[name]).sum() for name in new)
    by_clipped = torch.autograd.grad(total, list(clipped.values()), retain_graph=True)
    by_grads = torch.autograd.grad(total, list(grads.values()))

    clipped, kept, grads = ({n: p.detach() for n, p in g.items()} for g in (clipped, kept, grads))
    slopes = optimizer.slope(clipped, kept, LR)
    through = {name: slopes[name] * p for name, p in cotangent.items()}
    for own, expected in zip(through.values(), by_clipped, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-14)
    pulled = clip_pullback(through, grads, norm, max_norm)
    for name, expected in zip(grads, by_grads, strict=True):
        torch.testing.assert_close(pulled[name], expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("optimizer", [RMSProp(), Adam()])
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_derivative_at_a_gradient_of_exactly_zero_is_finite(optimizer, max_norm):
    """Also with slots of zero, where roots have infinite slopes."""
    params = random_entries(0)
    grads = {n: torch.zeros_like(p).requires_grad_() for n, p in params.items()}
    slots = {n: torch.zeros_like(s) for n, s in optimizer.init(params).items()}
    given = grads if max_norm is None else clip_by_norm(grads, max_norm)[0]
    new = step(optimizer, params, given, slots)
    slopes = torch.autograd.grad(sum(p.sum() for p in new.values()), list(grads.values()))
    for slope in slopes:
        assert slope.isfinite().all()
        assert (slope < 0.0).all()


def test_clip_scales_the_members_above_the_bound_alone():
    grads = random_entries(1)
    grads = {
        n: g * torch.tensor([10.0, 0.01]).view(-1, *[1] * (g.ndim - 1)) for n, g in grads.items()
    }
    clipped, norm = clip_by_norm(grads, 0.5)
    for m in range(2):
        expected = torch.cat([g[m].flatten() for g in grads.values()]).norm()
        torch.testing.assert_close(norm[m], expected)
    for name, g in clipped.items():
        torch.testing.assert_close(g[0], grads[name][0] * 0.5 / norm[0])
        torch.testing.assert_close(g[1], grads[name][1])
    assert norm[0] > 0.5 > norm[1]
    after = clip_by_norm(clipped, 0.5)[1]
    torch.testing.assert_close(after[0], torch.tensor(0.5, dtype=torch.float64))


@pytest.mark.parametrize("scale", [10.0, 0.01], ids=["above", "below"])
def test_derivative_of_clip_equals_finite_differences(scale):
    grads = random_entries(1, scale)
    assert bool((clip_by_norm(grads, 0.5)[1] > 0.5).all()) is (scale == 10.0)
    assert gradcheck(lambda g: clip_by_norm(g, 0.5)[0], grads)


def test_clip_of_one_member_does_not_see_the_other():
    grads = {n: g.requires_grad_() for n, g in random_entries(1).items()}
    clipped, _ = clip_by_norm(grads, 0.5)
    total = sum((g[0] ** 3).sum() for g in clipped.values())
    for slope in torch.autograd.grad(total, list(grads.values())):
        assert (slope[1] == 0.0).all()
        assert (slope[0] != 0.0).any()


@pytest.mark.parametrize("optimizer", [RMSProp(), Adam(), Adam(stop_second_moment=False)])
def test_inputs_are_unchanged(optimizer):
    params, grads = random_entries(0), random_entries(1)
    slots = used_slots(optimizer, params)
    before = [{n: p.clone() for n, p in group.items()} for group in (params, grads, slots)]
    tracked = {n: g.requires_grad_() for n, g in grads.items()}
    clipped, norm = clip_by_norm(tracked, 0.5)
    new, kept = optimizer.update(params, clipped, slots, LR)
    for group, saved in zip((params, grads, slots), before, strict=True):
        for name, p in group.items():
            assert torch.equal(p.detach(), saved[name])
    assert all(p.requires_grad for p in new.values())
    assert not norm.requires_grad
    assert kept.keys() == slots.keys()


@pytest.mark.parametrize("optimizer", [Sgd(), RMSProp(), Adam(stop_second_moment=False)])
def test_derivative_through_three_steps_and_their_slots_equals_finite_differences(optimizer):
    first, grads = random_entries(0), [random_entries(seed) for seed in (1, 2, 3)]

    def steps(params, *given):
        slots = used_slots(optimizer, params)
        for one in given:
            params, slots = optimizer.update(params, one, slots, LR)
        return params

    assert gradcheck(steps, first, *grads)


def test_the_second_moment_that_is_stopped_has_no_graph_and_the_first_has():
    params, grads = random_entries(0), random_entries(1)
    tracked = {n: g.requires_grad_() for n, g in grads.items()}
    _, kept = Adam().update(params, tracked, used_slots(Adam(), params), LR)
    assert kept["m.bias"].requires_grad
    assert not kept["v.bias"].requires_grad


def test_every_optimizer_of_a_configuration_has_its_name():
    assert tuple(OPTIMIZERS) == OPTIMIZER_NAMES


def test_sgd_equals_torch():
    params, grads = random_entries(0), random_entries(1)
    theirs = {n: p.clone().requires_grad_() for n, p in params.items()}
    for name, p in theirs.items():
        p.grad = grads[name]
    torch.optim.SGD(theirs.values(), lr=LR).step()
    for name, p in step(Sgd(), params, grads, {}).items():
        torch.testing.assert_close(p, theirs[name].detach())
