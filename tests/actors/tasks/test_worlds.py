import json
import pickle

import numpy as np
import pytest
import torch

from actors.family import TaskFamily
from actors.tasks import load_family
from actors.tasks.worlds import KINDS, Worlds

FIFTEEN = [
    "tabular-dense",
    "tabular-sparse",
    "tabular-long-horizon",
    "tabular-longer-horizon",
    "tabular-long-dense",
    "random-dense",
    "random-long-horizon",
    "random-small",
    "random-small-sparse",
    "random-very-dense",
    "chain-short",
    "chain-short-noisy",
    "chain-long",
    "chain-long-noisy",
    "chain-distractor",
]
MIXED = "chain-short-noisy,random-small-sparse,sampled"
every_mix = pytest.mark.parametrize("names", [MIXED, "tabular-dense", "random-dense"])


def started(names, num_envs=6, seed=3, order=None):
    """Environments, in the given order of the tasks."""
    family = Worlds(names)
    env = family.make(num_envs)
    tasks = family.sample(np.random.default_rng(5), num_envs)
    tasks = [tasks[i] for i in order or range(num_envs)]
    obs, info = env.reset(seed=seed, options={"tasks": tasks})
    assert info == {}
    return env, obs.clone(), tasks


def actions_of(env, seed=0, num_steps=60):
    generator = torch.Generator().manual_seed(seed)
    size = int(env.single_action_space.n)
    return torch.randint(size, (num_steps, env.num_envs), generator=generator)


def roll(env, actions):
    """Steps with new episodes where one ends; observations, rewards and ends."""
    steps = []
    for action in actions:
        obs, reward, terminated, truncated, info = env.step(action)
        assert info == {}
        again = env.reset(options={"reset_mask": (terminated | truncated).numpy()})[0]
        steps.append([obs, reward, terminated, truncated, again])
    return [torch.stack(part) for part in zip(*steps, strict=True)]


def assert_same(left, right):
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# The family


def test_the_fifteen_and_the_sampled_one():
    assert [*FIFTEEN, "sampled"] == list(KINDS)
    assert Worlds("all").kinds == tuple(FIFTEEN)
    assert Worlds("all, sampled").kinds == (*FIFTEEN, "sampled")
    assert Worlds().kinds == ("chain-short", "random-small-sparse")
    assert [world.name for world in Worlds("all").spec.worlds] == FIFTEEN


