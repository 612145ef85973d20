"""What every built-in family promises, and what every saved environment state does."""

import json
import pickle

import numpy as np
import pytest
import torch

from actors.family import TaskFamily
from actors.tasks import load_family

OPTIONS = {
    "navigation-2d": {"horizon": 12},
    "half-cheetah-dir": {"horizon": 12},
    "half-cheetah-vel": {"horizon": 12, "action_scale": 0.5},
    "ant-dir": {"horizon": 12},
    "ant-vel": {"horizon": 12, "contact_obs": True},
    "ant-goal": {"horizon": 12, "action_scale": 0.1},
    "hopper": {"horizon": 12},
    "half-cheetah": {"horizon": 12},
    "walker2d": {"horizon": 12},
    "ant": {"horizon": 12},
    "humanoid": {"horizon": 12},
    "delayed-hopper": {"horizon": 12},
    "bandit": {"arms": 3, "pulls": 12},
    "tabular-mdp": {"horizon": 12},
    "catch": {"rows": 13},
    "random-walk-flip": {"horizon": 12, "flip_every": 7},
    "random-walk-off-policy": {"horizon": 12},
    "maze": {"horizon": 12},
}
WITHOUT_RANDOMNESS = ("navigation-2d", "random-walk-flip", "random-walk-off-policy", "maze")
TOYS = ("navigation-2d", "bandit", "tabular-mdp", "catch", *WITHOUT_RANDOMNESS[1:])
NUM_ENVS = 4


def family_of(name):
    return load_family(name, OPTIONS[name])


def actions_of(family, seed, num_steps=12):
    rng = torch.Generator().manual_seed(seed)
    spec = family.spec
    if spec.discrete:
        return torch.randint(spec.action_size, (num_steps, NUM_ENVS), generator=rng)
    return torch.randn(num_steps, NUM_ENVS, spec.action_size, generator=rng)


def roll(env, actions):
    """Observations, rewards and ends of all steps, as arrays."""
    steps = [[np.array(part) for part in env.step(action)[:4]] for action in actions]
    return [np.stack(part) for part in zip(*steps, strict=True)]


def started(family, seed=3):
    env = family.make(NUM_ENVS)
    tasks = family.sample(np.random.default_rng(5), NUM_ENVS)
    obs, info = env.reset(seed=seed, options={"tasks": tasks})
    return env, obs, info


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)


every_family = pytest.mark.parametrize("name", OPTIONS)


@every_family
def test_shapes_types_and_horizon(name):
    family = family_of(name)
    assert isinstance(family, TaskFamily)
    env, obs, info = started(family)
    assert info == {}
    assert np.asarray(obs).shape == (NUM_ENVS, family.spec.obs_size)
    assert np.asarray(obs).dtype == np.float32
    assert env.observation_space.contains(np.asarray(obs))
    assert env.single_observation_space.shape == (family.spec.obs_size,)
    horizon = family.spec.horizon
    obs, reward, terminated, truncated = roll(env, actions_of(family, 0, horizon))
    assert obs.dtype == np.float32
    assert reward.dtype == np.float32
    assert reward.shape == (horizon, NUM_ENVS)
    assert np.isfinite(obs).all()
    assert np.isfinite(reward).all()
    assert terminated.dtype == bool
    assert truncated.dtype == bool
    assert terminated[-1].all()
    assert not truncated.any()
    if name.startswith("half-cheetah"):
        assert not terminated[:-1].any()


@every_family
def test_returned_arrays_are_never_changed_later(name):
    family = family_of(name)
    env, start, _ = started(family)
    actions = actions_of(family, 0)
    first = env.step(actions[0])[:4]
    kept = [np.array(start), *[np.array(part) for part in first]]
    before = actions.clone()
    roll(env, actions[1:])
    assert_same([np.array(start), *[np.array(part) for part in first]], kept)
    assert torch.equal(actions, before)


@every_family
def test_an_ended_environment_stays_ended_with_reward_zero(name):
    family = family_of(name)
    env, _, _ = started(family)
    roll(env, actions_of(family, 0))
    _, reward, terminated, _ = roll(env, actions_of(family, 1, 3))
    assert terminated.all()
    assert (reward == 0).all()
    env.reset()
    assert not np.array(env.step(actions_of(family, 0)[0])[2]).any() or family.spec.horizon == 1


