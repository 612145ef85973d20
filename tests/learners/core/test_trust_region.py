"""Conjugate gradient, step size and line search against dense and scripted answers."""

import math

import pytest
import torch

from learners.core.trust_region import conjugate_gradient, line_search, scale_to_kl


def system(seed: int = 0, size: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(size, size, generator=generator).double()
    matrix = factor @ factor.T + 0.5 * torch.eye(size).double()
    return matrix, torch.randn(size, generator=generator).double()


@pytest.mark.parametrize("seed", range(4))
def test_conjugate_gradient_equals_a_dense_solve(seed):
    matrix, target = system(seed)
    computed = conjugate_gradient(lambda v: matrix @ v, target, 40, tolerance=1e-24)
    torch.testing.assert_close(computed, torch.linalg.solve(matrix, target), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("num_steps", [1, 2, 5, 10])
def test_conjugate_gradient_is_the_best_of_its_krylov_space(num_steps):
    matrix, target = system(1)
    krylov = [target]
    for _ in range(num_steps - 1):
        krylov.append(matrix @ krylov[-1] / krylov[-1].norm())
    basis = torch.linalg.qr(torch.stack(krylov, 1))[0]
    expected = basis @ torch.linalg.solve(basis.T @ matrix @ basis, basis.T @ target)
    computed = conjugate_gradient(lambda v: matrix @ v, target, num_steps)
    torch.testing.assert_close(computed, expected, rtol=1e-7, atol=1e-9)


def test_conjugate_gradient_counts_products_and_stops_at_the_tolerance():
    matrix, target = system(2)
    calls = []

    def product(vector):
        calls.append(vector)
        return matrix @ vector

    conjugate_gradient(product, target, 7)
    assert len(calls) == 7
    calls.clear()
    solution = conjugate_gradient(product, target, 500, tolerance=1e-6)
    assert len(calls) < 50
    assert (target - matrix @ solution).square().sum() < 1e-6
    calls.clear()
    assert (conjugate_gradient(product, torch.zeros(12).double(), 5) == 0.0).all()
    assert calls == []


def test_conjugate_gradient_keeps_its_target():
    matrix, target = system(3)
    before = target.clone()
    conjugate_gradient(lambda v: matrix @ v, target, 10)
    assert torch.equal(target, before)


@pytest.mark.parametrize("max_kl", [0.01, 3.0])
def test_scale_to_kl_reaches_the_bound_of_the_quadratic_model(max_kl):
    matrix, direction = system(4)
    step = scale_to_kl(direction, lambda v: matrix @ v, max_kl)
    assert float(0.5 * step @ matrix @ step) == pytest.approx(max_kl, rel=1e-12)
    cosine = step @ direction / (step.norm() * direction.norm())
    assert float(cosine) == pytest.approx(1.0, abs=1e-14)


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan])
def test_scale_to_kl_without_positive_curvature_is_zero(factor):
    _, direction = system(5)
    step = scale_to_kl(direction, lambda v: factor * v, 0.01)
    assert torch.equal(step, torch.zeros_like(direction))
    assert (scale_to_kl(torch.zeros(3).double(), lambda v: v, 0.01) == 0.0).all()


START = torch.tensor([1.0, -2.0, 0.1], dtype=torch.float64)
STEP = torch.tensor([0.5, 4.0, -1.0 / 3.0], dtype=torch.float64)


def search(answers, ratio=0.5, max_tries=15):
    """Runs the search on scripted (loss, KL); returns its result and the points it asked for."""
    points = []

    def evaluate(point):
        points.append(point)
        return answers[len(points) - 1]

    return line_search(evaluate, START, STEP, 1.0, 0.01, ratio, max_tries), points


def test_line_search_takes_the_first_point_that_satisfies_both():
    answers = [(0.5, 0.02), (1.2, 0.001), (0.9, 0.009), (0.1, 0.001)]
    found, points = search(answers)
    assert len(points) == 3
    for j, point in enumerate(points):
        torch.testing.assert_close(point, START - 0.5**j * STEP, rtol=0, atol=1e-15)
    assert torch.equal(found.vector, points[2])
    assert (found.accepted, found.num_tries, found.loss, found.kl) == (True, 3, 0.9, 0.009)


def test_line_search_accepts_the_full_step_and_the_bound_itself():
    found, points = search([(0.999, 0.01)])
    assert found.accepted
    assert found.num_tries == len(points) == 1
    assert torch.equal(found.vector, START - STEP)


@pytest.mark.parametrize(
    "bad", [(1.0, 0.0), (0.5, 0.0101), (math.nan, 0.0), (0.5, math.nan), (math.inf, math.inf)]
)
def test_failed_line_search_returns_the_start_bitwise(bad):
    before = START.numpy().tobytes()
    found, points = search([bad] * 6, max_tries=6)
    assert len(points) == found.num_tries == 6
    assert not found.accepted
    assert (found.loss, found.kl) == (1.0, 0.0)
    assert found.vector.numpy().tobytes() == before
    assert START.numpy().tobytes() == before
