"""The loop: who is asked for what, in which order, and what is made of the answers."""

import math

import numpy as np
import pytest
import torch

import learners.maml
from actors.rollout import Receipt, make_slots
from actors.tasks import load_family
from system.backend import Arrival
from system.learner_host import Failure, Outcome, Plan
from system.loop import Counters, Loop, evaluation_tasks, member_ranges
from system.phase import summarise
from system.seeds import Stream, make_rng, make_seeds
from system.serial_backend import SerialBackend
from tests.system.families import EVERY_TASK, Countdown, Obedient

pytestmark = pytest.mark.usefixtures("torch_threads")

NAN = math.nan


def serial_loop(config, family=None):
    family = family or load_family(config.task, config.task_options)
    return Loop(config, family, SerialBackend(config, family, [1]))


def train(loop, iterations):
    counters, all_metrics = Counters(), []
    for _ in range(iterations):
        counters, metrics, skipped = loop.iterate(counters)
        assert skipped is None
        all_metrics.append(metrics)
    return counters, all_metrics


class Recorder:
    """A backend that writes down what it is asked for; every collection takes 7 steps a slot."""

    actor_restarts = 0
    pids = ()

    def __init__(self, num_inner_updates=2, num_evaluation_updates=4, renew=None, fail_at=None):
        self.plan = Plan(num_inner_updates, num_evaluation_updates, None)
        self.renew = renew
        self.fail_at = fail_at
        self.calls = []
        self.requests = []
        self.version = 0

    def learner(self, method, *args):
        if method == "plan":
            return self.plan
        self.calls.append((method, *args))
        self.version += 1
        if method == "begin":
            return self.renew or [True] * args[0], self.version
        if len(self.calls) == self.fail_at:
            return Outcome(failure=Failure("reward", 2, {}))
        metrics = {"meta/kl": 0.5} if method == "meta_update" else None
        return Outcome(version=self.version, metrics=metrics)

    def collect(self, requests, carries=None):
        assert carries == [None] * len(requests)
        self.requests.append(requests)
        self.calls.append(("collect", requests[0].version))
        number = len(self.requests)
        return [
            Arrival(request, (number, request.slot.id), receipt(request.slot), None)
            for request in requests
        ]


def receipt(slot, returns=None):
    m = slot.num_members
    returns = [[r / 2, r / 2] for r in returns or [4.0] * m]
    return Receipt(slot.id, 1, 7, returns, [[3.0, 3.0]] * m, 0.5, 1, 100, "here", 50.0)


# The order of things


def test_an_iteration_is_k_inner_updates_then_a_meta_update(tiny_run):
    config = tiny_run()
    family = load_family(config.task, config.task_options)
    backend = Recorder()
    counters, metrics, skipped = Loop(config, family, backend).iterate(Counters())
    ranges = [(0, 2), (2, 4)]
    assert backend.calls == [
        ("begin", 4, ranges),
        ("collect", 1),
        ("inner_update", False, (1, 0), (1, 1)),
        ("collect", 2),
        ("inner_update", False, (2, 0), (2, 1)),
        ("collect", 3),
        ("meta_update", (3, 0), (3, 1)),
    ]
    assert skipped is None
    assert counters == Counters(iteration=1, env_steps=3 * 2 * 7)
    assert metrics["meta/kl"] == 0.5


def test_an_evaluation_is_inner_updates_alone_with_their_own_number(tiny_run):
    config = tiny_run()
    backend = Recorder()
    family = load_family(config.task, config.task_options)
    tasks, curve = Loop(config, family, backend).evaluate(6)
    assert [call[0] for call in backend.calls] == [
        *("begin", "collect", "inner_update", "collect", "inner_update"),
        *("collect", "inner_update", "collect", "inner_update", "collect"),
    ]
    assert all(call[1] is True for call in backend.calls if call[0] == "inner_update")
    assert backend.calls[0] == ("begin", 6, [(0, 2), (2, 4), (4, 6)], True)
    assert len(tasks) == 6
    np.testing.assert_array_equal(curve, np.full((6, 5), 2.0))