def test_sizes_are_the_largest_of_any_kind():
    spec = Worlds("all").spec
    assert (spec.obs_size, spec.action_size, spec.discrete, spec.horizon) == (23, 18, True, 2000)
    spec = Worlds("chain-short,chain-long").spec
    assert (spec.obs_size, spec.action_size, spec.horizon) == (2, 2, 50)
    spec = Worlds().spec
    assert (spec.obs_size, spec.action_size, spec.horizon) == (5, 18, 50)
    assert Worlds("sampled").spec.horizon == 750


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("tabular-dens", "no 'tabular-dens'; closest: tabular-dense, "),
        ("", "no ''"),
        ("all,chain-short", "repeat"),
        (3, "must be a string"),
    ],
)
def test_bad_names_are_named(names, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_family("worlds", {"names": names})
    if "closest" in message:
        assert str(caught.value).split("closest: ")[1].count(", ") == 2


def test_tasks_are_dealt_out_evenly_over_kinds():
    family = Worlds("chain-short,random-dense,tabular-dense")
    tasks = family.sample(np.random.default_rng(1), 300)
    assert [task["world"] for task in tasks] == [0] * 100 + [1] * 100 + [2] * 100
    assert [task["world"] for task in family.sample(np.random.default_rng(1), 4)] == [0, 0, 1, 2]
    assert {task["num_actions"] for task in tasks[:100]} == {2}
    for kind in (tasks[100:200], tasks[200:]):
        nines = sum(task["num_actions"] == 9 for task in kind)
        assert 30 < nines < 70
        assert sum(task["num_actions"] == 18 for task in kind) == 100 - nines
    assert len({task["level"] for task in tasks}) == 300
    with pytest.raises(ValueError, match=r"2 task\(s\) cannot cover 3 kinds"):
        family.sample(np.random.default_rng(1), 2)


def test_tasks_are_plain_numbers_and_depend_on_the_generator_alone():
    family = Worlds("all")
    assert isinstance(family, TaskFamily)
    assert family.finite_tasks is None
    tasks = family.sample(np.random.default_rng(1), 20)
    assert tasks == family.sample(np.random.default_rng(1), 20)
    assert tasks != family.sample(np.random.default_rng(2), 20)
    assert tasks == json.loads(json.dumps(tasks))
    assert pickle.loads(pickle.dumps(family)) == family


# The environments


@every_mix
def test_observations_are_of_their_space_and_of_their_world(names):
    env, start, tasks = started(names)
    spec = Worlds(names).spec
    obs, reward, *_ = roll(env, actions_of(env))
    assert obs.dtype == start.dtype == torch.int64
    assert reward.dtype == torch.float32
    assert env.observation_space.contains(start.numpy())
    for i, task in enumerate(tasks):
        world = spec.worlds[task["world"]]
        assert (obs[:, i, 0] == task["num_actions"]).all()
        indices = obs[:, i, 1:]
        assert indices.min() >= -1
        assert indices.max() < world.num_features
        assert (indices[:, world.num_indices :] == -1).all()
        assert (indices >= 0).any(1).all() or world.num_indices > 1


def test_every_kind_runs_with_all_others():
    env, _, tasks = started("all", num_envs=30)
    obs, _, terminated, *_ = roll(env, actions_of(env))
    assert obs.shape == (60, 30, 23)
    chains = [task["world"] >= 10 for task in tasks]
    assert terminated[:, chains].any(0).all()
    assert obs[:, :, 0].unique().tolist() == [2, 9, 18]


def test_an_environment_does_the_same_among_others_as_with_its_like():
    # Chains without noise draw nothing, so that the grids' draws are the same.
    order = [7, 0, 5, 1, 6, 2, 3, 4]
    env, start, tasks = started("chain-short,random-small-sparse", 8, order=order)
    actions = actions_of(env)
    mixed = roll(env, actions)
    for world, names in enumerate(("chain-short", "random-small-sparse")):
        rows = [i for i, task in enumerate(tasks) if task["world"] == world]
        own = Worlds(names).make(len(rows))
        given = [{**tasks[i], "world": 0} for i in rows]
        obs, _ = own.reset(seed=3, options={"tasks": given})
        size = obs.shape[1]
        assert torch.equal(start[rows, :size], obs)
        parts = roll(own, actions[:, rows] % int(own.single_action_space.n))
        for left, right in zip(mixed, parts, strict=True):
            left = left[:, rows]
            assert torch.equal(left[..., :size] if left.ndim == 3 else left, right)


@every_mix
def test_seed_decides_everything(names):
    runs = []
    for seed in (3, 3, 4):
        env, obs, _ = started(names, seed=seed)
        runs.append([obs, *roll(env, actions_of(env))])
    assert_same(runs[0], runs[1])
    assert (runs[0][1] != runs[2][1]).any()


def test_levels_differ():
    env, _, tasks = started("sampled")
    first = roll(env, actions_of(env))
    other = [{**task, "level": task["level"] + 1} for task in tasks]
    env.reset(seed=3, options={"tasks": other})
    assert not torch.equal(first[0], roll(env, actions_of(env))[0])
    env.reset(seed=3, options={"tasks": tasks})
    assert_same(first, roll(env, actions_of(env)))


@every_mix
def test_restored_in_another_object_it_goes_on_bit_for_bit(names):
    env, _, _ = started(names)
    actions = actions_of(env)
    roll(env, actions)
    state = env.state()
    kept = {name: array.copy() for name, array in state.items()}
    expected = roll(env, actions)
    other, _, tasks = started(names)
    other.reset(options={"tasks": tasks[::-1]})
    roll(other, actions[:7])
    fresh = Worlds(names).make(6)
    with torch.inference_mode():
        fresh.restore(state)
    for again in (other, fresh):
        again.restore(state)
        assert_same(roll(again, actions), expected)
    assert all(np.array_equal(state[name], kept[name]) for name in kept)


@every_mix
def test_states_of_others_are_refused_and_change_nothing(names):
    env, _, _ = started(names)
    before = env.state()
    larger, _, _ = started(names, num_envs=7)
    with pytest.raises(ValueError, match="another environment"):
        env.restore(larger.state())
    with pytest.raises(ValueError, match="another environment: it has kinds"):
        env.restore({**before, "world": before["world"] + 9})
    for missing in before:
        partial = {name: np.zeros_like(array) for name, array in before.items() if name != missing}
        partial |= {name: before[name] for name in ("world", "rng") if name != missing}
        with pytest.raises(ValueError, match=f"no '{missing.partition('.')[2] or missing}'"):
            env.restore(partial)
    after = env.state()
    assert all(np.array_equal(before[name], after[name]) for name in before)


@every_mix
def test_new_tasks_for_some_environments_alone(names):
    env, _, tasks = started(names)
    *_, obs = roll(env, actions_of(env, num_steps=9))
    before = env.state()
    mask = np.array([False, True, True, False, False, True])
    stream = env.generator.get_state().clone()
    given = [{**task, "level": i} for i, task in enumerate(tasks)]
    # What is given for the others is not used, whatever its kind.
    given[0] = tasks[-1]
    start, _ = env.reset(options={"reset_mask": mask, "tasks": given})
    assert not torch.equal(env.generator.get_state(), stream)
    assert torch.equal(start[~mask], obs[-1][~mask])
    after = env.state()
    rows = {
        world: [i for i, task in enumerate(tasks) if task["world"] == world] for world in range(3)
    }
    for name, array in before.items():
        if "." in name:
            own = rows[Worlds(names).kinds.index(name.partition(".")[0])]
            np.testing.assert_array_equal(array[~mask[own]], after[name][~mask[own]])
    # The masked ones are as if they had had these tasks from the start.
    whole = Worlds(names).make(6)
    had = [(given if mask[i] else tasks)[i] for i in range(6)]
    whole.reset(options={"tasks": had})
    for name, array in whole.arrays().items():
        if name.partition(".")[2] in ("walls", "reward", "chance", "length", "rewarded", "grabs"):
            np.testing.assert_array_equal(array, after[name])
    env.reset(seed=8, options={"reset_mask": mask, "tasks": [*given[:5], tasks[5]]})
    reseeded = env.state()
    env.restore(after)
    env.reset(seed=8, options={"reset_mask": mask, "tasks": [*given[:5], tasks[5]]})
    assert all(np.array_equal(reseeded[name], array) for name, array in env.state().items())


def test_a_masked_environment_keeps_its_kind():
    env, _, tasks = started("chain-short,tabular-dense", 4)
    before = env.state()
    mask = np.array([False, True, False, False])
    message = "task 1: with a reset_mask an environment keeps its 'world' 0, not 1"
    with pytest.raises(ValueError, match=message):
        env.reset(seed=0, options={"reset_mask": mask, "tasks": [tasks[0], *tasks[3:], *tasks[2:]]})
    after = env.state()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    # All together may change.
    obs, _ = env.reset(seed=0, options={"tasks": tasks[::-1]})
    assert obs[:, 0].tolist() == [task["num_actions"] for task in tasks[::-1]]


def test_bad_resets_and_actions_are_named():
    env = Worlds().make(2)
    task, grid = {"world": 0, "level": 1, "num_actions": 2}, {"world": 1, "level": 1}
    mask = np.ones(2, bool)
    for options in ({}, {"reset_mask": mask}, {"reset_mask": mask, "tasks": [task] * 2}):
        with pytest.raises(ValueError, match="first reset needs"):
            env.reset(seed=0, options=options)
    for bad, message in [
        ({**task, "world": 2}, r"task 1: 'world' must be in range\(0, 2\), not 2"),
        ({**task, "world": 0.5}, "'world' must be in"),
        ({**task, "level": -1}, "'level' must be in"),
        ({**task, "level": 2**60}, "'level' must be in"),
        ({**task, "num_actions": 9}, r"'num_actions' must be in \(2,\) in chain-short, not 9"),
        ({**grid, "num_actions": 2}, r"must be in \(9, 18\) in random-small-sparse, not 2"),
        (grid, "task 1 has no 'num_actions'"),
        ({**task, "level": float("nan")}, "finite number"),
    ]:
        with pytest.raises(ValueError, match=message):
            env.reset(seed=0, options={"tasks": [task, bad]})
    with pytest.raises(ValueError, match="2 environments, 1 tasks"):
        env.reset(options={"tasks": [task]})
    for tasks in ([task] * 2, [task, {**grid, "num_actions": 18}]):
        env.reset(seed=0, options={"tasks": tasks})
        with pytest.raises(ValueError, match="expected"):
            env.step(torch.zeros(3, dtype=torch.int64))


def test_time_limits_truncate_and_chains_terminate():
    env, _, _ = started("chain-long,random-small-sparse", 8)
    stays = torch.full((8,), 4)
    for _ in range(50):
        _, _, terminated, truncated, _ = env.step(stays)
    assert terminated.tolist() == [True] * 4 + [False] * 4
    assert truncated.tolist() == [False] * 4 + [True] * 4
    _, reward, terminated, truncated, _ = env.step(stays)
    assert terminated.tolist() == [True] * 4 + [False] * 4
    assert truncated.tolist() == [False] * 4 + [True] * 4
    assert reward.tolist() == [0.0] * 8


def test_what_was_made_in_inference_mode_goes_on_outside_of_it():
    family = Worlds()
    env = family.make(2)
    with torch.inference_mode():
        env.reset(seed=0, options={"tasks": family.sample(np.random.default_rng(0), 2)})
    roll(env, actions_of(env))
