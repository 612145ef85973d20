"""What there is to see of the environments."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control import PendulumEnv

from actors.scenes import Drawable, Plan, Pose
from actors.tasks import FAMILIES, load_family
from actors.tasks.gym_env import SingleEnvFamily
from actors.tasks.maze import maze_lines

WITHOUT = {"bandit", "tabular-mdp", "random-walk-flip", "random-walk-off-policy"}


def begun(name, options=None, num_envs=3, seed=0):
    family = load_family(name, options)
    tasks = family.sample(np.random.default_rng(seed), num_envs)
    env = family.make(num_envs)
    env.reset(seed=seed, options={"tasks": tasks})
    return env, tasks


def stepped(env, num_steps=5, seed=0):
    rng, steps = np.random.default_rng(seed), []
    for _ in range(num_steps):
        if env.single_action_space.shape:
            action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        else:
            action = rng.integers(env.single_action_space.n, size=env.num_envs)
        steps.append(np.asarray(env.step(torch.from_numpy(action))[0]))
    return np.stack(steps)


@pytest.mark.parametrize("name", FAMILIES)
def test_looking_changes_nothing(name):
    (env, _), (other, _) = begun(name), begun(name)
    assert isinstance(env, Drawable) == (name not in WITHOUT)
    if name in WITHOUT:
        return
    assert env.steps_per_second > 0
    assert env.scene(2) is not None
    np.testing.assert_array_equal(stepped(env), stepped(other))


def test_a_point_and_its_goal():
    env, tasks = begun("navigation-2d")
    before = env.scene(1)
    env.step(torch.tensor([[0.0, 0.0], [0.05, -0.02], [0.0, 0.0]]))
    after = env.scene(1)
    np.testing.assert_array_equal(before.agent, [0.0, 0.0])
    np.testing.assert_allclose(after.agent, [0.05, -0.02], atol=1e-6)
    np.testing.assert_allclose(after.marks, [[*tasks[1]["goal"], 1.0]], atol=1e-6)
    left, right, low, high = after.bounds
    assert left < -0.5 < 0.5 < right
    assert low < -0.5 < 0.5 < high


def test_a_maze_has_the_walls_of_its_task():
    env, tasks = begun("maze")
    plan = env.scene(2)

    def undirected(lines):
        return {frozenset(map(tuple, ends)) for ends in np.round(lines, 3).tolist()}

    # Those of the task as (row, column); its outer walls are one line each.
    known = undirected(maze_lines(tasks[2])[:-4, :, ::-1])
    drawn = undirected(plan.lines)
    assert known <= drawn
    assert len(drawn) == len(known) + 4 * 5
    assert plan.marks[0, :2].tolist() == tasks[2]["target"][::-1]
    assert plan.agent.tolist() == tasks[2]["start"][1::-1]


@pytest.mark.parametrize("name", ["random-small", "tabular-longer-horizon", "sampled"])
def test_a_grid_shows_what_the_agent_is_told(name):
    env, _ = begun("worlds", {"names": name})
    world = load_family("worlds", {"names": name}).spec.worlds[0]
    obs = None
    for _ in range(20):
        plan = env.scene(1)
        assert isinstance(plan, Plan)
        if obs is not None:
            column, row = plan.agent
            assert row * world.grid[1] + column == int(world.cell(torch.from_numpy(obs))[1])
        assert plan.agent.tolist() not in plan.blocks.tolist()
        height, width = world.grid
        assert ((plan.marks[:, :2] >= 0) & (plan.marks[:, :2] < [width, height])).all()
        obs = stepped(env, 1)[0]


def test_collected_objects_are_gone():
    env, _ = begun("worlds", {"names": "tabular-dense"})
    counts = set()
    for _ in range(60):
        counts.add(len(env.scene(0).marks))
        stepped(env, 1, seed=len(counts))
    assert max(counts) == 4
    assert set(env.scene(0).marks[:, 2].tolist()) <= {1.0, -1.0}


def test_chains_among_worlds_have_no_picture():
    family = load_family("worlds")
    env = family.make(2)
    env.reset(seed=0, options={"tasks": family.sample(np.random.default_rng(0), 2)})
    assert env.scene(0) is None
    assert isinstance(env.scene(1), Plan)


def test_the_ball_of_catch_falls_to_the_paddle_or_beside_it():
    env, _ = begun("catch", num_envs=40)
    stay = torch.ones(40, dtype=torch.int64)
    for row in range(5):
        red = (env.scene(0) == (210, 50, 50)).all(2)
        assert red.any(1).argmax() == 20 * row
        reward = env.step(stay)[1]
    caught = [bool((env.scene(i) == (40, 160, 70)).all(2).any()) for i in range(40)]
    assert caught == (reward > 0).tolist()
    assert set(caught) == {True, False}


def test_a_robot_shows_its_joints_and_where_it_is_to_go():
    env, tasks = begun("ant-goal")
    before = env.scene(1)
    assert isinstance(before, Pose)
    copy = before.qpos.copy()
    stepped(env, 2)
    np.testing.assert_array_equal(before.qpos, copy)
    np.testing.assert_array_equal(env.scene(1).qpos, env.qpos[1])
    assert env.scene(1).goal.tolist() == tasks[1]["goal"]
    assert begun("hopper")[0].scene(0).goal is None
    assert begun("hopper")[0].steps_per_second == pytest.approx(125)


class Lamp(PendulumEnv):
    """Grey as its pendulum stands; a broken one says so."""

    broken = False

    def render(self):
        if self.broken:
            raise RuntimeError("no lamp")
        assert self.render_mode == "rgb_array"
        return np.full((30, 50, 3), round(40 * abs(self.state[0])), np.uint8)


@dataclass(frozen=True)
class Lamps(SingleEnvFamily):
    def make_single(self):
        return Lamp()

    def sample(self, rng, num_tasks):
        return [{} for _ in range(num_tasks)]


def test_gymnasium_environments_render_themselves(monkeypatch):
    env = Lamps().make(2)
    env.reset(seed=0, options={"tasks": [{}, {}]})
    frame = env.scene(1)
    assert frame.shape == (30, 50, 3)
    assert (frame == round(40 * abs(env.envs[1].state[0]))).all()
    assert env.steps_per_second == 30
    monkeypatch.setattr(Lamp, "broken", True)
    with pytest.raises(ValueError, match=r"Lamp\.render failed: no lamp"):
        env.scene(0)
    monkeypatch.setattr(Lamp, "metadata", {"render_modes": ["human"]})
    assert env.scene(0) is None