def test_requests_carry_tasks_seeds_horizon_and_the_version_that_acts(tiny_run):
    config = tiny_run(envs_per_slot=2, seed=5)
    backend = Recorder()
    family = load_family(config.task, config.task_options)
    loop = Loop(config, family, backend)
    loop.iterate(Counters(iteration=9))
    slots = make_slots(4, 3, 2, 2)
    for k, requests in enumerate(backend.requests):
        assert [request.slot for request in requests] == slots
        for request in requests:
            assert request.tasks == tuple(loop.members[slice(*request.slot.members)])
            assert request.seeds == make_seeds(5, Stream.TRAIN, 9, k, request.slot.id)
            assert request.num_steps == 20
            assert request.version == k + 1
            assert not request.stream
    seeds = [request.seeds for requests in backend.requests for request in requests]
    assert len(set(seeds)) == len(seeds)


def test_ranges_of_members_are_named_once():
    assert member_ranges(make_slots(5, 4, 2, 3)) == [(0, 2), (2, 4), (4, 5)]


def test_only_members_that_begin_anew_get_another_task(tiny_run):
    config = tiny_run()
    family = load_family(config.task, config.task_options)
    loop = Loop(config, family, Recorder(renew=[True, False, False, True]))
    loop.iterate(Counters())
    before = loop.members
    assert before == family.sample(make_rng(config.seed, Stream.TRAIN_TASKS, 0), 4)
    loop.iterate(Counters(iteration=1))
    fresh = family.sample(make_rng(config.seed, Stream.TRAIN_TASKS, 1), 4)
    assert loop.members == [fresh[0], before[1], before[2], fresh[3]]


@pytest.mark.parametrize(("fail_at", "phases"), [(3, 1), (5, 2), (7, 3)])
def test_a_failed_update_ends_the_iteration_and_is_counted(tiny_run, fail_at, phases):
    config = tiny_run(seed=6)
    family = load_family(config.task, config.task_options)
    backend = Recorder(fail_at=fail_at)
    loop = Loop(config, family, backend)
    before = Counters(iteration=4, env_steps=100, skipped=1, skipped_in_a_row=1)
    counters, metrics, skipped = loop.iterate(before)
    assert len(backend.calls) == fail_at
    # What was collected was simulated, used or not.
    assert counters == Counters(5, 100 + phases * 14, skipped=2, skipped_in_a_row=2)
    assert metrics["meta/skipped_updates"] == 2.0
    assert (skipped.task, skipped.seed) == (loop.members[2], 6)
    counters, _, skipped = loop.iterate(counters)
    assert skipped is None
    assert (counters.skipped, counters.skipped_in_a_row) == (2, 0)


def test_receipts_of_a_members_slots_add_up():
    slots = make_slots(3, 4, 2, 2)
    receipts = [
        Receipt(0, 1, 10, [[1.0], [1.5, 0.5]], [[4.0], [3.0, 3.0]], 0.5, 1, 100, "here", 50.0),
        Receipt(1, 1, 20, [[3.0], [2.5, 1.5]], [[2.0], [1.0, 1.0]], 0.25, 2, 50, "here", 60.0),
        Receipt(2, 1, 30, [[5.0]], [[5.0]], 1.0, 1, 10, "here", 70.0),
        Receipt(3, 1, 40, [[1.0, 2.0, 3.0]], [[2.0, 2.0, 3.0]], 1.0, 1, 10, "here", 70.0),
    ]
    phase = summarise(slots, receipts, 3, seconds=2.0)
    np.testing.assert_allclose(phase.member_return, [4 / 2, 6 / 4, 11 / 4])
    assert phase.lengths[2] == [5.0, 2.0, 2.0, 3.0]
    assert (phase.num_steps, phase.num_bytes) == (100, 170)
    assert (phase.busy_seconds, phase.seconds) == (2.75, 2.0)


