import json
from collections import Counter

import numpy as np
import pytest
import torch

from actors.tasks import load_family
from actors.tasks.maze import Maze, MazeEnv, _random_walls, maze_lines, shortest_path

NORTH, EAST, SOUTH, WEST = range(4)
LEFT, RIGHT, FORWARD = range(3)
MOVES = {NORTH: (-1, 0), EAST: (0, 1), SOUTH: (1, 0), WEST: (0, -1)}


class SingleMaze:
    """The task written for one environment: a set of pairs of cells that are joined, and a walk."""

    def __init__(self, task, family):
        self.family, side = family, {"small": 5, "large": 9}[family.size]
        walls = iter(task["walls"])
        self.joined = set()
        for dr, dc in ((0, 1), (1, 0)):
            for row in range(side - dr):
                for col in range(side - dc):
                    if next(walls) == 0:
                        here, there = (row, col), (row + dr, col + dc)
                        self.joined |= {(here, there), (there, here)}
        assert next(walls, None) is None
        self.target = tuple(task["target"])
        self.first = (tuple(task["start"][:2]), task["start"][2])
        self.cells = [(row, col) for row in range(side) for col in range(side)]

    def reset(self):
        self.cell, self.heading = self.first
        self.steps = 0
        return self.seen()

    def beside(self, cell, heading):
        """The next cell that way, None behind a wall."""
        dr, dc = MOVES[heading % 4]
        there = (cell[0] + dr, cell[1] + dc)
        return there if (cell, there) in self.joined else None

    def step(self, action):
        reward = -self.family.step_cost
        if action == FORWARD:
            there = self.beside(self.cell, self.heading)
            if there is None:
                reward -= self.family.wall_cost
            else:
                self.cell = there
        else:
            self.heading = (self.heading + (1 if action == RIGHT else -1)) % 4
        self.steps += 1
        if self.cell == self.target:
            return self.seen(), reward + self.family.target_reward, True
        return self.seen(), reward, self.steps == self.family.spec.horizon

    def seen(self):
        numbers, cell = [], self.cell
        for _ in range(self.family.view):
            if cell is None:
                numbers += [0, 0, 0, 0]
                continue
            ways = [self.beside(cell, self.heading + turn) for turn in (0, -1, 1)]
            numbers += [int(way is not None) for way in ways] + [int(cell == self.target)]
            cell = ways[0]
        return numbers

    def shortest(self):
        """The actions of a shortest way, by breadth-first search over `step`."""
        self.reset()
        queue, known = [(self.cell, self.heading, [])], set()
        for cell, heading, actions in queue:
            for action in range(3):
                self.cell, self.heading, self.steps = cell, heading, 0
                self.step(action)
                if self.cell == self.target:
                    return [*actions, action]
                if (self.cell, self.heading) not in known:
                    known.add((self.cell, self.heading))
                    queue.append((self.cell, self.heading, [*actions, action]))
        raise AssertionError("no way")


def started(family, tasks):
    env = family.make(len(tasks))
    return env, env.reset(seed=0, options={"tasks": tasks})[0]


def corridor(**changes):
    """A small maze that is one snake: east in row 0, west in row 1, …; from the first cell east."""
    south = np.ones((4, 5), int)
    south[[0, 2], 4] = south[[1, 3], 0] = 0
    walls = [0] * 20 + south.ravel().tolist()
    return {"walls": walls, "start": [0, 0, EAST], "target": [1, 0]} | changes


@pytest.mark.parametrize(
    "family",
    [
        Maze(),
        Maze(horizon=40, view=2, target_reward=2.0, wall_cost=0.5, step_cost=0.0625),
        Maze(size="large", view=12),
        Maze(horizon=30, view=1),
    ],
)
def test_batch_equals_single_environments(family):
    tasks = family.sample(np.random.default_rng(2), 12)
    singles = [SingleMaze(task, family) for task in tasks]
    env, obs = started(family, tasks)
    np.testing.assert_array_equal(obs, [single.reset() for single in singles])
    ended, rewards, at_target = [False] * 12, set(), 0
    rng = np.random.default_rng(1)
    for _ in range(400):
        action = rng.choice(3, size=12, p=[0.2, 0.2, 0.6])
        obs, reward, terminated, truncated, info = env.step(torch.from_numpy(action))
        assert reward.dtype == torch.float32
        assert not truncated.any()
        assert info == {}
        for i, single in enumerate(singles):
            expected = 0.0
            if not ended[i]:
                _, expected, ended[i] = single.step(action[i])
                at_target += single.cell == single.target
            np.testing.assert_array_equal(obs[i], single.seen())
            assert reward[i].item() == pytest.approx(expected, abs=1e-6)
            assert bool(terminated[i]) == ended[i]
            assert tuple(env.positions[i].tolist()) == single.cell
            rewards.add(round(expected, 4))
        # Some that have ended go on as they are, and some are started before their end.
        mask = rng.random(12) < np.where(ended, 0.3, 0.005)
        obs, _ = env.reset(options={"reset_mask": mask})
        for i in np.flatnonzero(mask):
            np.testing.assert_array_equal(obs[i], singles[i].reset())
            ended[i] = False
    assert at_target > 5
    assert len(rewards) == 4  # ended, a step, a step into a wall, the step onto the target


