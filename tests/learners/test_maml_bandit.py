"""MAML on two-armed bandits, worked out by hand.

One step, no observation: the policy is softmax(b) with b the output bias, p its probabilities and
e_a the unit vector of arm a. On support samples (a, Â) the inner loss −mean Â log p_a has

    gradient  g = −mean Â (e_a − p)
    Hessian   H = mean(Â) (diag p − p pᵀ)                          log_prob
              H = mean(Â) (diag p − p pᵀ) − mean Â (e_a − p)(e_a − p)ᵀ   likelihood_ratio, dice

On query samples (a, Â, old probability) at b' = b − α g, with p' = softmax(b'), the surrogate
−mean (p'_a / old) Â has the gradient G = −mean (p'_a / old) Â (e_a − p'). The meta-gradient of one
task is (I − α H) G, and of several their mean.
"""

import math

import numpy as np
import pytest
import torch

from learners.config import MamlTrpoConfig
from learners.core.params import expand_members, leaves, unflatten
from learners.core.policy_gradient import Batch
from learners.core.trajectory import Spec, Trajectory
from learners.maml import Block, Linearised, MamlTrpo
from tests.learners.builders import dense_fisher, linearise, make_learner, make_state, make_window


def bandit(**settings) -> MamlTrpo:
    return MamlTrpo(MamlTrpoConfig(hidden=(), **settings), Spec(1, 2, discrete=True, horizon=1))


def params_of(bias) -> dict[str, torch.Tensor]:
    return leaves(
        {
            "layer0.weight": torch.tensor([[0.3, -0.4]], dtype=torch.float64),
            "layer0.bias": torch.tensor(bias, dtype=torch.float64),
        }
    )


def samples(arms, advantages, old=None) -> Batch:
    """One pull of each environment: [M, 1, E]."""
    arms, advantages = np.asarray(arms), np.asarray(advantages, dtype=np.float64)
    old = np.full(arms.shape, 0.5) if old is None else np.asarray(old)

    def tensor(array):
        return torch.from_numpy(array).unsqueeze(1)

    return Batch(
        obs=torch.zeros(*arms.shape, 1, dtype=torch.float64),
        action=torch.from_numpy(arms),
        log_prob=tensor(np.log(old)),
        advantage=tensor(advantages),
        valid=tensor(np.ones(arms.shape)),
    )


def meta_gradient(learner: MamlTrpo, params, support: list[Batch], query: Batch) -> np.ndarray:
    """The meta-gradient with respect to b; that of the weights is zero without observation."""
    num_members = len(query.obs)
    block = Block(support, query, torch.zeros(num_members).double(), 1.0 / num_members)
    gradient = unflatten(Linearised.at(learner, params, block).gradient(params), params)
    assert (gradient["layer0.weight"] == 0.0).all()
    return gradient["layer0.bias"].numpy()


@pytest.mark.parametrize(
    ("kind", "first_order", "factor"),
    [
        ("log_prob", False, -0.5),
        ("log_prob", True, 1.0),
        ("likelihood_ratio", False, 1.0),
        ("dice", False, 1.0),
        ("likelihood_ratio", True, 1.0),
    ],
)
def test_two_pulls_in_numbers(kind, first_order, factor):
    """b = (0, 0), α = 2; support: arm 0 with Â = 2 and arm 1 with Â = 1.

    g = −½ [2 (½, −½) + (−½, ½)] = (−¼, ¼), so b' = (½, −½) and p'_0 = s = 1 / (1 + 1/e).
    Query: arm 0 with Â = 1 and old = s, so G = −(1 − s) (1, −1).
    (1, −1) is an eigenvector of D = [[1, −1], [−1, 1]] with eigenvalue 2, and
    log_prob: H = (3/2) D/4, so (I − 2H) G = (1 − 2 · ¾) G = −½ G.
    The other two: every (e_a − p)(e_a − p)ᵀ is D/4 too, H = 0: the expected return p_0 of an arm
    has its inflection at ½, which log_prob does not see.
    """
    learner = bandit(inner_lr=2.0, inner_loss=kind, first_order=first_order)
    s = 1.0 / (1.0 + math.exp(-1.0))
    gradient = meta_gradient(
        learner,
        params_of([0.0, 0.0]),
        [samples([[0, 1]], [[2.0, 1.0]])],
        samples([[0]], [[1]], [[s]]),
    )
    np.testing.assert_allclose(gradient, -factor * (1.0 - s) * np.array([1.0, -1.0]), atol=1e-14)


def softmax(bias):
    return np.exp(bias) / np.exp(bias).sum()