@every_family
def test_seed_decides_everything(name):
    family = family_of(name)
    actions = actions_of(family, 0)
    runs = []
    for seed in (3, 3, 4):
        env, obs, _ = started(family, seed)
        runs.append([np.array(obs), *roll(env, actions)])
    assert_same(runs[0], runs[1])
    if name not in WITHOUT_RANDOMNESS:
        draws = [np.concatenate([run[1].ravel(), run[2].ravel()]) for run in runs]
        # A single pull of four bandits may agree by chance: there the stream is compared.
        if name == "bandit":
            streams = [roll_streams(family, seed) for seed in (3, 4)]
            assert (streams[0] != streams[1]).any()
        else:
            assert (draws[0] != draws[2]).any()


def roll_streams(family, seed):
    env, _, _ = started(family, seed)
    rewards = []
    for _ in range(30):
        env.reset()
        rewards.append(np.array(env.step(torch.zeros(NUM_ENVS, dtype=torch.int64))[1]))
    return np.stack(rewards)


@every_family
def test_reset_without_seed_goes_on_with_the_stream(name):
    family = family_of(name)
    actions = actions_of(family, 0)
    runs = []
    for _ in range(2):
        env, _, _ = started(family)
        roll(env, actions)
        obs, _ = env.reset()
        runs.append([np.array(obs), *roll(env, actions)])
    assert_same(*runs)


@every_family
def test_the_global_generators_play_no_part(name):
    family = family_of(name)
    actions = actions_of(family, 0)
    runs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        env, _, _ = started(family)
        runs.append(roll(env, actions))
    torch_state = torch.get_rng_state()
    roll(started(family)[0], actions)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert_same(*runs)


@every_family
@pytest.mark.parametrize("taken_after", [0, 5])
def test_restored_in_another_object_it_goes_on_bit_for_bit(name, taken_after):
    family = family_of(name)
    actions = actions_of(family, 0)
    env, _, _ = started(family)
    roll(env, actions[:taken_after])
    state = env.state()
    assert all(isinstance(array, np.ndarray) for array in state.values())
    assert all(array.dtype != object for array in state.values())
    kept = {key: array.copy() for key, array in state.items()}

    def finish(env):
        rest = roll(env, actions[taken_after:])
        obs, _ = env.reset()  # without a seed: the random stream is part of the state
        return [*rest, np.array(obs), *roll(env, actions)]

    uninterrupted = finish(env)
    other = family.make(NUM_ENVS)
    other.reset(seed=99, options={"tasks": family.sample(np.random.default_rng(8), NUM_ENVS)})
    roll(other, actions[:3])
    other.restore(state)
    fresh = family.make(NUM_ENVS)
    fresh.restore(state)
    assert_same(finish(other), uninterrupted)
    assert_same(finish(fresh), uninterrupted)
    assert all(np.array_equal(state[key], kept[key]) for key in kept)


@every_family
def test_a_partial_reset_starts_the_masked_environments_alone(name):
    family = family_of(name)
    env, _, _ = started(family)
    actions = actions_of(family, 0)
    for action in actions[:5]:
        obs = np.array(env.step(action)[0])
    before = env.state()
    mask = np.array([False, True, False, True])
    start, info = env.reset(options={"reset_mask": mask})
    assert info == {}
    start = np.array(start)
    np.testing.assert_array_equal(start[~mask], obs[~mask])
    after = env.state()
    assert after["steps"][mask].tolist() == [0, 0]
    assert not after["ended"][mask].any()
    for key, array in before.items():
        if key not in ("rng", "num_bad_states"):
            np.testing.assert_array_equal(after[key][~mask], array[~mask])
    if name not in ("bandit", "tabular-mdp", *WITHOUT_RANDOMNESS):
        assert (start[mask] != obs[mask]).any(1).all()
        assert (start[1] != start[3]).any()
    other = family.make(NUM_ENVS)
    other.restore(after)
    again = {"reset_mask": ~mask}

    def finish(env):
        first = roll(env, actions[:4])
        obs, _ = env.reset(options=again)
        return [*first, np.array(obs), *roll(env, actions)]

    left = finish(env)
    assert_same(left, finish(other))
    assert left[-2][-1].all()  # the horizon ends all of them