def test_the_published_sizes_and_rewards():
    spec = load_family("maze").spec
    assert (spec.obs_size, spec.action_size, spec.discrete, spec.horizon) == (20, 3, True, 250)
    large = load_family("maze", {"size": "large"})
    assert large.spec.horizon == 500
    assert large.spec.obs_size == spec.obs_size
    assert (large.side, Maze().side) == (9, 5)
    assert load_family("maze", {"size": "large", "horizon": 7}).spec.horizon == 7
    env, _ = started(Maze(), [corridor(target=[0, 1])] * 3)
    rewards = [env.step(torch.tensor(action))[1] for action in ([LEFT, RIGHT, FORWARD], [2, 2, 2])]
    torch.testing.assert_close(rewards[0], torch.tensor([-0.04, -0.04, 0.96]))
    torch.testing.assert_close(rewards[1], torch.tensor([-0.041, -0.041, 0.0]))


def test_what_is_seen_in_a_corridor():
    tasks = [corridor(), corridor(start=[0, 3, EAST]), corridor(target=[0, 2])]
    env, obs = started(Maze(view=6), tasks)
    # Ahead, left, right, target: four open cells ahead, and in the last a way to the right.
    straight = [[1, 0, 0, 0]] * 4
    hidden = [[0, 0, 0, 0]]
    assert obs[0].view(6, 4).tolist() == [*straight, [0, 0, 1, 0], *hidden]
    assert obs[1].view(6, 4).tolist() == [straight[0], [0, 0, 1, 0], *hidden * 4]
    assert obs[2].view(6, 4).tolist() == [
        *straight[:2],
        [1, 0, 0, 1],
        straight[0],
        [0, 0, 1, 0],
        *hidden,
    ]
    obs = env.step(torch.tensor([LEFT, RIGHT, FORWARD]))[0]
    # Facing the outer wall in the north; facing a wall in the south; a cell further.
    assert obs[0].view(6, 4).tolist() == [[0, 0, 1, 0], *hidden * 5]
    assert obs[1].view(6, 4).tolist() == [[0, 1, 1, 0], *hidden * 5]
    assert obs[2].view(6, 4).tolist() == [
        straight[0],
        [1, 0, 0, 1],
        straight[0],
        [0, 0, 1, 0],
        *hidden * 2,
    ]


def test_places_that_look_alike_give_the_same_observation():
    ways = [[1, 3, WEST], [2, 1, EAST], [3, 3, WEST]]
    _, obs = started(Maze(view=2), [corridor(start=way, target=[4, 4]) for way in ways])
    assert torch.equal(obs[0], obs[1])
    assert torch.equal(obs[0], obs[2])


@pytest.mark.parametrize(("size", "num_tasks"), [("small", 1000), ("large", 200)])
def test_one_way_leads_from_any_cell_to_any_other(size, num_tasks):
    family = Maze(size=size)
    for task in family.sample(np.random.default_rng(0), num_tasks):
        single = SingleMaze(task, family)
        assert len(single.joined) == 2 * (family.side**2 - 1)
        reached = [(0, 0)]
        for cell in reached:
            ways = [single.beside(cell, heading) for heading in range(4)]
            reached += [there for there in ways if there is not None and there not in reached]
        assert sorted(reached) == single.cells
        assert task["start"][:2] != task["target"]
        assert len(json.dumps(task)) < 600


def test_every_perfect_maze_is_equally_likely():
    rng = np.random.default_rng(0)
    counts = Counter(tuple(_random_walls(rng, 3)) for _ in range(19_200))
    assert len(counts) == 192  # the spanning trees of 3 x 3 cells
    chi_squared = sum((count - 100) ** 2 / 100 for count in counts.values())
    assert 191 - 4 * 19.5 < chi_squared < 191 + 4 * 19.5  # mean 191, deviation √(2 · 191)