def support_derivatives(bias, arms, advantages, kind):
    """g and H of the head of this module."""
    p = softmax(bias)
    score = np.eye(2)[arms] - p
    hessian = advantages.mean() * (np.diag(p) - np.outer(p, p))
    if kind != "log_prob":
        hessian = hessian - (advantages[:, None, None] * score[:, :, None] * score[:, None]).mean(0)
    return -(advantages[:, None] * score).mean(0), hessian


def query_gradient(bias, arms, advantages, old):
    """G of the head of this module."""
    p = softmax(bias)
    return -((p[arms] / old * advantages)[:, None] * (np.eye(2)[arms] - p)).mean(0)


@pytest.mark.parametrize("kind", ["log_prob", "likelihood_ratio", "dice"])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("num_inner_updates", [1, 2])
def test_meta_gradient_of_three_bandits(kind, first_order, num_inner_updates):
    """Any b, any samples; with two updates the factors are (I − α H_0)(I − α H_1)."""
    rng = np.random.default_rng(3)
    alpha, bias, (num_members, num_pulls) = 0.75, np.array([0.9, -0.6]), (3, 7)

    def draw():
        arms = rng.integers(0, 2, (num_members, num_pulls))
        return arms, rng.normal(0.8, 1.0, arms.shape), rng.uniform(0.2, 0.9, arms.shape)

    support = [draw() for _ in range(num_inner_updates)]
    query = draw()
    expected, second_order_part = np.zeros(2), np.zeros(2)
    for i in range(num_members):
        adapted, factor = bias, np.eye(2)
        for arms, advantages, _ in support:
            g, hessian = support_derivatives(adapted, arms[i], advantages[i], kind)
            adapted = adapted - alpha * g
            factor = factor @ (np.eye(2) - alpha * hessian)
        G = query_gradient(adapted, *(column[i] for column in query))
        expected += (G if first_order else factor @ G) / num_members
        second_order_part += (factor @ G - G) / num_members
    assert np.abs(second_order_part).max() > 0.01

    learner = bandit(
        inner_lr=alpha,
        inner_loss=kind,
        first_order=first_order,
        num_inner_updates=num_inner_updates,
    )
    gradient = meta_gradient(
        learner, params_of(bias.tolist()), [samples(*s[:2]) for s in support], samples(*query)
    )
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", ["log_prob", "likelihood_ratio"])
def test_curvature_of_a_bandit(kind):
    """(I − α H)(diag p' − p' p'ᵀ)(I − α H), by hand."""
    alpha, bias = 0.75, np.array([0.4, -0.3])
    arms, advantages = np.array([0, 1, 1, 0, 1]), np.array([1.5, 0.2, -0.7, 1.1, 2.0])
    g, hessian = support_derivatives(bias, arms, advantages, kind)
    p = softmax(bias - alpha * g)
    factor = np.eye(2) - alpha * hessian
    expected = factor @ (np.diag(p) - np.outer(p, p)) @ factor
    learner, params = bandit(inner_lr=alpha, inner_loss=kind), params_of(bias.tolist())
    query = samples([[0, 1, 0]], [[1.0, 2.0, 3.0]])
    block = Block([samples(arms[None], advantages[None])], query, torch.zeros(1).double(), 1.0)
    matrix = dense_fisher([Linearised.at(learner, params, block)], params)
    np.testing.assert_allclose(matrix[:2, :2].numpy(), expected, rtol=0, atol=1e-14)
    assert (matrix[2:] == 0.0).all()
    assert (matrix[:, 2:] == 0.0).all()


def test_inner_update_of_a_bandit_from_rewards():
    """A constant baseline cancels when advantages are standardised: Â = (r − r̄) / std(r)."""
    rng = np.random.default_rng(5)
    arms, reward = rng.integers(0, 2, (2, 1, 9)), rng.normal(size=(2, 1, 9))
    ones = np.ones_like(reward)
    arrays = {
        "obs": np.zeros((2, 1, 9, 1)),
        "action": arms,
        "reward": reward,
        "terminated": ones > 0,
        "truncated": ones < 0,
        "valid": ones,
        "log_prob": np.log(0.5 * ones),
        "last_obs": np.zeros((2, 9, 1)),
        "episode_return": reward,
        "episode_length": ones,
        "final_obs": np.zeros((2, 0, 9, 1)),
        "discounted_return": np.zeros((2, 0, 9)),
        "true_value": np.zeros((2, 0, 9)),
    }
    batch = Trajectory(**{name: torch.from_numpy(array) for name, array in arrays.items()})
    learner, params = bandit(inner_lr=0.75), params_of([0.4, -0.3])
    _, agents = learner.begin({"meta_params": params}, 2)
    updated = learner.inner_update({"meta_params": params}, agents, batch)
    for i in range(2):
        centred = reward[i, 0] - reward[i, 0].mean()
        advantages = centred / reward[i, 0].std()
        g, _ = support_derivatives(np.array([0.4, -0.3]), arms[i, 0], advantages, "log_prob")
        np.testing.assert_allclose(
            updated.params["layer0.bias"][i].numpy(), np.array([0.4, -0.3]) - 0.75 * g, atol=1e-7
        )