def test_a_member_without_a_finished_episode_has_no_return():
    (slot,) = make_slots(2, 1, 2, 1)
    phase = summarise(
        [slot], [Receipt(0, 1, 5, [[], [3.0]], [[], [5.0]], 0.1, 1, 1, "here", 50.0)], 2, 1.0
    )
    assert math.isnan(phase.member_return[0])
    assert phase.member_return[1] == 3.0


# With a real learner


def test_the_metrics_are_those_of_the_design(tiny_run):
    _, (metrics,) = train(serial_loop(tiny_run()), 1)
    assert set(metrics) >= {
        *("rollout/ep_rew_mean", "rollout/ep_len_mean"),
        *("adapt/ep_rew_mean_0", "adapt/ep_rew_mean_1", "adapt/gain"),
        *("inner/loss", "inner/kl", "meta/loss", "meta/grad_norm", "meta/kl", "meta/step_norm"),
        *("perf/env_steps_per_s", "perf/learner_s", "perf/collect_s"),
        *("perf/actor_idle_frac", "perf/learner_idle_frac"),
        *(
            "sys/actor_restarts",
            "sys/object_store_mb",
            "sys/rss_mb",
            "sys/actor_rss_mb_max",
            "time/iteration",
            "time/env_steps",
        ),
        "meta/skipped_updates",
    }
    assert all(isinstance(value, float) and math.isfinite(value) for value in metrics.values())
    assert metrics["adapt/gain"] == pytest.approx(
        metrics["adapt/ep_rew_mean_1"] - metrics["adapt/ep_rew_mean_0"]
    )
    for name in ("perf/actor_idle_frac", "perf/learner_idle_frac"):
        assert 0.0 <= metrics[name] <= 1.0


def test_environment_steps_are_the_valid_ones(tiny_run, monkeypatch):
    loop = serial_loop(tiny_run(), Countdown(horizon=20, garbage=False))
    chunks = []
    collect = loop.backend.collect

    def watched(requests, carries):
        arrivals = collect(requests, carries)
        chunks.extend(arrival.chunk for arrival in arrivals)
        return arrivals

    monkeypatch.setattr(loop.backend, "collect", watched)
    counters, all_metrics = train(loop, 2)
    steps = [int(chunk.arrays["valid"].sum()) for chunk in chunks]
    assert len(steps) == 2 * 2 * 2  # iterations, phases, slots
    assert sum(steps) < 2 * 2 * 4 * 3 * 20  # some episodes end early
    assert counters.env_steps == sum(steps)
    assert [m["time/env_steps"] for m in all_metrics] == [sum(steps[:4]), sum(steps)]


def test_two_runs_are_equal_and_the_seed_matters(tiny_run, assert_same_state):
    loops = [serial_loop(tiny_run(seed=seed)) for seed in (0, 0, 1)]
    for loop in loops:
        train(loop, 2)
    first, same, other = [loop.backend.learner("get_state") for loop in loops]
    assert_same_state(first, same)
    with pytest.raises(AssertionError):
        assert_same_state(first, other)


