"""Rules on their way out of a run and into another: what is written, what is checked."""

import hashlib
import json
import math
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from learners.config import LpgAgentConfig, LpgConfig
from learners.core.errors import ConfigError
from learners.core.update_rule import UpdateRule
from system import cli, rules, run_folder
from system.presets import PRESETS

pytestmark = pytest.mark.usefixtures("torch_threads")

SMALL = (
    *("--num-members", "4", "--num-envs", "2", "--members-per-slot", "2", "--iterations", "2"),
    *("--eval-tasks", "4", "--backend", "serial", "--device", "cpu", "--learner-threads", "1"),
    *("--num-steps", "5", "--hidden", "4"),
)
RULE = (
    *("--rule-width", "4", "--num-predictions", "3", "--embedding-width", "2", "--gamma", "0.9"),
    *("--num-inner-updates", "2", "--evaluation-updates", "19", "--sees-lifetime"),
    *("--tabular-updates", "6", "--network-updates", "8", "--tabular-lrs", "20", "40"),
)
WORLDS = {"chain-short", "random-small-sparse"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of LPG."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    arguments = ["train", "lpg/chain-and-small-grids", *SMALL, *RULE, "--run-dir", str(folder)]
    assert cli.main(arguments) == 0
    return folder


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """The folder of a run of agents that no learned rule teaches."""
    folder = tmp_path_factory.mktemp("taught") / "run"
    arguments = ["train", "lpg-agent/chain-short", *SMALL, "--teacher", "a2c"]
    assert cli.main([*arguments, "--run-dir", str(folder)]) == 0
    return folder


@pytest.fixture
def rule(trained, tmp_path):
    """An exported rule that a test may spoil."""
    return rules.export(trained, tmp_path / "rule")


def described(folder):
    return json.loads((folder / "rule.json").read_text())


def describe_otherwise(folder, without=(), **changes):
    """Changes what `rule.json` says."""
    said = {name: value for name, value in described(folder).items() if name not in without}
    (folder / "rule.json").write_text(json.dumps(said | changes))


def rewrite(folder, params):
    """Other weights, with their own hash."""
    safetensors.torch.save_file(params, folder / "rule.safetensors")
    digest = hashlib.sha256((folder / "rule.safetensors").read_bytes()).hexdigest()
    describe_otherwise(folder, sha256=digest)


# Export


def test_export_writes_the_weights_and_what_they_are(trained, rule):
    assert sorted(path.name for path in rule.iterdir()) == ["rule.json", "rule.safetensors"]
    said = described(rule)
    assert said["format"] == 1
    assert said["method"] == "lpg"
    assert [said[name] for name in rules.SHAPE] == [4, 3, 2, True, 0.9]
    content = (rule / "rule.safetensors").read_bytes()
    assert said["sha256"] == hashlib.sha256(content).hexdigest()
    assert said["trained"] == {
        "preset": "lpg/chain-and-small-grids",
        "task": "worlds",
        "task_options": {"names": "chain-short,random-small-sparse"},
        "seed": 0,
        "iterations": 2,
        "env_steps": 2 * 3 * 5 * 4 * 2,
    }
    state, _, _ = run_folder.restore(trained)
    weights = safetensors.torch.load_file(rule / "rule.safetensors")
    assert weights.keys() == state["meta_params"].keys()
    for name, p in state["meta_params"].items():
        assert torch.equal(weights[name], p), name
        assert torch.equal(rules.load(rule)[name], p), name


def test_export_names_the_step_sizes_that_ended_best_in_each_world(trained, rule):
    """Two lifetimes ended: one in each world, so that theirs are the best."""
    found = described(rule)["step_sizes"]
    assert found.keys() == WORLDS
    state, _, _ = run_folder.restore(trained)
    learner = run_folder.read_config(trained).learner
    ended = state["bandit"]["lives"] > 0
    assert ended.sum(1).tolist() == [1, 1]
    for world, lrs in enumerate((learner.tabular_lrs, learner.network_lrs)):
        arm = int(ended[world].nonzero()[0, 0])
        lr, alpha_y = divmod(arm, len(learner.alpha_ys))
        there = found[["chain-short", "random-small-sparse"][world]]
        assert there == {
            "lr": pytest.approx(lrs[lr]),
            "alpha_y": pytest.approx(learner.alpha_ys[alpha_y]),
        }


def test_export_without_a_place_writes_into_the_runs_folder(metaloop, trained):
    status, out, _ = metaloop("export", trained)
    assert status == 0
    assert f"rule  {trained / 'rule'}\n" in out
    assert f"metaloop train lpg-agent/sampled --rule {trained / 'rule'}" in out
    assert rules.load(trained / "rule").keys() == rules.load(trained / "rule").keys()


def test_export_twice_writes_the_same(metaloop, trained, tmp_path):
    contents = []
    for name in ("one", "deep/two"):
        assert metaloop("export", trained, "--out", tmp_path / name)[0] == 0
        contents.append([path.read_bytes() for path in sorted((tmp_path / name).iterdir())])
    assert contents[0] == contents[1]


def test_a_rule_found_outside_of_worlds_can_be_exported(metaloop, tmp_path):
    run = tmp_path / "run"
    flags = (*SMALL, *RULE, "--task", "catch", "--run-dir", run)
    assert metaloop("train", "lpg/chain-and-small-grids", *flags)[0] == 0
    assert metaloop("export", run)[0] == 0
    assert list(described(run / "rule")["step_sizes"]) == ["observations"]
    rules.load(run / "rule")


def test_exported_files_need_torch_and_safetensors_alone(rule, tmp_path):
    """Nothing of this project is on the path of that process."""
    script = tmp_path / "alone.py"
    script.write_text(
        "import hashlib, json, sys\n"
        "from pathlib import Path\n"
        "from safetensors.torch import load_file\n"
        "folder = Path(sys.argv[1])\n"
        "said = json.loads((folder / 'rule.json').read_text())\n"
        "content = (folder / 'rule.safetensors').read_bytes()\n"
        "assert hashlib.sha256(content).hexdigest() == said['sha256']\n"
        "weights = load_file(folder / 'rule.safetensors')\n"
        "assert not {'learners', 'system', 'actors'} & set(sys.modules)\n"
        "print(sum(p.numel() for p in weights.values()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", str(script), str(rule)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == sum(p.numel() for p in rules.load(rule).values())


def test_another_learners_run_has_no_rule_to_export(taught):
    with pytest.raises(ConfigError, match="is a run of lpg-agent; what is exported"):
        rules.export(taught, None)
    assert not (taught / "rule").exists()


def test_a_rule_has_no_member(metaloop, trained):
    status, _, err = metaloop("export", trained, "--member", "0")
    assert status == 2
    assert "a run of lpg has one rule" in err


def test_what_is_no_run_or_has_no_checkpoint_is_refused(metaloop, trained, tmp_path):
    status, _, err = metaloop("export", tmp_path / "nowhere")
    assert status == 2
    assert "is not a run's folder" in err
    config = run_folder.read_config(trained)
    with run_folder.opened(tmp_path / "begun", config, "cpu"):
        pass
    status, _, err = metaloop("export", tmp_path / "begun")
    assert status == 2
    assert "has no checkpoint yet" in err
    status, _, err = metaloop("export", trained, "--to", "x")
    assert status == 2
    assert "there is no flag --to; closest: --out" in err


# Loading


def test_a_folder_without_a_rule_says_how_to_get_one(tmp_path):
    for action in (rules.load, rules.describe):
        with pytest.raises(ConfigError, match="metaloop export RUN") as caught:
            action(tmp_path / "nothing")
        assert "rule.json" in str(caught.value)
        assert str(tmp_path / "nothing") in str(caught.value)


def test_missing_weights_are_named(rule):
    (rule / "rule.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"has no rule\.safetensors"):
        rules.load(rule)


def test_weights_that_were_changed_are_refused(rule):
    path = rule / "rule.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="hashes differ"):
        rules.load(rule)


def test_a_description_that_cannot_be_read_is_refused(rule):
    (rule / "rule.json").write_text('{"format": 1,')
    with pytest.raises(ConfigError, match=r"rule\.json cannot be read"):
        rules.load(rule)


@pytest.mark.parametrize("name", ["format", "sha256", *rules.SHAPE])
def test_a_description_that_lacks_something_says_what(rule, name):
    describe_otherwise(rule, without=(name,))
    with pytest.raises(ConfigError, match=f"not of format 1: it lacks {name}$"):
        rules.describe(rule)


def test_another_format_is_refused(rule):
    describe_otherwise(rule, format=2)
    with pytest.raises(ConfigError, match="not of format 1 but 2"):
        rules.load(rule)


@pytest.mark.parametrize(
    "changes",
    [
        {"rule_width": 5},
        {"num_predictions": 4},
        {"embedding_width": 3},
        {"sees_lifetime": False},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_weights_of_other_shapes_than_described_are_refused(rule, changes):
    describe_otherwise(rule, **changes)
    with pytest.raises(ConfigError, match="entries or shapes"):
        rules.load(rule)


def test_weights_of_other_entries_than_described_are_refused(rule):
    params = rules.load(rule)
    rewrite(rule, params)
    assert rules.load(rule).keys() == params.keys()
    rewrite(rule, params | {"more": torch.zeros(1)})
    with pytest.raises(ConfigError, match="entries or shapes"):
        rules.load(rule)
    rewrite(rule, dict(list(params.items())[1:]))
    with pytest.raises(ConfigError, match="entries or shapes"):
        rules.load(rule)


def test_numbers_that_no_rule_has_are_refused(rule):
    describe_otherwise(rule, rule_width=0)
    with pytest.raises(ConfigError, match="rule_width must be a whole number above 0"):
        rules.load(rule)


# Into another run


def test_a_run_under_a_rule_takes_its_shape_and_its_weights(metaloop, rule, tmp_path):
    """And keeps both: resumed without the folder's weights, and evaluated."""
    run = tmp_path / "run"
    arguments = ("train", "lpg-agent/random-small-sparse", *SMALL, "--rule", rule)
    status, out, err = metaloop(*arguments, "--run-dir", run)
    assert (status, err) == (0, "")
    assert "replicas" in out
    config = run_folder.read_config(run)
    assert [getattr(config.learner, name) for name in rules.SHAPE] == [4, 3, 2, True, 0.9]
    exported = rules.load(rule)
    state, counters, _ = run_folder.restore(run)
    assert counters.iteration == 2
    assert state["meta_params"].keys() == exported.keys()
    for name, p in exported.items():
        assert torch.equal(state["meta_params"][name], p), name
    assert state["lifetimes"]["age"].tolist() == [2] * 4
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["lpg/pi_hat_abs"] > 0.0
    assert all(math.isfinite(v) for n, v in record.items() if n.startswith("lpg/"))
    (rule / "rule.safetensors").unlink()
    assert metaloop(*arguments, "--iterations", "3", "--run-dir", run)[0] == 0
    state, counters, _ = run_folder.restore(run)
    assert counters.iteration == 3
    for name, p in exported.items():
        assert torch.equal(state["meta_params"][name], p), name
    (rule / "rule.json").unlink()
    assert metaloop("evaluate", run)[0] == 0


def test_the_rule_matters(metaloop, rule, tmp_path):
    """Two rules teach the same agents two things."""
    states = []
    params = rules.load(rule)
    for scale in (1.0, -1.0):
        rewrite(rule, {name: scale * p for name, p in params.items()})
        run = tmp_path / str(scale)
        arguments = ("train", "lpg-agent/chain-short", *SMALL, "--rule", rule, "--run-dir", run)
        assert metaloop(*arguments)[0] == 0
        states.append(run_folder.restore(run)[0]["params"])
    for name, p in states[0].items():
        assert not torch.equal(p, states[1][name]), name


def test_a_rule_that_is_missing_is_asked_for(metaloop, tmp_path):
    status, _, err = metaloop(
        "train", "lpg-agent/chain-short", *SMALL, "--run-dir", tmp_path / "run"
    )
    assert status == 2
    for part in ("--rule PATH is missing", "metaloop export RUN", "--teacher a2c"):
        assert part in err
    assert not (tmp_path / "run").exists()


def test_a_rule_that_is_not_there_leaves_nothing_behind(metaloop, tmp_path):
    arguments = ("train", "lpg-agent/chain-short", *SMALL, "--run-dir", tmp_path / "run")
    status, _, err = metaloop(*arguments, "--rule", tmp_path / "nothing")
    assert status == 2
    assert "holds no rule" in err
    assert not (tmp_path / "run").exists()


def test_a_rule_of_changed_weights_begins_no_training(metaloop, rule, tmp_path):
    with (rule / "rule.safetensors").open("ab") as file:
        file.write(b"more")
    arguments = ("train", "lpg-agent/chain-short", *SMALL, "--rule", rule)
    status, _, err = metaloop(*arguments, "--run-dir", tmp_path / "run")
    assert status == 2
    assert "hashes differ" in err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_only_agents_under_a_rule_are_resolved():
    untaught = PRESETS["lpg-agent/chain-short"]()
    with pytest.raises(ConfigError):
        rules.resolved(untaught)
    for name, learner in [
        ("lpg-agent/chain-short", LpgAgentConfig(teacher="a2c", rule="nowhere")),
        ("lpg/chain-and-small-grids", LpgConfig()),
    ]:
        config = PRESETS[name]()
        config = type(config)(**{**vars(config), "learner": learner})
        assert rules.resolved(config) == config


def test_a_loaded_rule_says_what_it_said_where_it_was_found(trained, rule):
    """The rule that its description describes, with its weights, on the same experience."""
    from learners.core.population import Experience

    generator = torch.Generator().manual_seed(0)
    shape = (7, 5)
    seen = Experience(
        reward=torch.randn(shape, generator=generator),
        ended=(torch.rand(shape, generator=generator) < 0.2).float(),
        prob=torch.rand(shape, generator=generator),
        prediction=torch.rand(*shape, 3, generator=generator).softmax(-1),
        next_prediction=torch.rand(*shape, 3, generator=generator).softmax(-1),
        lifetime=torch.rand(5, 2, generator=generator),
    )
    said = described(rule)
    there = UpdateRule.of(run_folder.read_config(trained).learner)
    here = UpdateRule.of(LpgAgentConfig(**{name: said[name] for name in rules.SHAPE}))
    state, _, _ = run_folder.restore(trained)
    expected, found = there(state["meta_params"], seen), here(rules.load(rule), seen)
    for left, right in zip(found, expected, strict=True):
        assert torch.equal(left, right)
