from dataclasses import replace

import numpy as np
import pytest
import torch

from actors.tasks.grid_worlds import GRIDS, SAMPLED, Grid, Thing, connected, draw_walls
from learners.core.trajectory import Spec, World

# Size, objects as (reward, end, respawn), time limit, and whether objects have fixed cells.
DENSE = [(1, 0, 0.05), (1, 0, 0.05), (-1, 0.5, 0.1), (-1, 0, 0.5)]
LONG = [(1, 0, 0.01), (1, 0, 0.01), (-1, 0.5, 1), (-1, 0.5, 1)]
TABLE = {
    "tabular-dense": (11, 11, DENSE, 500, True),
    "tabular-sparse": (13, 13, [(1, 1, 0), (-1, 1, 0)], 50, True),
    "tabular-long-horizon": (11, 11, LONG, 1000, True),
    "tabular-longer-horizon": (7, 9, [(1, 0.1, 0.01)] * 2 + [(-1, 0.8, 1)] * 5, 2000, True),
    "tabular-long-dense": (11, 11, [(1, 0, 0.005)] * 4, 2000, True),
    "random-dense": (11, 11, DENSE, 500, False),
    "random-long-horizon": (11, 11, LONG, 1000, False),
    "random-small": (5, 7, [(1, 0, 0.05)] * 2 + [(-1, 0.5, 0.1)] * 2, 500, False),
    "random-small-sparse": (5, 7, [(1, 1, 1), (-1, 1, 1), (-1, 1, 1)], 50, False),
    "random-very-dense": (11, 11, [(1, 0, 1)], 2000, False),
}

MAPS = {
    "tabular-longer-horizon": """
        ....#....
        .........
        ....#....
        ...###...
        ....#....
        .........
        ....#....
    """,
    "tabular-long-dense": """
        ...........
        .....#.....
        .....#.....
        .....#.....
        ##.#####.##
        .....#.....
        .....#.....
        ...........
        .....#.....
        .....#.....
        .....#.....
    """,
    "random-small": """
        .......
        ..#....
        .......
        ....#..
        .......
    """,
}

# Objects that often come back at the same time, in few cells.
CROWDED = (Thing(1.0, 0.02, 0.3),) * 2 + (Thing(-0.5, 0.05, 0.2),) * 3
SMALL = {
    "crowded-tabular": Grid(2, 4, CROWDED, 20, tabular=True, walls=((0, 1),)),
    "crowded-image": Grid(2, 4, CROWDED, 20, tabular=False, walls=((0, 1),)),
}
ALL = GRIDS | {"sampled": SAMPLED} | SMALL


class SingleGrid:
    """One environment in plain Python, which is handed its uniform numbers."""

    def __init__(self, grid, level, num_actions):
        self.grid, self.level, self.by_hand = grid, level, num_actions == 18
        self.free_cells = [
            (row, column)
            for row in range(grid.height)
            for column in range(grid.width)
            if not level.walls[row][column]
        ]
        self.num_waits = 0

    def reset(self, draws):
        draws, things = list(draws), self.level.things
        self.steps, self.present = 0, [True] * len(things)
        free = list(self.free_cells)
        if self.grid.tabular:
            self.places = [divmod(cell, self.grid.width) for cell in self.level.cells]
            free = [cell for cell in free if cell not in self.places]
        self.agent = free.pop(index_of(draws.pop(0), len(free)))
        if not self.grid.tabular:
            self.places = [free.pop(index_of(u, len(free))) for u in draws]
        return self.seen()

    def step(self, action, draws):
        most = len(self.grid.things)
        ends, backs, wheres = draws[:most], draws[most : 2 * most], draws[2 * most :]
        reward, terminated = 0.0, False
        rows, columns = [(r, c) for r in (-1, 0, 1) for c in (-1, 0, 1)][action % 9]
        target = (self.agent[0] + rows, self.agent[1] + columns)
        grabs = self.by_hand and action >= 9
        if target in self.free_cells and not grabs:
            self.agent = target
        gone = [k for k, present in enumerate(self.present) if not present]
        if grabs or not self.by_hand:
            for k, thing in enumerate(self.level.things):
                if self.present[k] and self.places[k] == target:
                    self.present[k] = False
                    reward += thing.reward
                    terminated = bool(ends[k] < np.float32(thing.end))
        there = [p for p, present in zip(self.places, self.present, strict=True) if present]
        open_cells = [c for c in self.free_cells if c not in there and c != self.agent]
        taken = []
        for k in gone:
            if backs[k] < np.float32(self.level.things[k].respawn):
                if not self.grid.tabular:
                    cell = open_cells[index_of(wheres[k], len(open_cells))]
                    if cell in taken:
                        self.num_waits += 1
                        continue
                    taken.append(cell)
                    self.places[k] = cell
                self.present[k] = True
        self.steps += 1
        truncated = self.steps >= self.level.max_steps and not terminated
        return self.seen(), reward, terminated, truncated

    def seen(self):
        height, width = self.grid.height, self.grid.width
        if self.grid.tabular:
            cell = self.agent[0] * width + self.agent[1]
            bits = sum(2**k for k, present in enumerate(self.present) if present)
            return [cell * 2 ** len(self.grid.things) + bits]
        kinds = sorted(set(self.level.things), key=self.level.things.index)
        planes = [0, *(1 + kinds.index(thing) for thing in self.level.things)]
        cells = [self.agent, *self.places]
        there = [True, *self.present]
        return [
            (plane * height + row) * width + column if is_there else -1
            for plane, (row, column), is_there in zip(planes, cells, there, strict=True)
        ]