def test_starts_and_targets_are_uniform():
    tasks = Maze().sample(np.random.default_rng(0), 5000)
    start = np.array([task["start"] for task in tasks])
    target = np.array([task["target"] for task in tasks])
    for place in (start, target):
        counts = np.bincount(place[:, 0] * 5 + place[:, 1], minlength=25)
        assert counts.min() > 140
        assert counts.max() < 260
    assert np.bincount(start[:, 2]).min() > 1150
    # Two different cells of 5 x 5, drawn uniformly, are 10/3 apart on average.
    apart = np.abs(start[:, :2] - target).sum(1)
    assert apart.mean() == pytest.approx(10 / 3, abs=0.1)


def test_the_draw_depends_on_the_generator_alone_and_goes_on():
    family = Maze()
    whole = family.sample(np.random.default_rng(3), 6)
    rng = np.random.default_rng(3)
    assert family.sample(rng, 2) + family.sample(rng, 4) == whole
    assert len({json.dumps(task) for task in whole}) == 6


@pytest.mark.parametrize("size", ["small", "large"])
def test_the_shortest_path_is_walked_in_as_many_steps(size):
    family = Maze(size=size)
    tasks = family.sample(np.random.default_rng(4), 40)
    ways = [SingleMaze(task, family).shortest() for task in tasks]
    lengths = [shortest_path(task) for task in tasks]
    assert lengths == [len(way) for way in ways]
    assert max(lengths) > 10
    env, _ = started(family, tasks)
    returns = torch.zeros(40)
    for t in range(max(lengths)):
        actions = [way[t] if t < len(way) else RIGHT for way in ways]
        _, reward, terminated, *_ = env.step(torch.tensor(actions))
        returns += reward
        assert terminated.tolist() == [length <= t + 1 for length in lengths]
    torch.testing.assert_close(returns, 1 - 0.04 * torch.tensor(lengths))
    assert env.positions.tolist() == [task["target"] for task in tasks]


def test_shortest_paths_that_are_known():
    assert shortest_path(corridor()) == 11  # 4 forward, right, forward, right, 4 forward
    assert shortest_path(corridor(start=[0, 0, WEST], target=[0, 1])) == 3
    with pytest.raises(ValueError, match="cannot be reached"):
        shortest_path(corridor(walls=[1] * 40))


def test_every_episode_of_a_task_begins_in_the_same_place():
    family = Maze(horizon=9)
    tasks = family.sample(np.random.default_rng(0), 8)
    env, first = started(family, tasks)
    for _ in range(3):
        assert env.positions.tolist() == [task["start"][:2] for task in tasks]
        for _ in range(9):
            env.step(torch.randint(3, (8,), generator=torch.Generator().manual_seed(1)))
        assert torch.equal(env.reset()[0], first)


@pytest.mark.parametrize("size", ["small", "large"])
def test_following_the_wall_by_sight_finds_every_target(size):
    family = Maze(size=size, view=1)
    tasks = family.sample(np.random.default_rng(0), 500)
    env, obs = started(family, tasks)
    turned_left = torch.zeros(500, dtype=torch.bool)
    terminated, length = turned_left.clone(), torch.zeros(500)
    for _ in range(family.spec.horizon - 1):
        ahead, left = obs[:, 0] == 1, obs[:, 1] == 1
        action = torch.where(ahead, FORWARD, RIGHT)
        action = torch.where(left & ~turned_left, LEFT, action)
        turned_left = action == LEFT
        length += ~terminated
        obs, _, terminated, *_ = env.step(action)
    assert terminated.all()
    shortest = torch.tensor([shortest_path(task) for task in tasks], dtype=torch.float32)
    assert (length >= shortest).all()
    assert length.mean() > 1.5 * shortest.mean()  # to know the way is worth much


def test_a_random_policy_seldom_finds_the_target():
    family = Maze()
    env, _ = started(family, family.sample(np.random.default_rng(0), 2000))
    generator = torch.Generator().manual_seed(0)
    length, found = torch.zeros(2000), torch.zeros(2000, dtype=torch.bool)
    ended = found.clone()
    for _ in range(250):
        length += ~ended
        _, reward, ended, *_ = env.step(torch.randint(3, (2000,), generator=generator))
        found |= reward > 0
    assert ended.all()
    assert length.mean().item() == pytest.approx(194, abs=8)
    assert found.float().mean().item() == pytest.approx(0.35, abs=0.05)


