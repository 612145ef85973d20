"""The programs of README and docs/export.md: alone, and held against this project."""

import ast
import runpy
import sys

import pytest
import torch

from learners.core.contract import Agents
from learners.core.params import expand_members
from learners.core.reduce import ALONE
from learners.core.trajectory import Trajectory
from system import exports
from tests.pages import program, read
from tests.system.exported import Runs

TEXTS = {"act.py": read("README.md"), "adapt.py": read("docs/export.md")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    before = torch.get_num_threads()
    yield Runs(tmp_path_factory.mktemp("runs"))
    torch.set_num_threads(before)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """(program, export, as) → the names that it defines when it runs under the name `as`."""

    def run(name, export, as_name):
        path = tmp_path / name
        path.write_text(program(TEXTS[name], name))
        monkeypatch.setattr(sys, "argv", [name, str(export)])
        return runpy.run_path(str(path), run_name=as_name)

    return run


@pytest.mark.parametrize("name", TEXTS)
def test_a_program_imports_nothing_of_this_project(name):
    tree = ast.parse(program(TEXTS[name], name))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    allowed = {"json", "sys", "pathlib", "torch", "safetensors.torch", "gymnasium"}
    assert {"torch", "safetensors.torch"} <= imported <= allowed


@pytest.mark.parametrize("name", ["a2c", "ppo"])
def test_the_readmes_policy_is_the_learners_and_plays_an_episode(runs, start, capsys, name):
    """Choices on raw observations; numbers on normalized ones."""
    out = runs.export(name)
    loaded = exports.load(out)
    found = start("act.py", out, "module")
    size = loaded.said["observation"]["size"]
    obs = 20.0 * torch.randn(9, size, generator=torch.Generator().manual_seed(0))
    dist = found["policy"](obs)
    params = expand_members(loaded.networks["policy"], 1)
    expected = loaded.learner.policy.distribution(params, obs[None])
    if name == "a2c":
        torch.testing.assert_close(dist.logits, expected.logits[0], atol=1e-5, rtol=1e-5)
    else:
        assert loaded.said["observation"]["normalized"]
        torch.testing.assert_close(dist.mean, expected.mean[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            dist.stddev, expected.log_std[0].exp().expand_as(dist.mean), atol=1e-5, rtol=1e-5
        )
    capsys.readouterr()
    start("act.py", out, "__main__")
    title, total = capsys.readouterr().out.split()
    assert title == "return"
    assert float(total) >= 1.0 if name == "a2c" else float(total) < 0.0


def as_trajectory(episodes):
    """Episodes of the program as a learner sees those of one member."""
    obs, action, reward, valid = (x[None].detach() for x in episodes)
    goes_on = torch.cat([valid[:, 1:], torch.zeros_like(valid[:, :1])], 1)
    terminated = (valid > 0) & (goes_on == 0)
    nothing = torch.zeros_like(reward)
    return Trajectory(
        obs=obs,
        action=action,
        reward=reward * valid,
        terminated=terminated,
        truncated=torch.zeros_like(terminated),
        valid=valid,
        log_prob=nothing,
        last_obs=obs[:, -1],
        episode_return=nothing,
        episode_length=nothing,
        final_obs=obs[:, :0],
        discounted_return=nothing[:, :0],
        true_value=nothing[:, :0],
    )


@pytest.mark.parametrize("name", ["maml-trpo", "meta-sgd"])
def test_the_documents_adaptation_is_the_learners(runs, start, name):
    """Three updates, the later ones with half the step, on episodes of which one ends early."""
    out = runs.export(name)
    loaded = exports.load(out)
    found = start("adapt.py", out, "module")
    torch.manual_seed(3)
    learner, state = loaded.learner, {"meta_params": loaded.networks["policy"]}
    _, agents = learner.begin(state, 1)
    params = found["start"]
    how = loaded.said["adaptation"]
    scales = [1.0, how["later_lr_scale"], how["later_lr_scale"]]
    assert len(scales) == how["num_evaluation_updates"] == learner.num_evaluation_updates
    for scale in scales:
        episodes = found["collect"](params, torch.tensor([0.3, -0.4]))
        episodes[3][60:, 1] = 0.0
        obs = episodes[0][:, 0]
        mean = found["policy"](params, obs).mean
        expected = learner.policy.distribution(expand_members(params, 1), obs[None]).mean[0]
        torch.testing.assert_close(mean, expected, atol=1e-5, rtol=1e-5)
        before, params = params, found["adapt"](params, episodes, scale)
        same = Agents(expand_members(before, 1), {}, agents.num_updates)
        agents = learner.inner_update(state, same, as_trajectory(episodes), ALONE, evaluating=True)
        assert agents.params.keys() == params.keys()
        for entry, p in params.items():
            torch.testing.assert_close(p, agents.params[entry][0], atol=1e-5, rtol=1e-5)
            assert not torch.equal(p, before[entry]), entry


def test_the_documents_environment_is_the_tasks(runs, start):
    """The same actions lead to the same observations and rewards, and the same early end."""
    from actors.tasks import load_family

    out = runs.export("maml-trpo")
    found, said = start("adapt.py", out, "module"), exports.load(out).said
    torch.manual_seed(0)
    goal = torch.tensor([0.1, 0.1])
    obs, action, reward, valid = found["collect"](found["start"], goal)
    trained = said["trained"]
    env = load_family(trained["task"], trained["task_options"]).make(2)
    seen, _ = env.reset(seed=0, options={"tasks": [{"goal": goal.tolist()}] * 2})
    over = torch.zeros(2, dtype=torch.bool)
    for t in range(said["spec"]["horizon"]):
        assert torch.equal(valid[t] == 0, over)
        torch.testing.assert_close(torch.as_tensor(seen)[~over], obs[t][~over])
        seen, paid, terminated, _, _ = env.step(action[t])
        torch.testing.assert_close(torch.as_tensor(paid)[~over], reward[t][~over])
        over |= torch.as_tensor(terminated)
    assert bool(over.all())


def test_the_document_prints_a_return_before_and_after_each_update(runs, start, capsys):
    out = runs.export("maml-trpo")
    capsys.readouterr()
    start("adapt.py", out, "__main__")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("return -") for line in lines)