def index_of(draw, size):
    return int(draw * np.float32(size))


def spec_of(grid, spare=0):
    return Spec(1 + grid.world("").num_indices + spare, 18, discrete=True, horizon=1)


def tasks_of(num_envs, first=0):
    return [{"level": first + i, "num_actions": 9 + 9 * (i % 2)} for i in range(num_envs)]


def started(grid, num_envs, seed=0, spare=0):
    env = grid.make(num_envs, spec_of(grid, spare), "cpu")
    obs, _ = env.reset(seed=seed, options={"tasks": tasks_of(num_envs)})
    return env, obs


def draws_of(grid, num_envs, generator):
    """Functions that give the numbers of a start and of a step."""
    k = len(grid.things)
    start = (num_envs,) if grid.tabular else (num_envs, 1 + k)
    step = (num_envs, (2 if grid.tabular else 3) * k)
    return (
        lambda: torch.rand(start, generator=generator).view(num_envs, -1).numpy(),
        lambda: torch.rand(step, generator=generator).numpy(),
    )


@pytest.mark.parametrize("name", ALL)
def test_batch_equals_single_environments(name):
    n, grid = 16, ALL[name]
    if not grid.drawn:
        grid = replace(grid, max_steps=33)
    env, obs = started(grid, n, seed=3, spare=2)
    assert obs.dtype == torch.int64
    tasks = tasks_of(n)
    singles = [SingleGrid(grid, grid.level(task["level"]), task["num_actions"]) for task in tasks]
    start_draws, step_draws = draws_of(grid, n, torch.Generator().manual_seed(3))

    def check(i, seen):
        assert obs[i].tolist() == [tasks[i]["num_actions"], *seen, -1, -1]

    for i, draws in enumerate(start_draws()):
        check(i, singles[i].reset(draws))
    over, rewards, ends = [(False, False)] * n, set(), []
    rng = np.random.default_rng(1)
    for _ in range(400):
        action = rng.integers(18, size=n)
        obs, reward, terminated, truncated, info = env.step(torch.from_numpy(action))
        assert info == {}
        for i, draws in enumerate(step_draws()):
            expected = 0.0
            if not any(over[i]):
                seen, expected, *over[i] = singles[i].step(int(action[i]), draws)
                check(i, seen)
                ends.append(tuple(over[i]))
            rewards.add(np.sign(expected))
            assert reward[i].item() == np.float32(expected)
            assert [bool(terminated[i]), bool(truncated[i])] == list(over[i])
        mask = rng.random(n) < np.where(np.any(over, 1), 0.6, 0.01)
        obs, _ = env.reset(options={"reset_mask": mask})
        for i, draws in enumerate(start_draws()):
            if mask[i]:
                check(i, singles[i].reset(draws))
                over[i] = (False, False)
    assert {0.0, 1.0} <= rewards
    assert (False, True) in ends
    assert ((True, False) in ends) == any(thing.end > 0 for thing in grid.things)
    assert (sum(single.num_waits for single in singles) > 5) == (name == "crowded-image")


# What the worlds are


