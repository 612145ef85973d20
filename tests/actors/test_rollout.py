"""Collection: slots, chunks, carries and receipts."""

import copy
import math
import os
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.rollout import Request, RolloutWorker, Slot, make_slots, renew
from actors.tasks import load_family
from actors.tasks.delayed_chains import CHAINS
from actors.tasks.trials import Trials
from learners.core.normalizer import REWARD_STD, Normalizer
from learners.core.params import flatten_members, unflatten_members
from learners.core.policy import Policy
from learners.core.population import Population
from learners.core.trajectory import ENV_AXIS, Trajectory
from system.loop import carry_from_arrays, carry_to_arrays
from tests.system.families import Countdown

pytestmark = pytest.mark.usefixtures("torch_threads")

CARRIED = [
    "navigation-2d",
    "half-cheetah-dir",
    "ant-dir",
    "tabular-mdp",
    "catch",
    "random-walk-flip",
    "random-walk-off-policy",
]
HORIZON = 10
OPTIONS = {
    "bandit": {},
    "catch": {"rows": HORIZON + 1},
    "random-walk-flip": {"horizon": HORIZON, "flip_every": 7},
}


def family_of(name):
    return load_family(name, OPTIONS.get(name, {"horizon": HORIZON}))


def policy_of(family, hidden=(8,)):
    return Policy(family.spec, hidden, "tanh", 1.0)


def members_params(policy, num_members):
    """Every member's own parameters, as one flat read-only array [m, P]."""
    each = [
        policy.template() | policy.init(torch.Generator().manual_seed(m))
        for m in range(num_members)
    ]
    stacked = {name: torch.stack([params[name] for params in each]) for name in each[0]}
    flat = flatten_members(stacked).numpy()
    flat = flat + 0.1 * np.random.default_rng(3).normal(size=flat.shape).astype(np.float32)
    flat.setflags(write=False)
    return flat


def request_of(family, num_members=2, num_envs=3, num_steps=HORIZON, **changes):
    tasks = tuple(family.sample(np.random.default_rng(4), num_members))
    slot = Slot(7, (2, 2 + num_members), (3, 3 + num_envs))
    return Request(slot, tasks, (11, 12), version=5, num_steps=num_steps, **changes)


def collect(family, request, worker=None):
    policy = policy_of(family)
    worker = worker or RolloutWorker(family, policy)
    flat = members_params(policy, request.slot.num_members)
    chunk, receipt, _ = worker.collect(request, flat, request.version)
    return chunk, receipt


def collect_stream(family, request, worker=None, carry=None, policy=None):
    """A chunk of a stream, its receipt and its carry."""
    policy = policy or policy_of(family)
    worker = worker or RolloutWorker(family, policy)
    flat = members_params(policy, request.slot.num_members)
    return worker.collect(replace(request, stream=True), flat, request.version, carry)


def used_worker(family):
    """A worker that has collected something else before."""
    worker = RolloutWorker(family, policy_of(family))
    collect(family, replace(request_of(family), seeds=(91, 92)), worker)
    return worker