def test_training_changes_every_parameter(tiny_run):
    loop = serial_loop(tiny_run())
    before = loop.backend.learner("get_state")["meta_params"]
    before = {name: tensor.clone() for name, tensor in before.items()}
    train(loop, 2)
    after = loop.backend.learner("get_state")["meta_params"]
    assert [name for name in before if torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize("seed", [0, 1])
def test_the_order_of_a_states_entries_does_not_matter(tiny_run, seed, assert_same_state):
    """A checkpoint gives them back in another order than the learner had them in."""
    loop = serial_loop(tiny_run(seed=seed, num_envs=2, task_options={"horizon": 5}))
    (group,) = loop.backend.learner("get_state").values()
    rng = np.random.default_rng(seed)
    orders = [sorted(group), *(rng.permutation(sorted(group)).tolist() for _ in range(15))]
    outcomes = []
    for order in orders:
        loop.backend.learner("set_state", {"meta_params": {name: group[name] for name in order}})
        _, (row,) = train(loop, 1)
        row = {t: v for t, v in row.items() if not t.startswith(("perf/", "sys/", "time/"))}
        outcomes.append((loop.backend.learner("get_state"), row))
    for state, row in outcomes:
        assert_same_state(state, outcomes[0][0])
        assert row == outcomes[0][1]


# Evaluation


def test_an_evaluation_changes_nothing_and_is_the_same_again(tiny_run, assert_same_state):
    config = tiny_run()
    loop, undisturbed = serial_loop(config), serial_loop(config)
    counters, _, _ = loop.iterate(Counters())
    before = {
        group: {name: tensor.clone() for name, tensor in params.items()}
        for group, params in loop.backend.learner("get_state").items()
    }
    tasks, curve = loop.evaluate(5)
    again_tasks, again = loop.evaluate(5)
    assert_same_state(loop.backend.learner("get_state"), before)
    assert tasks == again_tasks
    np.testing.assert_array_equal(curve, again)
    loop.iterate(counters)
    train(undisturbed, 2)
    assert_same_state(loop.backend.learner("get_state"), undisturbed.backend.learner("get_state"))


def test_evaluation_tasks_are_never_those_of_training_nor_of_another_seed():
    family = load_family("navigation-2d")
    evaluated = evaluation_tasks(family, 0, 30)
    assert evaluated == evaluation_tasks(family, 0, 30)
    trained = [
        task
        for iteration in range(50)
        for task in family.sample(make_rng(0, Stream.TRAIN_TASKS, iteration), 20)
    ]
    assert not [task for task in evaluated if task in trained]
    assert not [task for task in evaluated if task in evaluation_tasks(family, 1, 30)]


@pytest.mark.parametrize(("asked", "each"), [(1, 1), (2, 1), (6, 3)])
def test_a_few_known_tasks_are_evaluated_equally_often(asked, each):
    tasks = evaluation_tasks(load_family("half-cheetah-dir"), 0, asked)
    assert [task["direction"] for task in tasks] == [1.0, -1.0] * each


def test_the_evaluation_curve_has_a_row_per_task_and_k_plus_three_columns(tiny_run):
    tasks, curve = serial_loop(tiny_run()).evaluate(5)
    assert len(tasks) == 5
    assert curve.shape == (5, 4)
    assert np.isfinite(curve).all()


# What is not finite


@pytest.fixture
def orders(tmp_path):
    folder = tmp_path / "orders"
    folder.mkdir()
    return folder


def obedient_loop(tiny_run, orders):
    family = Obedient(horizon=20, orders=str(orders))
    return serial_loop(tiny_run(), family)


@pytest.mark.parametrize(("order", "tensor"), [("nan_reward", "reward"), ("nan_obs", "obs")])
def test_nan_from_an_environment_is_named_and_skipped(
    tiny_run, orders, order, tensor, assert_same_state
):
    loop = obedient_loop(tiny_run, orders)
    counters, _, _ = loop.iterate(Counters())
    before = loop.backend.learner("get_state")
    concerned = loop.family.sample(make_rng(0, Stream.TRAIN_TASKS, 1), 4)[3]
    (orders / order).write_text(str(concerned["goal"][0]))
    counters, metrics, skipped = loop.iterate(counters)
    assert (skipped.failure.tensor, skipped.failure.member) == (tensor, 3)
    assert skipped.task == concerned
    assert (counters.skipped, counters.skipped_in_a_row) == (1, 1)
    assert metrics["meta/skipped_updates"] == 1.0
    for part in (tensor, str(concerned), "run seed 0", "skipped"):
        assert part in str(skipped)
    assert_same_state(loop.backend.learner("get_state"), before)
    evidence = skipped.failure.arrays
    assert evidence["reward"].shape == (1, 20, 3)
    assert np.isnan(evidence[tensor]).any()
    counters, metrics, skipped = loop.iterate(counters)
    assert skipped is None
    assert (counters.skipped, counters.skipped_in_a_row) == (1, 0)
    assert metrics["meta/skipped_updates"] == 1.0


def test_a_skipped_iteration_is_named_like_its_row_in_the_records(tiny_run, orders):
    """Records count from 1, and the message must point to the row of the same number."""
    loop = obedient_loop(tiny_run, orders)
    (orders / "nan_reward").write_text(EVERY_TASK)
    counters, _, skipped = loop.iterate(Counters(iteration=4))
    assert skipped.iteration == counters.iteration
    assert f"iteration {counters.iteration}:" in str(skipped)


def test_only_the_iteration_with_nan_is_skipped(tiny_run, orders, assert_same_state):
    """The iteration after it has the tasks and data of its own place, whatever happened before."""
    loop, state = obedient_loop(tiny_run, orders), None
    (orders / "nan_reward").write_text(EVERY_TASK)
    counters, _, _ = loop.iterate(Counters())
    (orders / "nan_reward").unlink()
    loop.iterate(counters)
    other = obedient_loop(tiny_run, orders)
    other.iterate(Counters(iteration=1))
    state = other.backend.learner("get_state")
    assert_same_state(loop.backend.learner("get_state"), state)


def inject(monkeypatch, module, name, change):
    original = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a, **k: change(original(*a, **k)))