@every_family
def test_steps_after_a_partial_reset_do_not_depend_on_it_elsewhere(name):
    family = family_of(name)
    actions = actions_of(family, 0)
    runs = []
    for mask in ([False] * NUM_ENVS, [False, True, False, False]):
        env, _, _ = started(family)
        roll(env, actions[:3])
        env.reset(seed=3, options={"reset_mask": np.array(mask)})
        runs.append(roll(env, actions[3:]))
    for left, right in zip(*runs, strict=True):
        np.testing.assert_array_equal(left[:, [0, 2, 3]], right[:, [0, 2, 3]])
    assert runs[1][2][-1, [0, 2, 3]].all()
    assert not runs[1][2][0, 1]


@pytest.mark.parametrize("name", TOYS)
def test_a_partial_reset_gives_new_tasks_to_the_masked_alone(name):
    family = family_of(name)
    env, _, _ = started(family)
    actions = actions_of(family, 0)
    obs = roll(env, actions[:3])[0][-1]
    before = env.state()
    mask = np.array([True, False, False, True])
    tasks = family.sample(np.random.default_rng(8), NUM_ENVS)
    fresh = family.make(NUM_ENVS)
    options = {"reset_mask": mask, "tasks": tasks}
    with pytest.raises(ValueError, match="first reset needs"):
        fresh.reset(options=options)
    whole, _ = fresh.reset(seed=9, options={"tasks": tasks})
    start = np.array(env.reset(seed=9, options=options)[0])
    np.testing.assert_array_equal(start, np.where(mask[:, None], np.array(whole), obs))
    after, new = env.state(), fresh.state()
    for key, array in before.items():
        if key != "rng":
            np.testing.assert_array_equal(after[key][~mask], array[~mask])
            np.testing.assert_array_equal(after[key][mask], new[key][mask])
    np.testing.assert_array_equal(after["rng"], new["rng"])
    env.restore(before)
    continued = np.array(env.reset(options=options)[0])
    np.testing.assert_array_equal(continued[~mask], obs[~mask])
    if name == "catch":
        assert (env.state()["rng"] != after["rng"]).any()


@every_family
def test_bad_masks_are_named_and_change_nothing(name):
    family = family_of(name)
    env = family.make(NUM_ENVS)
    mask = np.ones(NUM_ENVS, bool)
    with pytest.raises(ValueError, match="first reset needs"):
        env.reset(options={"reset_mask": mask})
    env, _, _ = started(family)
    before = env.state()
    for bad in (mask[:2], mask[None], mask.astype(int), mask.astype(np.float32)):
        with pytest.raises(ValueError, match=r"reset_mask must be bool of shape \(4,\)"):
            env.reset(seed=1, options={"reset_mask": bad})
    tasks = family.sample(np.random.default_rng(0), NUM_ENVS)
    if name not in TOYS:
        with pytest.raises(ValueError, match="not both"):
            env.reset(options={"reset_mask": mask, "tasks": tasks})
    after = env.state()
    assert all(np.array_equal(before[key], after[key]) for key in before)


@every_family
def test_state_of_another_batch_is_refused_and_changes_nothing(name):
    family = family_of(name)
    env, _, _ = started(family)
    before = env.state()
    other = family.make(NUM_ENVS + 1)
    other.reset(seed=0, options={"tasks": family.sample(np.random.default_rng(0), NUM_ENVS + 1)})
    with pytest.raises(ValueError, match="another environment"):
        env.restore(other.state())
    changed = {key: np.zeros_like(array) for key, array in before.items()}
    for missing in before:
        partial = {key: array for key, array in changed.items() if key != missing}
        with pytest.raises(ValueError, match=f"no '{missing}'"):
            env.restore(partial)
    after = env.state()
    assert all(np.array_equal(before[key], after[key]) for key in before)


@every_family
def test_tasks_are_plain_numbers_and_depend_on_the_generator_alone(name):
    family = family_of(name)
    tasks = family.sample(np.random.default_rng(1), 6)
    assert len(tasks) == 6
    assert tasks == family.sample(np.random.default_rng(1), 6)
    assert tasks == json.loads(json.dumps(tasks))
    assert pickle.loads(pickle.dumps(family)) == family
    if family.finite_tasks is None:
        assert tasks != family.sample(np.random.default_rng(2), 6)
    else:
        assert all(task in family.finite_tasks for task in tasks)