def test_lines_stand_where_the_walls_do():
    family = Maze()
    for task in [corridor(), *family.sample(np.random.default_rng(0), 5)]:
        lines = maze_lines(task)
        assert lines.shape == (sum(task["walls"]) + 4, 2, 2)
        inner, outer = lines[:-4], lines[-4:]
        np.testing.assert_array_equal(np.abs(inner[:, 0] - inner[:, 1]).sum(1), 1.0)
        np.testing.assert_array_equal(np.abs(outer[:, 0] - outer[:, 1]).sum(1), 5.0)
        assert (lines.min(), lines.max()) == (-0.5, 4.5)
        single = SingleMaze(task, family)
        centres = {tuple(centre): line for centre, line in zip(inner.mean(1), inner, strict=True)}
        for row, col in single.cells:
            for dr, dc in MOVES.values():
                there = (row + dr, col + dc)
                if there not in single.cells:
                    continue
                line = centres.get((row + dr / 2, col + dc / 2))
                assert (line is None) == (((row, col), there) in single.joined)
                # A line lies across the way that it closes.
                assert line is None or ((line[1] - line[0]) @ [dr, dc]) == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "medium"}, "size must be small or large, not 'medium'"),
        ({"size": 5}, "size must be small or large, not 5"),
        ({"horizon": -1}, "horizon must be a whole number of at least 0"),
        ({"horizon": 1.5}, "horizon must be"),
        ({"view": 0}, "view must be a whole number of at least 1"),
        ({"view": True}, "view must be"),
        ({"target_reward": -1.0}, "target_reward must be a finite number of at least 0"),
        ({"wall_cost": -0.001}, "wall_cost must be"),
        ({"step_cost": float("nan")}, "step_cost must be"),
        ({"cells": 5}, "no option 'cells'; closest: "),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        load_family("maze", options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"walls": [0] * 39}, r"'walls' must be 40 finite number\(s\)"),
        ({"walls": [0] * 39 + [2]}, "'walls' must be 0 or 1 each"),
        ({"walls": [0] * 39 + [0.5]}, "'walls' must be 0 or 1 each"),
        ({"start": [0, 0]}, r"'start' must be 3 finite number\(s\)"),
        ({"start": [0, 5, 0]}, "'start' must be whole numbers, row and column below 5, heading"),
        ({"start": [-1, 0, 0]}, "'start' must be whole numbers"),
        ({"start": [0, 0, 4]}, "'start' must be .*, heading below 4, not"),
        ({"start": [0.5, 0, 0]}, "'start' must be whole numbers"),
        ({"target": [5, 0]}, "'target' must be whole numbers, row and column below 5, not"),
        ({"target": [0, 0]}, "'target' must be another cell than the start"),
        ({"walls": [1] * 40}, "'target' must be a cell that can be reached from the start"),
        ({"target": None}, r"'target' must be 2 finite number\(s\)"),
    ],
)
def test_bad_tasks_are_named_and_change_nothing(changes, message):
    env, _ = started(Maze(), [corridor()] * 2)
    before = env.state()
    with pytest.raises(ValueError, match=f"task 1: {message}"):
        env.reset(options={"tasks": [corridor(), corridor(**changes)]})
    after = env.state()
    assert all(np.array_equal(before[key], after[key]) for key in before)


def test_a_task_of_the_other_size_is_refused():
    tasks = Maze(size="large").sample(np.random.default_rng(0), 1)
    with pytest.raises(ValueError, match="'walls' must be 40"):
        started(Maze(), tasks)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_equals_cpu():
    family = Maze(horizon=40)
    tasks = family.sample(np.random.default_rng(0), 8)
    envs = [MazeEnv(family, 8, device) for device in ("cpu", "cuda")]
    starts = [env.reset(seed=0, options={"tasks": tasks})[0].cpu() for env in envs]
    assert torch.equal(*starts)
    for seed in range(40):
        action = torch.randint(3, (8,), generator=torch.Generator().manual_seed(seed))
        left, right = (env.step(action.to(env.device)) for env in envs)
        for a, b in zip(left[:4], right[:4], strict=True):
            torch.testing.assert_close(a, b.cpu())


# What is shown


def test_the_way_is_found_again_from_the_actions_of_several_episodes():
    family = Maze(horizon=30)
    task = family.sample(np.random.default_rng(5), 1)[0]
    env = family.make(1)
    env.reset(seed=0, options={"tasks": [task]})
    rng = np.random.default_rng(1)
    actions, ended, expected, number = [], [], [[*task["start"][:2], 0]], 0
    while number < 3:
        action = rng.integers(3)
        _, _, terminated, _, _ = env.step(torch.tensor([action]))
        actions.append(action)
        ended.append(float(terminated[0]))
        expected.append([*env.positions[0].tolist(), number])
        if terminated[0]:
            number += 1
            env.reset()
            expected.append([*env.positions[0].tolist(), number])
    shown = family.show(task, np.array(actions), np.array(ended, np.float32))
    assert shown["maze_path"].tolist() == expected[:-1]
    assert shown["maze_target"].tolist() == list(task["target"])
    np.testing.assert_array_equal(shown["maze_lines"], maze_lines(task))