def spoil_member(step):
    return {name: p.index_fill(0, torch.tensor([2]), NAN) for name, p in step.items()}


def test_nan_in_an_inner_update_is_named(tiny_run, monkeypatch, assert_same_state):
    import learners.core.bilevel

    loop = serial_loop(tiny_run())
    before = loop.backend.learner("get_state")
    inject(monkeypatch, learners.core.bilevel, "sgd_step", spoil_member)
    counters, _, skipped = loop.iterate(Counters())
    assert skipped.failure.tensor.startswith("adapted/")
    assert "adapted/" in str(skipped)
    assert counters.skipped == 1
    assert_same_state(loop.backend.learner("get_state"), before)


def test_nan_in_the_outer_step_is_named(tiny_run, monkeypatch, assert_same_state):
    from learners.core import trust_region

    loop = serial_loop(tiny_run())
    before = loop.backend.learner("get_state")

    def spoil(found):
        vector = found.vector.clone()
        vector[5] = NAN
        return trust_region.LineSearch(vector, True, 1, found.loss, found.kl)

    inject(monkeypatch, learners.maml.trust_region, "line_search", spoil)
    counters, _, skipped = loop.iterate(Counters())
    assert skipped.failure.tensor.startswith("meta_params/")
    assert skipped.task is None
    assert "all tasks" in str(skipped)
    assert counters.skipped == 1
    assert_same_state(loop.backend.learner("get_state"), before)


@pytest.mark.parametrize("where", ["surrogate", "conjugate_gradient"])
def test_nan_in_the_outer_loss_or_direction_is_named(
    tiny_run, monkeypatch, where, assert_same_state
):
    loop = serial_loop(tiny_run())
    before = loop.backend.learner("get_state")
    module = learners.maml if where == "surrogate" else learners.maml.trust_region
    inject(monkeypatch, module, where, lambda tensor: tensor * NAN)
    counters, metrics, skipped = loop.iterate(Counters())
    assert_same_state(loop.backend.learner("get_state"), before)
    assert skipped is not None, "the step was refused without a word"
    assert "meta" in skipped.failure.tensor
    assert counters.skipped == 1
    assert metrics["meta/skipped_updates"] == 1.0


def test_nan_in_an_evaluation_is_named(tiny_run, orders):
    loop = obedient_loop(tiny_run, orders)
    tasks = evaluation_tasks(loop.family, 0, 4)
    (orders / "nan_reward").write_text(str(tasks[1]["goal"][0]))
    with pytest.raises(ArithmeticError, match="evaluation: reward is not finite") as caught:
        loop.evaluate(4)
    assert str(tasks[1]) in str(caught.value)
