"""Two and four learners make bitwise the updates of one, whatever their shares."""

import pytest
import torch

from learners.config import METHODS
from learners.core.errors import NonFiniteError
from learners.core.params import detach
from learners.core.reduce import ALONE
from learners.core.trajectory import Spec
from learners.registry import make_learner as learner_for
from tests.learners import builders, lifetimes
from tests.learners.core.test_actor_critic import make_state as make_replicas
from tests.learners.core.test_actor_critic import make_stream

NUM_UPDATES = 2


def window(learner, state, agents, make_batch, reduce):
    """Who acted in each batch, and the K + 1 batches, with inner updates in between."""
    trace, batches = [agents], []
    for k in range(learner.num_inner_updates + 1):
        batches.append(make_batch(trace[-1], k))
        if k < learner.num_inner_updates:
            trace.append(learner.inner_update(state, trace[-1], batches[-1], reduce))
    return trace, batches


def history(learner, state, begin_and_batches, reduce):
    """Everything that some meta-updates bring: states, adapted agents and metrics."""
    found = []
    for _ in range(NUM_UPDATES):
        trace, batches = begin_and_batches(state)
        state, metrics = learner.meta_update(state, trace, batches, reduce)
        adapted = {"params": detach(trace[-1].params), "slots": detach(trace[-1].slots)}
        found.append((detached(state), adapted, metrics))
    return found


def detached(groups):
    return {group: detach(entries) for group, entries in groups.items()}


def assert_equal(found, expected, moving):
    """`moving` are groups that both updates must have changed."""
    (first, *_), (second, *_) = expected
    for group in moving:
        assert any(not torch.equal(p, second[group][name]) for name, p in first[group].items())
    for (state, adapted, metrics), (wanted, wanted_agents, wanted_metrics) in zip(
        found, expected, strict=True
    ):
        for groups, others in ((state, wanted), (adapted, wanted_agents)):
            assert groups.keys() == others.keys()
            for group, entries in groups.items():
                assert entries.keys() == others[group].keys()
                for name, tensor in entries.items():
                    assert torch.equal(tensor, others[group][name]), f"{group}/{name}"
        assert metrics == wanted_metrics


def maml(reduce, settings):
    """Nine tasks in five blocks, the last of them smaller."""
    learner = builders.make_learner(hidden=(16, 16), members_per_block=2, **settings)
    state = builders.make_state(learner, dtype=torch.float32)

    def begin_and_batches(state):
        params, _ = learner.split(state["meta_params"])
        agents = learner.begin(state, 9)[1]

        def batch(_, k):
            return builders.make_trajectory(learner, params, 9, seed=k)

        return window(learner, state, agents, batch, reduce)

    return history(learner, state, begin_and_batches, reduce)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_inner_updates": 2, "learn_inner_lr": True, "exploration": 0.5, "max_kl": 0.2},
        {"first_order": True, "inner_loss": "dice"},
    ],
    ids=["second_order", "first_order"],
)
def test_maml(several, settings):
    expected = maml(ALONE, settings)
    assert all(metrics["meta/step_accepted"] == 1.0 for _, _, metrics in expected)
    if "max_kl" in settings:  # so that the line search has something to decide
        assert any(metrics["meta/line_search_tries"] > 1.0 for _, _, metrics in expected)
    for found in several.run(maml, settings):
        assert_equal(found, expected, ["meta_params"])


def population(reduce, make, settings):
    """Ten lifetimes in two worlds: six blocks of unequal sizes, or ten of one member."""
    learner = make(**settings)
    state = lifetimes.make_state(learner, 10)

    def begin_and_batches(state):
        def batch(agents, k):
            return lifetimes.make_batch(learner, agents, 10, seed=k)

        return window(learner, state, learner.begin(state, 10)[1], batch, reduce)

    return history(learner, state, begin_and_batches, reduce)


LPG = {
    "of_the_paper": {},
    "beyond": {"ema_advantage": True, "imitation_coef": 0.5, "outer_every_update": True},
    "adam_per_lifetime": {"adam_per_lifetime": True, "members_per_block": 1},
}


@pytest.mark.parametrize("settings", LPG.values(), ids=LPG)
def test_lpg(several, settings):
    expected = population(ALONE, lifetimes.make_learner, settings)
    for found in several.run(population, lifetimes.make_learner, settings):
        assert_equal(found, expected, ["meta_params", "params", "critic"])


def test_agents_under_a_rule(several):
    expected = population(ALONE, lifetimes.make_agents, {})
    for found in several.run(population, lifetimes.make_agents, {}):
        assert_equal(found, expected, ["params", "critic"])


REPLICAS = {
    "a2c": {"num_steps": 6},
    "ppo": {"num_steps": 8, "num_minibatches": 2, "normalize_obs": True},
    "lirpg": {"num_steps": 8, "num_minibatches": 2, "normalize_reward": True},
    "frodo": {"num_steps": 4, "num_inner_updates": 1, "outer_critic": True},
    "td-lambda": {"hidden": ()},
}


def replicas(reduce, method, settings):
    """Seven replicas in four blocks, some of which no time limit touches; values are known."""
    predicts = method == "td-lambda"
    spec = Spec(3, 3, True, 100, target_policy=(0.2, 0.5, 0.3) if predicts else None)
    config = METHODS[method](**{"hidden": (6, 5), "members_per_block": 2, **settings})
    learner = learner_for(config, spec)
    state = make_replicas(learner, 7)
    if "critic" in state:
        state["critic"] = {name: p.double() for name, p in state["critic"].items()}
    count = iter(range(NUM_UPDATES))

    def begin_and_batches(state):
        batch = make_stream(learner, state, seed=next(count))
        batch.truncated[2:] = False
        batch.true_value.set_(batch.reward)
        return [learner.begin(state, 7)[1]], [batch]

    return history(learner, state, begin_and_batches, reduce)


@pytest.mark.parametrize("method", REPLICAS)
def test_replicas(several, method):
    expected = replicas(ALONE, method, REPLICAS[method])
    moving = [group for group in expected[0][0] if group.endswith("params") or group == "critic"]
    for found in several.run(replicas, method, REPLICAS[method]):
        assert_equal(found, expected, moving)


def broken_replica(reduce):
    """The replicas of the first block alone get a parameter that is not finite."""
    learner = learner_for(METHODS["a2c"](members_per_block=1, hidden=(4,)), Spec(3, 3, True, 100))
    state = make_replicas(learner, 4)
    batch = make_stream(learner, state)
    batch.reward[0] = torch.inf
    try:
        learner.meta_update(state, [learner.begin(state, 4)[1]], [batch], reduce)
    except NonFiniteError as error:
        return str(error)
    return None


def test_what_is_not_finite_on_one_learner_is_refused_by_all_alike(several):
    expected = broken_replica(ALONE)
    assert "is not finite" in expected
    for _ in range(2):  # and none of them is left behind by it
        assert several.run(broken_replica) == [expected] * several.size