@every_family
def test_bad_resets_and_actions_are_named(name):
    family = family_of(name)
    env = family.make(NUM_ENVS)
    with pytest.raises(ValueError, match="first reset needs"):
        env.reset(seed=0)
    with pytest.raises(ValueError, match="4 environments, 2 tasks"):
        env.reset(seed=0, options={"tasks": family.sample(np.random.default_rng(0), 2)})
    for entry in list(family.sample(np.random.default_rng(0), 1)[0])[:1]:
        with pytest.raises(ValueError, match="task 0 has no"):
            env.reset(seed=0, options={"tasks": [{"nothing": 1.0}] * NUM_ENVS})
        with pytest.raises(ValueError, match="finite number"):
            env.reset(seed=0, options={"tasks": [{entry: float("nan")}] * NUM_ENVS})
    env.reset(seed=0, options={"tasks": family.sample(np.random.default_rng(0), NUM_ENVS)})
    with pytest.raises(ValueError, match="expected"):
        env.step(actions_of(family, 0)[0][:1])


@pytest.mark.parametrize("name", ["half-cheetah-dir", "ant-dir"])
def test_directions_are_finite_and_balanced(name):
    family = load_family(name)
    assert family.finite_tasks == [{"direction": 1.0}, {"direction": -1.0}]
    rng = np.random.default_rng(0)
    first = []
    for _ in range(200):
        signs = [task["direction"] for task in family.sample(rng, 6)]
        assert sorted(signs) == [-1.0] * 3 + [1.0] * 3
        first.append(signs[0])
    assert 60 < first.count(1.0) < 140
    odd = [sum(task["direction"] for task in family.sample(rng, 3)) for _ in range(200)]
    assert set(odd) == {-1.0, 1.0}
    assert 60 < odd.count(1.0) < 140


@pytest.mark.parametrize(
    ("name", "entry", "low", "high"),
    [
        ("navigation-2d", "goal", -0.5, 0.5),
        ("half-cheetah-vel", "velocity", 0.0, 2.0),
        ("ant-vel", "velocity", 0.0, 3.0),
        ("ant-goal", "goal", -3.0, 3.0),
        ("bandit", "means", 0.0, 1.0),
    ],
)
def test_continuous_tasks_are_uniform(name, entry, low, high):
    drawn = load_family(name).sample(np.random.default_rng(0), 2000)
    values = np.array([task[entry] for task in drawn])
    assert values.min() >= low
    assert values.max() <= high
    np.testing.assert_allclose(
        np.quantile(values, [0.25, 0.5, 0.75], axis=0).mean(-1)
        if values.ndim > 1
        else np.quantile(values, [0.25, 0.5, 0.75]),
        low + (high - low) * np.array([0.25, 0.5, 0.75]),
        atol=0.05 * (high - low),
    )
    assert load_family(name).finite_tasks is None


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("navigation-2d", {"horizon": 0}),
        ("navigation-2d", {"horizon": 1.5}),
        ("navigation-2d", {"horizon": True}),
        ("navigation-2d", {"action_scale": 0.0}),
        ("half-cheetah-dir", {"control_cost": -0.1}),
        ("half-cheetah-dir", {"control_cost": float("nan")}),
        ("half-cheetah-vel", {"max_velocity": 0}),
        ("half-cheetah-vel", {"max_velocity": "fast"}),
        ("half-cheetah-vel", {"horizon": -3}),
        ("ant-dir", {"action_scale": float("inf")}),
        ("ant-vel", {"max_velocity": -1.0}),
        ("ant-goal", {"contact_obs": 1}),
        ("bandit", {"arms": 1}),
        ("tabular-mdp", {"states": 1}),
        ("tabular-mdp", {"actions": "5"}),
        ("catch", {"rows": 1}),
        ("catch", {"rows": 6.0}),
        ("catch", {"columns": 10}),
        ("catch", {"columns": 1}),
        ("random-walk-flip", {"states": 4}),
        ("random-walk-flip", {"states": 1}),
        ("random-walk-flip", {"horizon": 0}),
        ("random-walk-flip", {"flip_every": 0}),
        ("random-walk-flip", {"flip_every": 96.5}),
        ("random-walk-off-policy", {"states": 6}),
        ("random-walk-off-policy", {"right": 0.0}),
        ("random-walk-off-policy", {"right": 1.0}),
        ("random-walk-off-policy", {"right": float("nan")}),
        ("random-walk-off-policy", {"right": "most"}),
        ("random-walk-off-policy", {"swing": 0.5}),
        ("random-walk-off-policy", {"swing": -0.1}),
        ("random-walk-off-policy", {"switch_every": 0}),
        ("gym:CartPole-v1", {"horizon": -1}),
    ],
)
def test_options_out_of_range_are_named(name, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        load_family(name, options)