@pytest.mark.parametrize("name", GRIDS)
def test_the_worlds_are_those_of_the_paper(name):
    grid = GRIDS[name]
    height, width, things, max_steps, tabular = TABLE[name]
    assert (grid.height, grid.width, grid.max_steps) == (height, width, max_steps)
    assert [(thing.reward, thing.end, thing.respawn) for thing in grid.things] == things
    assert grid.tabular == tabular
    level = grid.level(5)
    drawn = [["#" if wall else "." for wall in row] for row in level.walls]
    empty = [["."] * width] * height
    assert drawn == ([list(row) for row in MAPS[name].split()] if name in MAPS else empty)
    assert connected(~level.walls)
    assert level.max_steps == max_steps


def test_what_policies_are_told():
    assert GRIDS["tabular-dense"].world("a") == World("a", 1, 121 * 16, True, (11, 11))
    assert GRIDS["tabular-longer-horizon"].world("a") == World("a", 1, 63 * 128, True, (7, 9))
    assert SAMPLED.world("a") == World("a", 1, 3200, True, (10, 10))
    dense = World("a", 5, 4 * 121, tabular=False, grid=(11, 11))
    assert GRIDS["random-dense"].world("a") == dense
    sparse = World("a", 4, 3 * 35, tabular=False, grid=(5, 7))
    assert GRIDS["random-small-sparse"].world("a") == sparse
    obs = torch.tensor([[9, 16 * 25 + 3, -1], [9, 16 * 120 + 15, -1]])
    assert GRIDS["tabular-dense"].world("a").cell(obs).tolist() == [25, 120]
    assert dense.cell(torch.tensor([[9, 25, 130, -1]])).tolist() == [25]


@pytest.mark.parametrize("name", [name for name in GRIDS if name.startswith("tabular")])
def test_levels_of_tabular_worlds_have_their_own_fixed_cells(name):
    grid = GRIDS[name]
    levels = [grid.level(seed) for seed in range(40)]
    assert grid.level(7).cells == levels[7].cells
    assert len({level.cells for level in levels}) == 40
    for level in levels:
        assert len(set(level.cells)) == len(grid.things)
        assert not level.walls.flat[list(level.cells)].any()


def test_sampled_levels_are_of_grooves_distribution():
    levels = [SAMPLED.level(seed) for seed in range(400)]
    sides, counts = [], []
    for level in levels:
        free = ~level.walls
        assert connected(free)
        side = int(np.flatnonzero(free.any(0)).max()) + 1
        side = max(side, int(np.flatnonzero(free.any(1)).max()) + 1)
        sides.append(side)
        counts.append(len(level.things))
        assert level.walls[side:].all()
        assert level.walls[:, side:].all()
        assert level.walls[:side, :side].sum() <= 15
        assert len(set(level.cells)) == len(level.cells) == len(level.things)
        assert not level.walls.flat[list(level.cells)].any()
        assert level.things[0].reward >= 0
    assert set(sides) == set(range(4, 11))
    assert set(counts) == set(range(1, 6))
    rewards = [thing.reward for level in levels for thing in level.things[1:]]
    ends = np.log([thing.end for level in levels for thing in level.things])
    respawns = np.log([thing.respawn for level in levels for thing in level.things])
    limits = np.log([level.max_steps for level in levels])
    for values, low, high in [
        (rewards, -1.0, 1.0),
        (ends, np.log(0.01), 0.0),
        (respawns, np.log(0.001), np.log(0.1)),
        (limits, np.log(20), np.log(750)),
    ]:
        assert min(values) >= low - 1e-9
        assert max(values) <= high + 1e-9
        middle = np.quantile(values, [0.25, 0.5, 0.75])
        expected = low + (high - low) * np.array([0.25, 0.5, 0.75])
        np.testing.assert_allclose(middle, expected, atol=0.08 * (high - low))
    assert len({level.max_steps for level in levels}) > 100


@pytest.mark.parametrize(("side", "num_walls"), [(4, 4), (7, 12), (8, 15), (10, 15)])
def test_walls_are_as_many_as_asked_for_and_cut_nothing_off(side, num_walls):
    rng = np.random.default_rng(0)
    for _ in range(20):
        walls = draw_walls(rng, side, num_walls)
        assert walls.sum() == num_walls
        assert connected(~walls)


def test_connected_by_sides_not_by_corners():
    assert connected(np.array([[True, True], [False, True]]))
    assert not connected(np.array([[True, False], [False, True]]))


