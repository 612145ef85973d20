"""The linear baseline against numpy's least squares."""

import numpy as np
import pytest
import torch

from learners.core.baseline import features, fit_predict

RIDGE = 1e-5


def data(seed: int, dtype=np.float64, shape=(3, 8, 5), obs_size: int = 2):
    rng = np.random.default_rng(seed)
    obs = rng.normal(size=(*shape, obs_size)) * 4.0
    length = rng.integers(4, shape[1] + 1, (shape[0], 1, shape[2]))
    valid = np.arange(shape[1])[None, :, None] < length
    returns = rng.normal(size=shape) + obs[..., 0] - 0.3 * obs[..., 1] ** 2
    return obs.astype(dtype), returns.astype(dtype), valid.astype(dtype)


def design(obs: np.ndarray) -> np.ndarray:
    """The features of one member, written out, [T·E, 2·O + 4]."""
    rows = []
    for t, e in np.ndindex(*obs.shape[:2]):
        clipped = np.clip(obs[t, e], -10.0, 10.0)
        time = t / 100.0
        rows.append([*clipped, *clipped**2, time, time**2, time**3, 1.0])
    return np.array(rows)


def slow(obs, returns, valid, ridge=RIDGE) -> np.ndarray:
    """Ridge regression per member as least squares on √ridge more rows."""
    predictions = []
    for m in range(len(obs)):
        phi, chosen = design(obs[m]), valid[m].flatten() > 0.0
        rows = np.vstack([phi[chosen], np.sqrt(ridge) * np.eye(phi.shape[1])])
        target = np.concatenate([returns[m].flatten()[chosen], np.zeros(phi.shape[1])])
        weights = np.linalg.lstsq(rows, target, rcond=None)[0]
        predictions.append((phi @ weights).reshape(valid[m].shape) * valid[m])
    return np.stack(predictions)


def predict(*arrays, **settings) -> np.ndarray:
    return fit_predict(*map(torch.from_numpy, arrays), **settings).numpy()


def test_features_are_those_of_the_paper():
    obs = data(0)[0] * 5.0
    assert (np.abs(obs) > 10.0).any()
    computed = features(torch.from_numpy(obs)).numpy()
    assert computed.shape == (3, 8, 5, 2 * 2 + 4)
    for m in range(3):
        np.testing.assert_allclose(computed[m].reshape(40, 8), design(obs[m]), rtol=1e-14)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ridge", [1e-5, 0.1])
def test_prediction_equals_ridge_regression_per_member(seed, ridge):
    arrays = data(seed)
    expected = slow(*arrays, ridge)
    np.testing.assert_allclose(predict(*arrays, ridge=ridge), expected, rtol=0, atol=1e-6)
    assert (expected[arrays[2] == 0.0] == 0.0).all()


def test_prediction_in_single_precision():
    arrays = data(1, np.float32)
    expected = slow(*(array.astype(np.float64) for array in arrays))
    computed = predict(*arrays)
    assert computed.dtype == np.float32
    np.testing.assert_allclose(computed, expected, rtol=0, atol=0.02)


def test_padding_has_no_say():
    obs, returns, valid = data(2)
    expected = predict(obs, returns, valid)
    mask = valid == 0.0
    assert mask.any()
    obs[mask], returns[mask] = 7.0, -1e6
    np.testing.assert_allclose(predict(obs, returns, valid), expected, rtol=0, atol=1e-9)


def test_members_are_fitted_apart():
    arrays = data(3)
    together = predict(*arrays)
    for m in range(3):
        alone = predict(*(array[m : m + 1] for array in arrays))
        np.testing.assert_allclose(together[m], alone[0], rtol=0, atol=1e-9)
    changed = [array.copy() for array in arrays]
    changed[1][0] *= 100.0
    np.testing.assert_allclose(predict(*changed)[1:], together[1:], rtol=0, atol=1e-12)


def test_a_return_that_is_a_feature_is_predicted_exactly():
    obs, _, valid = data(4)
    returns = (2.0 * obs[..., 0].clip(-10, 10) - 3.0) * valid
    np.testing.assert_allclose(predict(obs, returns, valid), returns, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("constant", [0.0, 1.0, 0.1, 50.0])
def test_constant_observation_leaves_no_nan_and_predicts_from_time(constant, dtype):
    """Collinear columns: the ridge term decides; the fitted returns are a line in t."""
    obs = np.full((2, 10, 6, 3), constant, dtype)
    returns = np.broadcast_to(np.arange(10.0)[None, :, None], (2, 10, 6)).astype(dtype)
    computed = predict(obs, returns, np.ones_like(returns))
    assert np.isfinite(computed).all()
    np.testing.assert_allclose(computed, returns, rtol=0, atol=0.05)


def singular():
    """Member 0: one step, observation 1, so that three columns are the same. Member 1: any."""
    obs = np.ones((2, 1, 4, 1))
    obs[1] = np.array([0.3, -1.0, 2.0, 0.7]).reshape(1, 4, 1)
    returns = np.array([[[2.0, 4.0, 2.0, 4.0]], [[1.0, -1.0, 3.0, 0.5]]])
    return obs, returns, np.ones_like(returns)


def test_ridge_is_raised_for_the_singular_member_alone():
    """1e-19 and its next two multiples vanish beside 4; a larger one makes the system solvable."""
    arrays = singular()
    computed = predict(*arrays, ridge=1e-19, tries=8)
    np.testing.assert_allclose(computed[0], 3.0, rtol=0, atol=0.3)
    alone = predict(*(array[1:] for array in arrays), ridge=1e-19, tries=1)
    np.testing.assert_array_equal(computed[1], alone[0])


def test_baseline_of_an_unsolvable_member_is_zero():
    arrays = singular()
    computed = predict(*arrays, ridge=1e-22, tries=2)
    assert (computed[0] == 0.0).all()
    assert (computed[1] != 0.0).all()


@pytest.mark.parametrize("tries", [1, 3])
def test_no_more_tries_than_allowed(tries, monkeypatch):
    calls = []
    solve = torch.linalg.solve_ex
    monkeypatch.setattr(torch.linalg, "solve_ex", lambda *a: calls.append(a) or solve(*a))
    predict(*singular(), ridge=0.0, tries=tries)
    assert len(calls) == tries


def test_ridge_grows_tenfold(monkeypatch):
    ridges = []
    solve = torch.linalg.solve_ex

    def record(matrix, target):
        ridges.append(float(matrix[0, 1, 1] - matrix[0, 0, 1]))
        return solve(matrix, target)

    monkeypatch.setattr(torch.linalg, "solve_ex", record)
    obs, returns, valid = singular()
    predict(obs, returns * np.array([np.nan, 1.0])[:, None, None], valid, ridge=1e-3, tries=4)
    np.testing.assert_allclose(ridges, [1e-3, 1e-2, 1e-1, 1.0], rtol=1e-9)