def assert_same_arrays(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


# Slots


@settings(deadline=None)
@given(
    num_members=st.integers(1, 12),
    num_envs=st.integers(1, 12),
    members_per_slot=st.integers(1, 15),
    envs_per_slot=st.integers(1, 15),
)
def test_slots_cover_every_member_and_environment_once(
    num_members, num_envs, members_per_slot, envs_per_slot
):
    slots = make_slots(num_members, num_envs, members_per_slot, envs_per_slot)
    covered = np.zeros((num_members, num_envs), int)
    for slot in slots:
        block = covered[slice(*slot.members), slice(*slot.envs)]
        assert block.shape == (slot.num_members, slot.num_envs)
        assert 0 < slot.num_members <= members_per_slot
        assert 0 < slot.num_envs <= envs_per_slot
        block += 1
    assert (covered == 1).all()
    assert [slot.id for slot in slots] == list(range(len(slots)))


def test_slots_go_through_the_environments_first():
    slots = make_slots(3, 4, 2, 3)
    assert [(slot.members, slot.envs) for slot in slots] == [
        ((0, 2), (0, 3)),
        ((0, 2), (3, 4)),
        ((2, 3), (0, 3)),
        ((2, 3), (3, 4)),
    ]


# Chunks


@pytest.mark.parametrize("name", [*CARRIED, "bandit", "half-cheetah-vel", "ant-goal"])
def test_a_chunk_has_the_fields_and_shapes_of_a_trajectory(name):
    family = family_of(name)
    spec = family.spec
    request = request_of(family, num_steps=spec.horizon)
    chunk, _ = collect(family, request)
    assert set(chunk.arrays) == {f.name for f in fields(Trajectory)} == set(ENV_AXIS)
    leading = (2, spec.horizon, 3)
    trailing = {"obs": (spec.obs_size,), "action": () if spec.discrete else (spec.action_size,)}
    of_streams = {"final_obs": (2, 0, 3, spec.obs_size), "discounted_return": (2, 0, 3)}
    of_streams["true_value"] = leading if spec.target_policy else (2, 0, 3)
    for array_name, array in chunk.arrays.items():
        expected = (
            (2, 3, spec.obs_size)
            if array_name == "last_obs"
            else leading + trailing.get(array_name, ())
        )
        assert array.shape == of_streams.get(array_name, expected), array_name
        assert array.flags.c_contiguous, array_name
        flag = array_name in ("terminated", "truncated")
        whole = spec.discrete and array_name == "action"
        assert array.dtype == (bool if flag else np.int64 if whole else np.float32), array_name
    assert (chunk.slot, chunk.version, chunk.tasks) == (request.slot, 5, request.tasks)


@pytest.mark.parametrize("name", CARRIED)
def test_a_chunk_is_the_same_for_any_worker_and_again(name):
    family = family_of(name)
    request = request_of(family)
    first, _ = collect(family, request)
    worker = used_worker(family)
    other, _ = collect(family, request, worker)
    again, _ = collect(family, request, worker)
    assert_same_arrays(first.arrays, other.arrays)
    assert_same_arrays(first.arrays, again.arrays)


@pytest.mark.parametrize("name", CARRIED)
def test_another_seed_gives_another_chunk(name):
    family = family_of(name)
    request = request_of(family)
    first, _ = collect(family, request)
    other_noise, _ = collect(family, replace(request, seeds=(11, 13)))
    assert not np.array_equal(first.arrays["action"], other_noise.arrays["action"])
    other_env, _ = collect(family, replace(request, seeds=(13, 12)))
    if name == "navigation-2d" or "walk" in name:  # deterministic but for the action noise
        assert_same_arrays(first.arrays, other_env.arrays)
    else:
        assert not np.array_equal(first.arrays["reward"], other_env.arrays["reward"])


def test_members_act_with_their_own_parameters_and_tasks():
    family = family_of("navigation-2d")
    policy = policy_of(family)
    request = request_of(family)
    flat = members_params(policy, 2)
    chunk, _, _ = RolloutWorker(family, policy).collect(request, flat, 5)
    swapped = replace(request, tasks=request.tasks[::-1])
    other, _, _ = RolloutWorker(family, policy).collect(swapped, flat[::-1].copy(), 5)
    a, b = chunk.arrays, other.arrays
    # At the origin, the noise of a row is what remains of it without its member's distribution.
    params = unflatten_members(torch.tensor(flat), policy.init(torch.Generator()))
    dist = policy.distribution(params, torch.zeros(2, 1, 2))
    mean, std = dist.mean.numpy(), dist.log_std.exp().numpy()
    assert not np.allclose(mean[0], mean[1])
    np.testing.assert_allclose(
        (a["action"][:, 0] - mean) / std, (b["action"][:, 0] - mean[::-1]) / std[::-1], atol=1e-5
    )
    goals = np.array([task["goal"] for task in request.tasks])
    for member in range(2):
        moved = np.clip(a["action"][member, 0], -0.1, 0.1)
        distance = np.linalg.norm(moved - goals[member], axis=1)
        np.testing.assert_allclose(a["reward"][member, 0], -distance, atol=1e-6)


@pytest.mark.parametrize("name", CARRIED)
def test_behaviour_log_prob_is_what_the_learner_recomputes(name):
    family = family_of(name)
    policy = policy_of(family)
    chunk, _ = collect(family, request_of(family))
    a = {name: torch.from_numpy(array) for name, array in chunk.arrays.items()}
    template = policy.init(torch.Generator())
    params = unflatten_members(torch.tensor(members_params(policy, 2)), template)
    dist = policy.distribution(params, a["obs"].flatten(1, 2))
    log_prob = dist.log_prob(a["action"].flatten(1, 2)).view_as(a["valid"]) * a["valid"]
    assert a["log_prob"].std() > 0.0
    torch.testing.assert_close(a["log_prob"], log_prob, rtol=1e-5, atol=1e-5)


def test_parameters_and_carry_are_left_as_they_were():
    family = family_of("half-cheetah-dir")
    policy = policy_of(family)
    flat = members_params(policy, 2)
    before = flat.copy()
    request = request_of(family, num_steps=4, stream=True)
    worker = RolloutWorker(family, policy)
    _, _, carry = worker.collect(request, flat, 5)
    untouched = copy.deepcopy(carry)
    worker.collect(request, flat, 5, carry)
    RolloutWorker(family, policy).collect(request, flat, 5, carry)
    np.testing.assert_array_equal(flat, before)
    for field in fields(carry):
        left, right = getattr(carry, field.name), getattr(untouched, field.name)
        if field.name == "env":
            assert_same_arrays(left, right)
        else:
            np.testing.assert_array_equal(left, right, err_msg=field.name)


# Streams


def joined(chunks):
    """Chunks of one stream as one."""
    names = [name for name in chunks[0].arrays if name != "last_obs"]
    out = {name: np.concatenate([c.arrays[name] for c in chunks], 1) for name in names}
    return out | {"last_obs": chunks[-1].arrays["last_obs"]}


@pytest.mark.parametrize("split", [5, 3])
@pytest.mark.parametrize("num_envs", [3, 8])
@pytest.mark.parametrize("name", [*CARRIED, "delayed-hopper"])
def test_chunks_carried_to_another_worker_are_one_chunk(name, num_envs, split):
    family = family_of(name)
    policy = replace(policy_of(family), normalizer=Normalizer(False, True, 0.9))
    flat = members_params(policy, 2)
    length = 2 * HORIZON + 3

    def ask(num_steps, worker, carry=None, seeds=(11, 12)):
        request = request_of(family, num_envs=num_envs, num_steps=num_steps, stream=True)
        return worker.collect(replace(request, seeds=seeds), flat, 5, carry)

    whole, _, _ = ask(length, RolloutWorker(family, policy))
    worker = RolloutWorker(family, policy)
    first, _, carry = ask(split, worker)
    # The seeds of the second request must not matter: all randomness is in the carry.
    live, _, _ = ask(length - split, worker, carry, (71, 72))
    moved, _, _ = ask(length - split, RolloutWorker(family, policy), carry, (73, 74))
    assert_same_arrays(whole.arrays, joined([first, live]))
    assert_same_arrays(whole.arrays, joined([first, moved]))


def test_a_carry_becomes_arrays_and_comes_back():
    family = family_of("delayed-hopper")
    _, _, carry = collect_stream(family, request_of(family, num_steps=4))
    again = carry_from_arrays(carry_to_arrays(carry))
    assert_same_arrays(again.env, carry.env)
    for field in fields(carry):
        if field.name not in ("env", "ticket"):
            left, right = getattr(again, field.name), getattr(carry, field.name)
            np.testing.assert_array_equal(left, right, err_msg=field.name)


STREAM_TASKS = ({"length": 2, "truncate": 0}, {"length": 3, "truncate": 1})


def test_a_new_episode_follows_at_once_where_one_ends():
    family = Countdown()
    request = Request(Slot(0, (0, 2), (0, 1)), STREAM_TASKS, (1, 2), 1, 7)
    chunk, receipt, carry = collect_stream(family, request)
    a = chunk.arrays
    assert a["valid"].all()
    assert a["reward"][0, :, 0].tolist() == [1, 2, 1, 2, 1, 2, 1]
    assert a["terminated"][0, :, 0].tolist() == [False, True] * 3 + [False]
    assert not a["truncated"][0].any()
    assert a["reward"][1, :, 0].tolist() == [1, 2, 3, 1, 2, 3, 1]
    assert np.flatnonzero(a["truncated"][1, :, 0]).tolist() == [2, 5]
    assert receipt.returns == [[3.0, 3.0, 3.0], [6.0, 6.0]]
    assert receipt.lengths == [[2.0, 2.0, 2.0], [3.0, 3.0]]
    assert receipt.num_steps == 14
    assert carry.num_steps.tolist() == [1, 1]
    assert carry.episode_return.tolist() == [1.0, 1.0]


def test_final_observations_stand_where_a_time_limit_ended_an_episode():
    family = Countdown()
    request = Request(Slot(0, (0, 2), (0, 1)), STREAM_TASKS, (1, 2), 1, 7)
    chunk, _, _ = collect_stream(family, request)
    a = chunk.arrays
    assert not a["final_obs"][0].any()
    final = a["final_obs"][1, :, 0]
    assert np.flatnonzero(final.any(-1)).tolist() == [2, 5]
    # The next observation is already the new episode's first.
    np.testing.assert_array_equal(a["obs"][1, 3, 0], a["obs"][1, 0, 0])
    assert not np.array_equal(final[2], a["obs"][1, 3, 0])


def test_rewards_are_normalized_first_and_then_paid_out_with_delay():
    family = Countdown(reward_delay=2)
    policy = replace(policy_of(family), normalizer=Normalizer(False, True, 0.5, clip=1.2))
    request = Request(Slot(0, (0, 1), (0, 1)), ({"length": 3, "truncate": 0},), (1, 2), 1, 7)
    flat = flatten_members({n: p.unsqueeze(0) for n, p in policy.template().items()})
    template = policy.template()
    params = unflatten_members(flat, template) | {REWARD_STD: torch.full((1, 1), 2.0)}
    worker = RolloutWorker(family, policy)
    chunk, receipt, carry = worker.collect(
        replace(request, stream=True), flatten_members(params).numpy(), 1
    )
    # Raw 1 2 3 | 1 2 3 | 1, halved 0.5 1 1.2 (clipped), paid at every second step and at the end.
    paid = chunk.arrays["reward"][0, :, 0]
    np.testing.assert_allclose(paid, [0, 1.5, 1.2, 0, 1.5, 1.2, 0], rtol=1e-6)
    discounted = chunk.arrays["discounted_return"][0, :, 0]
    np.testing.assert_allclose(discounted, [1, 2.5, 4.25, 1, 2.5, 4.25, 1], rtol=1e-6)
    assert receipt.returns == [[6.0, 6.0]]  # what is reported is raw
    assert carry.pending_reward.tolist() == [0.5]


def test_environments_that_cannot_be_saved_go_on_in_their_worker_only():
    family = load_family("gym:CartPole-v1")
    request = request_of(family, num_steps=6, stream=True)
    worker = RolloutWorker(family, policy_of(family))
    first, _, carry = collect_stream(family, request, worker)
    assert carry.env == {}
    going, _, _ = collect_stream(family, request, worker, carry)
    np.testing.assert_array_equal(going.arrays["obs"][:, 0], first.arrays["last_obs"])
    elsewhere, _, _ = collect_stream(family, request, None, carry)
    np.testing.assert_array_equal(elsewhere.arrays["obs"][:, 0], first.arrays["obs"][:, 0])


def test_a_life_lost_ends_what_is_learned_from_and_not_what_is_reported():
    family = Countdown(lives=2)
    request = Request(Slot(0, (0, 1), (0, 1)), ({"length": 2, "truncate": 0},), (1, 2), 1, 8)
    chunk, receipt, _ = collect_stream(family, request)
    assert np.flatnonzero(chunk.arrays["terminated"][0, :, 0]).tolist() == [1, 3, 5, 7]
    assert receipt.returns == [[6.0, 6.0]]
    whole, whole_receipt = collect(family, replace(request, stream=False))
    assert whole_receipt.returns == [[6.0]]
    assert whole.arrays["valid"][0, :, 0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


def trials_of_two_lengths(**changes):
    """Two members' trials of two episodes each, that take 4 and 6 steps."""
    family = Trials(Countdown(horizon=3), 2)
    request = Request(Slot(0, (0, 2), (0, 1)), STREAM_TASKS, (1, 2), 1, 6)
    return family, replace(request, **changes)


def test_the_episodes_of_a_trial_are_reported_and_the_trial_goes_on():
    family, request = trials_of_two_lengths()
    chunk, receipt = collect(family, request)
    a = chunk.arrays
    assert receipt.returns == [[3.0, 3.0], [6.0, 6.0]]
    assert receipt.lengths == [[2.0, 2.0], [3.0, 3.0]]
    assert receipt.num_steps == 10
    assert a["reward"][:, :, 0].tolist() == [[1, 2, 1, 2, 0, 0], [1, 2, 3, 1, 2, 3]]
    assert a["valid"][:, :, 0].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert a["episode_return"][:, :, 0].tolist() == [[0, 3, 0, 3, 0, 0], [0, 0, 6, 0, 0, 6]]
    assert a["episode_length"][:, :, 0].tolist() == [[0, 2, 0, 2, 0, 0], [0, 0, 3, 0, 0, 3]]
    assert [np.flatnonzero(row).tolist() for row in a["terminated"][:, :, 0]] == [[3], [5]]
    assert not a["truncated"].any()
    _, unkept = collect(family, replace(request, keep_data=False))
    assert (unkept.returns, unkept.lengths) == (receipt.returns, receipt.lengths)


def test_a_stream_of_trials_reports_their_episodes():
    family, request = trials_of_two_lengths(num_steps=9)
    chunk, receipt, carry = collect_stream(family, request)
    assert receipt.returns == [[3.0] * 4, [6.0] * 3]
    assert receipt.lengths == [[2.0] * 4, [3.0] * 3]
    terminated = chunk.arrays["terminated"][:, :, 0]
    assert [np.flatnonzero(row).tolist() for row in terminated] == [[3, 7], [5]]
    assert carry.num_steps.tolist() == [1, 0]
    assert carry.episode_return.tolist() == [1.0, 0.0]
    # A new trial begins with an end and without action and reward.
    assert chunk.arrays["obs"][0, [0, 4, 8], 0, 2:].tolist() == [[0, 0, 1]] * 3
    assert chunk.arrays["obs"][0, 2, 0, 3:].tolist() == [2, 1]


def test_a_staggered_stream_of_trials_counts_their_episodes_whole():
    family, request = trials_of_two_lengths(slot=Slot(0, (0, 2), (0, 20)), stagger=True)
    _, receipt, _ = collect_stream(family, request)
    assert set(receipt.returns[0]) == {3.0}
    assert set(receipt.returns[1]) == {6.0}
    assert [set(lengths) for lengths in receipt.lengths] == [{2.0}, {3.0}]


def test_a_chunk_that_is_not_wanted_leaves_its_receipt():
    family = family_of("half-cheetah-dir")
    request = request_of(family)
    chunk, receipt = collect(family, replace(request, keep_data=False))
    _, full = collect(family, request)
    assert chunk.arrays == {}
    assert (receipt.returns, receipt.num_steps) == (full.returns, full.num_steps)


# Ends of episodes


@pytest.fixture
def countdown():
    """A chunk of `Countdown` with its request and receipt; lengths 1, 2, 6 and 4."""
    family = Countdown()
    tasks = tuple(
        {"length": length, "truncate": truncate}
        for length, truncate in [(1, 0), (2, 1), (6, 0), (4, 1)]
    )
    request = Request(Slot(3, (0, 4), (0, 2)), tasks, (1, 2), 1, family.horizon)
    chunk, receipt = collect(family, request)
    return chunk.arrays, receipt, [task["length"] for task in tasks]


def test_steps_after_an_early_end_are_not_valid_and_zero(countdown):
    arrays, _, lengths = countdown
    for member, length in enumerate(lengths):
        assert (arrays["valid"][member, :length] == 1.0).all()
        for name, array in arrays.items():
            if name != "last_obs":
                assert not array[member, length:].any(), name


def test_rewards_ends_returns_and_lengths_stand_at_their_step(countdown):
    arrays, _, lengths = countdown
    for member, length in enumerate(lengths):
        steps = np.arange(1, length + 1)
        for env in range(2):
            np.testing.assert_array_equal(arrays["reward"][member, :length, env], steps)
            for name, at_end in [
                ("episode_return", steps.sum()),
                ("episode_length", length),
                ("terminated", member in (0, 2)),
                ("truncated", member in (1, 3)),
            ]:
                expected = np.zeros(6)
                expected[length - 1] = at_end
                np.testing.assert_array_equal(arrays[name][member, :, env], expected, err_msg=name)


def test_what_an_ended_environment_returns_is_ignored(countdown):
    arrays, _, _ = countdown
    for name, array in arrays.items():
        assert np.isfinite(array).all(), name


def test_collection_stops_once_all_episodes_are_over():
    family = Countdown(horizon=50)
    tasks = ({"length": 2, "truncate": 0}, {"length": 3, "truncate": 0})
    worker = RolloutWorker(family, policy_of(family))
    worker.envs["size", 4] = env = family.make(4)
    request = Request(Slot(0, (0, 2), (0, 2)), tasks, (1, 2), 1, family.horizon)
    chunk, receipt = collect(family, request, worker)
    assert env._steps.max() == 3
    assert receipt.num_steps == 10
    assert chunk.arrays["valid"].shape == (2, 50, 2)


def test_a_receipt_sums_the_chunk_up(countdown):
    arrays, receipt, lengths = countdown
    assert receipt.slot_id == 3
    assert receipt.num_steps == 2 * sum(lengths)
    assert receipt.lengths == [[float(length)] * 2 for length in lengths]
    assert receipt.returns == [[length * (length + 1.0) / 2] * 2 for length in lengths]
    assert receipt.worker == os.getpid()
    assert receipt.num_bytes == sum(array.nbytes for array in arrays.values())
    assert receipt.seconds > 0.0


@pytest.mark.parametrize("name", CARRIED)
def test_returns_and_receipts_agree_with_a_slow_count(name):
    family = family_of(name)
    chunk, receipt = collect(family, request_of(family))
    a = chunk.arrays
    num_steps, totals = 0, []
    for member in range(2):
        episodes = []
        for env in range(3):
            total, length = 0.0, 0
            for t in range(HORIZON):
                total, length = total + float(a["reward"][member, t, env]), length + 1
                if a["terminated"][member, t, env] or a["truncated"][member, t, env]:
                    assert a["episode_length"][member, t, env] == length
                    assert math.isclose(
                        a["episode_return"][member, t, env], total, rel_tol=1e-5, abs_tol=1e-5
                    )
                    break
            num_steps += length
            episodes.append(total)
        totals.append(sum(episodes))
    assert receipt.num_steps == num_steps
    np.testing.assert_allclose([sum(r) for r in receipt.returns], totals, rtol=1e-5, atol=1e-5)


def test_a_staggered_stream_begins_everywhere_in_an_episode():
    family = load_family("catch")
    slot = Slot(0, (0, 2), (0, 40))
    request = Request(slot, ({}, {}), (3, 4), 1, 3, stream=True, stagger=True)
    chunk, _ = collect(family, request)
    rows = chunk.arrays["obs"][:, 0].reshape(80, 6, 11)[:, :5].any(2)
    assert (rows.sum(1) == 1).all()
    assert np.bincount(rows.argmax(1), minlength=5).min() >= 8
    assert sorted(set(chunk.arrays["episode_length"].flatten().tolist())) == [0.0, 5.0]
    assert set(np.unique(chunk.arrays["episode_return"])) <= {-1.0, 0.0, 1.0}
    again, _ = collect(family, request)
    for name, array in chunk.arrays.items():
        np.testing.assert_array_equal(array, again.arrays[name])


def test_an_episode_that_a_staggered_stream_enters_is_counted_whole():
    """Episodes of the random walk end when they do: their lengths count the steps before."""
    family = load_family("random-walk-flip", {"horizon": 9})
    request = Request(Slot(0, (0, 1), (0, 200)), ({},), (3, 4), 1, 1, stream=True, stagger=True)
    chunk, _ = collect(family, request)
    lengths = chunk.arrays["episode_length"]
    assert lengths.max() == 9.0
    assert len(np.unique(lengths)) > 3


# Lifetimes


WORLDS = "chain-short,random-small-sparse"


def worlds_of(names=WORLDS, num_members=6):
    """A family of kinds of environment, its agents, their parameters, and two tasks for each."""
    family = load_family("worlds", {"names": names})
    population = Population(family.spec, (4,), 3)
    params = []
    for block in population.blocks(num_members, num_members):
        generator = torch.Generator().manual_seed(block.world)
        template = block.agent.network.init(generator)
        stacked = {n: p.expand(block.own[1], *p.shape) for n, p in template.items()}
        flat = flatten_members(stacked).numpy()
        rng = np.random.default_rng(block.world)
        params.append(flat + rng.normal(size=flat.shape).astype(np.float32))
    rng = np.random.default_rng(4)
    return family, population, params, [family.sample(rng, num_members) for _ in range(2)]


def three_members(tasks, num_steps=9, **changes):
    slot = Slot(7, (0, 3), (0, 2))
    return Request(slot, tuple(tasks[:3]), (11, 12), 5, num_steps, stream=True, **changes)


@pytest.mark.parametrize("kept_alive", [True, False])
def test_renewed_members_get_new_tasks_and_episodes_and_the_others_go_on(kept_alive):
    family, population, params, (old, new) = worlds_of("chain-short", 3)

    def go_on(request):
        """From the same carry: in the environments that stopped there, or in others."""
        first = RolloutWorker(family, population)
        _, _, own = first.collect(three_members(old), params[0], 5)
        taker = first if kept_alive else RolloutWorker(family, population)
        return taker.collect(request, params[0], 5, own)

    mixed = [old[0], new[1], old[2]]
    assert new[1]["level"] != old[1]["level"]
    plain, plain_receipt, plain_carry = go_on(three_members(old, 70))
    renewed, receipt, after = go_on(three_members(mixed, 70, renew=(1,)))
    for name, array in plain.arrays.items():
        np.testing.assert_array_equal(renewed.arrays[name][[0, 2]], array[[0, 2]], err_msg=name)
    for m in (0, 2):
        assert receipt.returns[m] == plain_receipt.returns[m]
        assert receipt.lengths[m] == plain_receipt.lengths[m]
    np.testing.assert_array_equal(after.noise, plain_carry.noise)
    # The renewed one starts at the first state, and its episodes are as long as its new chain.
    length = length_of(new[1])
    assert length != length_of(old[1])
    assert (renewed.arrays["obs"][1, 0, :, 1] == 0).all()
    assert (plain.arrays["obs"][1, 0, :, 1] > 0).all()
    assert receipt.lengths[1] == [length] * (2 * (70 // length))
    assert {abs(total) for total in receipt.returns[1]} == {1.0}
    assert after.num_steps[2:4].tolist() == [70 % length] * 2
    assert renewed.tasks == tuple(mixed)
    # And what follows is a stream like any other.
    further, _, _ = RolloutWorker(family, population).collect(
        three_members(mixed), params[0], 5, after
    )
    np.testing.assert_array_equal(further.arrays["obs"][:, 0], renewed.arrays["last_obs"])


def length_of(task):
    """Steps of an episode of a short chain."""
    return CHAINS["chain-short"].level(task["level"])[0]


@pytest.mark.parametrize("names", ["chain-short", "random-small-sparse", "sampled"])
def test_renewal_is_the_same_in_live_and_in_restored_environments(names):
    family, population, params, (old, new) = worlds_of(names, 3)
    chunks = []
    for elsewhere in (False, True):
        worker = RolloutWorker(family, population)
        _, _, carry = worker.collect(three_members(old), params[0], 5)
        request = three_members([new[0], old[1], new[2]], 30, renew=(0, 2))
        if elsewhere:
            worker = RolloutWorker(family, population)
            carry = carry_from_arrays(carry_to_arrays(carry))
        chunks.append(worker.collect(request, params[0], 5, carry))
    assert_same_arrays(chunks[0][0].arrays, chunks[1][0].arrays)
    assert_same_arrays(chunks[0][2].env, chunks[1][2].env)


def test_renewal_changes_what_is_carried_of_the_renewed_alone():
    family, population, params, (old, new) = worlds_of("random-small-sparse", 3)
    worker = RolloutWorker(family, population)
    _, _, carry = worker.collect(three_members(old), params[0], 5)
    rng = np.random.default_rng(0)
    names = ("episode_return", "discounted_return", "pending_reward")
    carry = replace(carry, **{n: rng.normal(size=6).astype(np.float32) for n in names})
    carry = replace(carry, num_steps=1 + np.arange(6))
    before = copy.deepcopy(carry)
    env = worker.envs["slot", 7]
    request = three_members([new[0], old[1], new[2]], renew=(0, 2))
    after = renew(env, family.spec, request, carry)
    anew, same = [0, 1, 4, 5], [2, 3]
    for name in (*names, "num_steps"):
        found, there = getattr(after, name), getattr(before, name)
        assert found.dtype == there.dtype
        assert not found[anew].any(), name
        np.testing.assert_array_equal(found[same], there[same], err_msg=name)
        np.testing.assert_array_equal(getattr(carry, name), there, err_msg=name)
    assert not after.ended.any()
    np.testing.assert_array_equal(after.obs[same], before.obs[same])
    assert (
        after.obs[anew, 0] == np.repeat([new[0]["num_actions"], new[2]["num_actions"]], 2)
    ).all()
    np.testing.assert_array_equal(carry.obs, before.obs)


def test_the_first_request_of_a_stream_begins_everything():
    family, population, params, (_, new) = worlds_of("random-small-sparse", 3)
    chunks = [
        RolloutWorker(family, population).collect(three_members(new, renew=which), params[0], 5)[0]
        for which in ((), (0, 1, 2))
    ]
    assert_same_arrays(chunks[0].arrays, chunks[1].arrays)


@settings(deadline=None)
@given(
    num_worlds=st.integers(1, 5),
    num_members=st.integers(5, 16),
    num_envs=st.integers(1, 4),
    members_per_slot=st.integers(1, 20),
    envs_per_slot=st.integers(1, 5),
)
def test_slots_never_mix_worlds(num_worlds, num_members, num_envs, members_per_slot, envs_per_slot):
    slots = make_slots(num_members, num_envs, members_per_slot, envs_per_slot, num_worlds)
    covered = np.zeros((num_members, num_envs), int)
    for slot in slots:
        assert 0 < slot.num_members <= members_per_slot
        assert 0 < slot.num_envs <= envs_per_slot
        assert len({m * num_worlds // num_members for m in range(*slot.members)}) == 1
        covered[slice(*slot.members), slice(*slot.envs)] += 1
    assert (covered == 1).all()
    assert [slot.id for slot in slots] == list(range(len(slots)))


def test_slots_know_the_worlds_that_tasks_have():
    _, population, _, (tasks, _) = worlds_of("chain-short,chain-long,random-small-sparse", 7)
    for slot in make_slots(7, 2, 2, 2, 3):
        (world,) = {task["world"] for task in tasks[slice(*slot.members)]}
        assert population.block(7, slot.members).world == world


@pytest.mark.parametrize("members", [(0, 3), (3, 6), (4, 6)])
def test_a_slot_acts_with_the_parameters_of_its_world(members):
    """The probabilities of its actions are those of that world's network, member by member."""
    family, population, params, (tasks, _) = worlds_of()
    block = population.block(6, members)
    own = params[block.world][slice(*block.own)]
    request = Request(
        Slot(1, members, (0, 2)), tuple(tasks[slice(*members)]), (1, 2), 5, 20, stream=True
    )
    worker = RolloutWorker(family, population)
    # Another world's slot before it, in the same worker, changes nothing.
    other = (3, 6) if block.world == 0 else (0, 3)
    before = replace(request, slot=Slot(0, other, (0, 2)), tasks=tuple(tasks[slice(*other)]))
    worker.collect(before, params[1 - block.world], 5)
    chunk, _, _ = worker.collect(request, own, 5)
    fresh, _, _ = RolloutWorker(family, population).collect(request, own, 5)
    assert_same_arrays(chunk.arrays, fresh.arrays)
    a = {name: torch.from_numpy(array) for name, array in chunk.arrays.items()}
    template = block.agent.network.init(torch.Generator())
    heads = block.agent.heads(
        unflatten_members(torch.tensor(own), template), a["obs"].flatten(1, 2)
    )
    log_prob = heads.policy.log_prob(a["action"].flatten(1, 2)).view_as(a["log_prob"])
    torch.testing.assert_close(a["log_prob"], log_prob, rtol=1e-5, atol=1e-5)
    assert a["log_prob"].std() > 0.0
    for task, action, obs in zip(request.tasks, a["action"], a["obs"], strict=True):
        assert int(action.max()) < task["num_actions"]
        assert (obs[..., 0] == task["num_actions"]).all()
    with pytest.raises(RuntimeError):  # those of the other world do not even fit
        worker.collect(request, params[1 - block.world], 5)


def test_tasks_without_a_world_act_with_the_one_policy():
    family = load_family("catch", {"rows": HORIZON + 1})
    population = Population(family.spec, (4,), 3)
    generator = torch.Generator().manual_seed(0)
    template = population.agents[0].network.init(generator)
    flat = flatten_members({n: p.expand(2, *p.shape) for n, p in template.items()}).numpy()
    chunk, receipt, _ = RolloutWorker(family, population).collect(request_of(family), flat, 5)
    assert chunk.arrays["obs"].dtype == np.float32
    assert receipt.num_steps == 2 * 3 * HORIZON