def test_the_seed_decides_the_level_and_nothing_else_does():
    env, _ = started(GRIDS["tabular-dense"], 4)
    places = env.state()["place"]
    assert len({tuple(row) for row in places.tolist()}) == 4
    env.reset(seed=8)
    np.testing.assert_array_equal(env.state()["place"], places)
    env.reset(options={"tasks": tasks_of(4, first=10)})
    assert (env.state()["place"] != places).any(1).all()


# Chances


@pytest.mark.parametrize("name", ["tabular-dense", "random-dense", "random-long-horizon"])
def test_objects_end_episodes_and_come_back_as_often_as_they_should(name):
    n, grid = 512, GRIDS[name]
    env, _ = started(grid, n)
    arrays, k = env.arrays(), len(grid.things)
    gone, back, hits, ends = np.zeros((4, k))
    rng = np.random.default_rng(0)
    alive = np.ones(n, bool)
    for _ in range(400):
        before = arrays["present"].numpy().copy()
        *_, terminated, truncated, _ = env.step(torch.from_numpy(rng.integers(18, size=n)))
        after = arrays["present"].numpy()
        collected = before & ~after & alive[:, None]
        hits += collected.sum(0)
        ends += (collected & terminated.numpy()[:, None]).sum(0)
        gone += (~before & alive[:, None]).sum(0)
        back += (~before & after & alive[:, None]).sum(0)
        alive = ~(terminated | truncated).numpy()
        env.reset(options={"reset_mask": ~alive})
        alive[:] = True
    for j, thing in enumerate(grid.things):
        for count, total, chance in [
            (ends[j], hits[j], thing.end),
            (back[j], gone[j], thing.respawn),
        ]:
            assert total > 200
            deviation = (chance * (1 - chance) * total) ** 0.5
            assert abs(count - chance * total) <= 4 * deviation


def test_first_cells_are_uniform_and_distinct():
    n, grid = 33000, GRIDS["random-small"]
    _, obs = started(grid, n)
    cells = obs[:, 1:] % 35
    assert (cells.sort(1)[0].diff() > 0).all()
    for column in cells.unbind(1):
        counts = torch.bincount(column, minlength=35)
        assert counts[[9, 25]].tolist() == [0, 0]
        counts = counts[counts > 0]
        assert len(counts) == 33
        assert (counts - 1000).abs().max() < 160
    # The order says nothing either.
    first = (cells[:, 0] < cells[:, 4]).float().mean()
    assert first.item() == pytest.approx(0.5, abs=0.015)