# --- Limits of the method on networks ---


def policy_gradient(learner, meta_params, query: Batch) -> dict[str, torch.Tensor]:
    """∇ of −mean_i mean ratio · Â at η: no adaptation at all."""
    params = leaves(meta_params)
    stacked = expand_members(params, len(query.obs))
    dist = learner.policy.distribution(stacked, query.obs)
    ratio = (dist.log_prob(query.action) - query.log_prob.flatten(1)).exp()
    weighted = ratio * query.advantage.flatten(1) * query.valid.flatten(1)
    loss = -(weighted.sum(1) / query.valid.flatten(1).sum(1)).mean()
    return dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))


@pytest.mark.parametrize("kind", ["log_prob", "likelihood_ratio", "dice"])
@pytest.mark.parametrize("num_inner_updates", [1, 2])
def test_zero_inner_rate_gives_the_plain_policy_gradient(kind, num_inner_updates):
    learner = make_learner(
        inner_loss=kind, num_inner_updates=num_inner_updates, learn_inner_lr=True
    )
    meta_params = make_state(learner)["meta_params"]
    for name, p in meta_params.items():
        if name.startswith("inner_lr."):
            p.zero_()
    _, batches = make_window(learner, {"meta_params": meta_params})
    blocks = learner.blocks(batches)
    meta_params = leaves(meta_params)
    gradient = unflatten(linearise(learner, meta_params, blocks)[0], meta_params)
    policy = {n: p for n, p in meta_params.items() if not n.startswith("inner_lr.")}
    for name, expected in policy_gradient(learner, policy, blocks[0].query).items():
        torch.testing.assert_close(gradient[name], expected, rtol=1e-12, atol=1e-14)


def test_vanishing_inner_rate_tends_to_the_plain_policy_gradient():
    """The distance is proportional to α."""
    distances = []
    for alpha in (2.0**-10, 2.0**-14):
        learner = make_learner(inner_lr=alpha)
        meta_params = leaves(make_state(learner)["meta_params"])
        blocks = learner.blocks(make_window(learner, {"meta_params": meta_params})[1])
        gradient = unflatten(linearise(learner, meta_params, blocks)[0], meta_params)
        plain = policy_gradient(learner, meta_params, blocks[0].query)
        distances.append(max(float((gradient[n] - plain[n]).abs().max()) for n in plain))
    assert distances[0] > 1e-5
    assert distances[0] / distances[1] == pytest.approx(16.0, rel=0.05)


@pytest.mark.parametrize("kind", ["log_prob", "likelihood_ratio", "dice"])
@pytest.mark.parametrize("num_inner_updates", [1, 2])
@pytest.mark.parametrize("discrete", [False, True])
def test_first_order_differs_by_exactly_the_hessian_term(discrete, num_inner_updates, kind):
    """Second-order gradient = (I − α H_0) … (I − α H_{K−1}) first-order gradient, one member."""
    settings = {"num_inner_updates": num_inner_updates, "inner_loss": kind}
    learner = make_learner(discrete, **settings)
    constant = make_learner(discrete, first_order=True, **settings)
    meta_params = leaves(make_state(learner)["meta_params"])
    _, batches = make_window(learner, {"meta_params": meta_params}, num_members=1)
    blocks = learner.blocks(batches)
    second_order = linearise(learner, meta_params, blocks)[0]
    first_order = linearise(constant, meta_params, blocks)[0]

    trace = learner.adapt(meta_params, blocks[0], create_graph=True)
    expected = first_order
    for params, batch in reversed(list(zip(trace[:-1], blocks[0].support, strict=True))):

        def loss(vector, batch=batch):
            theta = {n: p.unsqueeze(0) for n, p in unflatten(vector, meta_params).items()}
            return learner.inner_loss(theta, batch).sum()

        at = torch.cat([params[name].detach().reshape(-1) for name in sorted(params)])
        hessian = torch.autograd.functional.hessian(loss, at)
        expected = expected - learner.config.inner_lr * hessian @ expected
    assert (second_order - first_order).norm() > 0.01 * second_order.norm()
    torch.testing.assert_close(second_order, expected, rtol=1e-11, atol=1e-13)