def test_agents_of_tabular_worlds_start_anywhere_but_on_objects():
    n, grid = 4800, GRIDS["tabular-sparse"]
    env = grid.make(n, spec_of(grid), "cpu")
    obs, _ = env.reset(seed=0, options={"tasks": [{"level": 3, "num_actions": 9}] * n})
    counts = torch.bincount(obs[:, 1] // 4, minlength=169)
    assert (counts == 0).nonzero().flatten().tolist() == sorted(grid.level(3).cells)


def test_objects_come_back_to_any_free_cell():
    n = 16000
    thing = Thing(1.0, 0.0, 1.0)
    grid = Grid(3, 4, (thing, replace(thing, reward=2.0)), 9, tabular=False, walls=((0, 3),))
    env, _ = started(grid, n)
    arrays = env.arrays()
    arrays["agent"].fill_(1 * 6 + 2)  # row 0, column 1
    arrays["place"][:] = torch.tensor([2 * 6 + 1, 1 * 6 + 1])  # (1, 0) stays and (0, 0) is gone
    arrays["present"][:] = torch.tensor([True, False])
    obs, *_ = env.step(torch.full((n,), 4))
    assert (obs[:, 1] == 1).all()
    assert (obs[:, 2] == 12 + 4).all()
    counts = torch.bincount(obs[:, 3] - 24, minlength=12)
    assert counts[[1, 3, 4]].tolist() == [0, 0, 0]
    others = counts[[0, 2, 5, 6, 7, 8, 9, 10, 11]]
    assert (others - n / 9).abs().max() < 200


# Actions


def agent_moves(num_actions, agent, place, action):
    """Cell of the agent, reward and presence after one step on a 3 × 3 grid with one object."""
    grid = Grid(3, 3, (Thing(1.0, 0.0, 0.0),), 9, tabular=True, walls=((0, 0),))
    env = grid.make(1, spec_of(grid), "cpu")
    env.reset(seed=0, options={"tasks": [{"level": 0, "num_actions": num_actions}]})
    env.arrays()["agent"].fill_((agent[0] + 1) * 5 + agent[1] + 1)
    env.arrays()["place"].fill_((place[0] + 1) * 5 + place[1] + 1)
    obs, reward, terminated, *_ = env.step(torch.tensor([action]))
    assert not terminated
    cell, present = divmod(int(obs[0, 1]), 2)
    return divmod(cell, 3), reward.item(), bool(present)


def test_nine_actions_collect_where_they_go():
    assert agent_moves(9, (1, 1), (2, 2), 8) == ((2, 2), 1.0, False)
    assert agent_moves(9, (1, 1), (2, 2), 7) == ((2, 1), 0.0, True)
    assert agent_moves(9, (1, 1), (1, 1), 4) == ((1, 1), 1.0, False)
    # A wall or the edge: the agent goes nowhere, and collects nothing.
    assert agent_moves(9, (1, 1), (1, 1), 0) == ((1, 1), 0.0, True)
    assert agent_moves(9, (2, 1), (2, 2), 8) == ((2, 1), 0.0, True)
    # Beyond its nine they begin again.
    assert agent_moves(9, (1, 1), (2, 2), 17) == ((2, 2), 1.0, False)


def test_eighteen_actions_move_or_collect():
    assert agent_moves(18, (1, 1), (2, 2), 8) == ((2, 2), 0.0, True)
    assert agent_moves(18, (1, 1), (2, 2), 17) == ((1, 1), 1.0, False)
    assert agent_moves(18, (1, 1), (2, 2), 16) == ((1, 1), 0.0, True)
    assert agent_moves(18, (1, 1), (1, 1), 4) == ((1, 1), 0.0, True)
    assert agent_moves(18, (1, 1), (1, 1), 13) == ((1, 1), 1.0, False)
    assert agent_moves(18, (1, 1), (1, 2), 0) == ((1, 1), 0.0, True)


def test_what_is_collected_is_seen_to_be_gone_before_it_comes_back():
    grid = GRIDS["random-very-dense"]
    env, _ = started(grid, 1)
    arrays = env.arrays()
    arrays["place"][:, 0] = arrays["agent"]
    seen = []
    for _ in range(3):
        obs, reward, *_ = env.step(torch.tensor([4]))
        seen.append((reward.item(), bool(obs[0, 2] >= 0)))
    assert seen == [(1.0, False), (0.0, True), (0.0, True)]


def test_the_time_limit_truncates_unless_the_episode_ends_at_that_step():
    certain = Grid(3, 3, (Thing(1.0, 1.0, 0.0),), 2, tabular=True)
    env = certain.make(2, spec_of(certain), "cpu")
    env.reset(seed=0, options={"tasks": [{"level": 0, "num_actions": 9}] * 2})
    env.arrays()["agent"].fill_(6)
    env.arrays()["place"].copy_(torch.tensor([[6 + 2], [6 + 12]]))
    ends = [env.step(torch.tensor([5, 5]))[2:4] for _ in range(3)]
    assert [[flag.tolist() for flag in pair] for pair in ends] == [
        [[False, False], [False, False]],
        [[True, False], [False, True]],
        [[True, False], [False, True]],
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ALL)
def test_cuda_equals_cpu(name, monkeypatch):
    grid = ALL[name]
    envs = [grid.make(16, spec_of(grid), device) for device in ("cpu", "cuda")]
    for env in envs:
        # Their generators draw other numbers.
        generator = torch.Generator().manual_seed(0)

        def draw(*shape, env=env, generator=generator):
            return torch.rand(shape, generator=generator).to(env.device)

        monkeypatch.setattr(env, "_draw", draw)
        env.reset(options={"tasks": tasks_of(16)})
    actions = torch.randint(18, (100, 16), generator=torch.Generator().manual_seed(0))
    for action in actions:
        left, right = (env.step(action.to(env.device)) for env in envs)
        for a, b in zip(left[:4], right[:4], strict=True):
            assert torch.equal(a, b.cpu())
        over = (left[2] | left[3]).numpy()
        left, right = (env.reset(options={"reset_mask": over})[0] for env in envs)
        assert torch.equal(left, right.cpu())
