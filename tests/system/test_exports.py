"""Policies on their way out of a run: what is written, what it computes, what is refused."""

import hashlib
import json
import shutil
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from torch.nn import functional

from learners.config import A2cConfig
from learners.core.actor_critic import part
from learners.core.errors import ConfigError
from learners.core.params import expand_members
from learners.core.trajectory import Spec
from learners.registry import make_learner
from system import exports, run_folder
from system.export_description import describe, templates
from tests.system.exported import RUNS, Runs, config_of

BESIDE = {
    "ppo": ["value"],
    "a2c": ["value"],
    "td-lambda": ["value"],
    "lirpg": ["value", "reward"],
    "lirpg-discrete": ["value", "reward"],
    "frodo": ["value", "target"],
}
"""Networks beside the policy."""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def spoilt(runs, tmp_path):
    """A copy of MAML's export that a test may change."""
    return shutil.copytree(runs.export("maml-trpo"), tmp_path / "spoilt")


def said_in(folder):
    return json.loads((folder / "policy.json").read_text())


def rewrite(folder, params):
    """Other weights, with their own hash."""
    safetensors.torch.save_file(params, folder / "policy.safetensors")
    said = said_in(folder)
    content = (folder / "policy.safetensors").read_bytes()
    said["sha256"]["policy"] = hashlib.sha256(content).hexdigest()
    (folder / "policy.json").write_text(json.dumps(said))


def alter(folder, path, value):
    """Changes one field of the description, or takes it out where the value is `...`."""
    said = said_in(folder)
    *above, last = path.split(".")
    place = said
    for name in above:
        place = place[name]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    (folder / "policy.json").write_text(json.dumps(said))


def observations(size, number=7):
    return torch.randn(number, size, generator=torch.Generator().manual_seed(1))


def perceptron(said, name, x):
    """What the documentation says of the kind `perceptron`."""
    weights, network = said
    about = network["networks"][name]
    for i in range(len(about["widths"]) - 1):
        x = getattr(torch, about["activation"])(x) if i > 0 else x
        x = x @ weights[name][f"layer{i}.weight"] + weights[name][f"layer{i}.bias"]
    return torch.tanh(x) if about.get("output") == "tanh" else x


# What is written


@pytest.mark.parametrize("name", RUNS)
def test_an_export_holds_the_newest_weights_and_says_what_they_are(runs, name):
    out = runs.export(name)
    said, config = said_in(out), config_of(name)
    wanted = ["policy", *BESIDE.get(name, [])]
    files = {path.name for path in out.iterdir()}
    assert files == {"policy.json", *(f"{network}.safetensors" for network in wanted)}
    assert list(said["networks"]) == wanted
    for network in wanted:
        content = (out / f"{network}.safetensors").read_bytes()
        assert said["sha256"][network] == hashlib.sha256(content).hexdigest()
        tensors = safetensors.torch.load(content)
        shapes = {n: list(p.shape) for n, p in tensors.items()}
        assert said["networks"][network]["tensors"] == shapes
    assert (said["format"], said["method"]) == (1, RUNS[name][0].split("/")[0])
    trained = said["trained"]
    assert (trained["preset"], trained["task"]) == (config.preset, config.task)
    assert trained["task_options"] == config.task_options
    assert (trained["seed"], trained["iterations"]) == (0, 2)
    _, counters, _ = run_folder.restore(runs.trained(name))
    assert trained["env_steps"] == counters.env_steps > 0
    assert {"torch", "gymnasium", "metaloop"} <= said["versions"].keys()
    loaded = exports.load(out)
    assert loaded.said == said
    assert list(loaded.networks) == wanted
    assert loaded.learner.config == config.learner


def test_weights_are_those_of_the_checkpoint(runs):
    loaded = exports.load(runs.export("meta-sgd"))
    state, _, _ = run_folder.restore(runs.trained("meta-sgd"))
    assert loaded.networks["policy"].keys() == state["meta_params"].keys()
    assert "inner_lr.layer1.bias" in state["meta_params"]
    for name, p in state["meta_params"].items():
        assert torch.equal(loaded.networks["policy"][name], p), name
    for member in (1, 3):
        loaded = exports.load(runs.export("frodo", member))
        assert loaded.said["trained"]["member"] == member
        state, _, _ = run_folder.restore(runs.trained("frodo"))
        for name, p in loaded.networks["target"].items():
            assert torch.equal(p, state["meta_params"][name][member]), name
        for name, p in loaded.networks["policy"].items():
            assert torch.equal(p, state["params"][f"policy.{name}"][member]), name


def test_adaptation_is_described(runs):
    assert said_in(runs.export("maml-trpo"))["adaptation"] == {
        "kind": "policy gradient",
        "num_updates": 1,
        "num_evaluation_updates": 3,
        "num_episodes": 2,
        "inner_lr": 0.1,
        "learned_inner_lr": False,
        "later_lr_scale": 0.5,
        "loss": "likelihood_ratio",
        "gamma": 0.99,
        "gae_lambda": 0.9,
        "baseline": {"kind": "linear", "clip": 10.0, "ridge": 1e-5},
        "standardised_advantages": True,
        "deviation_eps": 1e-8,
    }
    assert said_in(runs.export("meta-sgd"))["adaptation"]["learned_inner_lr"] is True
    assert said_in(runs.export("rl2"))["adaptation"] == {
        "kind": "hidden state",
        "num_episodes": 4,
        "observation": {"observation": 1, "action": 3, "reward": 1, "end": 1},
    }
    assert said_in(runs.export("a2c"))["adaptation"] is None


def test_bounds_are_those_of_the_environments(runs):
    assert said_in(runs.export("maml-trpo"))["bounds"] == {"low": [-1.0, -1.0], "high": [1.0, 1.0]}
    assert said_in(runs.export("ppo"))["bounds"] == {"low": [-2.0], "high": [2.0]}
    assert said_in(runs.export("a2c"))["bounds"] == {"start": 0}


def test_what_is_unbounded_has_null_as_bound():
    from gymnasium.spaces import Box, Discrete

    class Family:
        def __init__(self, space):
            self.single_action_space = space
            self.closed = False

        def make(self, num_envs):
            return self

        def close(self):
            self.closed = True

    family = Family(Box(-float("inf"), 3.0, (2,)))
    assert exports.action_bounds(family) == {"low": [None, None], "high": [3.0, 3.0]}
    assert family.closed
    assert exports.action_bounds(Family(Discrete(3, start=5))) == {"start": 5}


# Which member


def test_the_best_replica_is_the_one_that_the_record_says():
    best = exports.best_member
    assert best({"replica/ep_rew_mean_0": -5.0, "replica/ep_rew_mean_2": -4.0}, 3) == 2
    assert best({"replica/ep_rew_mean_0": None, "replica/ep_rew_mean_1": -1e9}, 2) == 1
    assert best({"replica/value_error_0": 0.3, "replica/value_error_1": 0.2}, 2) == 1
    assert best({}, 3) == 0


def test_without_a_member_the_best_by_the_last_record_is_exported(runs, tmp_path):
    run = shutil.copytree(runs.trained("a2c"), tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    record = json.loads(lines[-1]) | {f"replica/ep_rew_mean_{m}": float(m % 3) for m in range(4)}
    (run / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(record), '{"iter']))
    assert said_in(exports.export(run, None))["trained"]["member"] == 2
    (run / "metrics.jsonl").unlink()
    assert said_in(exports.export(run, None))["trained"]["member"] == 0


def test_members_that_are_not_there_are_refused(metaloop, runs, tmp_path):
    place = ("--out", tmp_path / "out")
    status, _, err = metaloop("export", runs.trained("a2c"), "--member", 4, *place)
    assert status == 2
    assert "--member must lie in [0, 3], not 4: the run has 4 replicas" in err
    for name in ("maml-trpo", "rl2"):
        status, _, err = metaloop("export", runs.trained(name), "--member", 0, *place)
        assert status == 2
        assert f"{name} learns one policy for all members" in err
    assert not (tmp_path / "out").exists()


def test_the_command_line_writes_into_the_runs_folder_or_elsewhere(metaloop, runs, tmp_path):
    run = runs.trained("a2c")
    status, out, err = metaloop("export", run, "--member", 3)
    assert (status, out, err) == (0, f"policy  {run / 'export'}\n", "")
    assert exports.load(run / "export").said["trained"]["member"] == 3
    assert metaloop("export", run, "--member", 3, "--out", tmp_path / "deep" / "er")[0] == 0
    for path in (run / "export").iterdir():
        assert path.read_bytes() == (tmp_path / "deep" / "er" / path.name).read_bytes()
    status, _, err = metaloop("export", tmp_path / "nowhere")
    assert status == 2
    assert "is not a run's folder" in err


def test_a_run_of_lpg_is_refused(runs, tmp_path):
    run = shutil.copytree(runs.trained("a2c"), tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["learner"] = {"method": "lpg"}
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="is a run of lpg: what is exported is its rule"):
        exports.export(run, None)


# What it computes, by the documentation alone and by the learner


@pytest.mark.parametrize("name", ["maml-trpo", "a2c", "ppo", "lirpg", "frodo", "td-lambda"])
def test_perceptrons_compute_what_is_documented(runs, name):
    loaded = exports.load(runs.export(name))
    said, weights = loaded.said, loaded.networks
    obs = seen = 3.0 * observations(said["observation"]["size"])
    assert said["observation"]["normalized"] == (name in ("ppo", "lirpg"))
    if said["observation"]["normalized"]:
        seen = (obs - weights["policy"]["norm.obs_mean"]) / weights["policy"]["norm.obs_std"]
        seen = seen.clamp(-said["observation"]["clip"], said["observation"]["clip"])
    outputs = perceptron((weights, said), "policy", seen)
    dist = loaded.learner.policy.distribution(expand_members(weights["policy"], 1), obs[None])
    if said["action"]["distribution"] == "categorical":
        torch.testing.assert_close(outputs.log_softmax(-1), dist.logits[0])
    else:
        torch.testing.assert_close(outputs, dist.mean[0])
        torch.testing.assert_close(weights["policy"]["log_std"], dist.log_std[0, 0])
    if "value" in weights:
        params = {f"value.{n}": p for n, p in expand_members(weights["value"], 1).items()}
        value = loaded.learner.networks.value(params, seen[None])
        torch.testing.assert_close(perceptron((weights, said), "value", seen)[:, 0], value[0])


def test_td_lambdas_policy_is_the_one_that_acts_and_its_value_was_learned(runs):
    loaded = exports.load(runs.export("td-lambda"))
    assert loaded.said["spec"]["target_policy"] is not None
    assert all(not p.any() for p in loaded.networks["policy"].values())
    assert loaded.networks["value"]["layer0.weight"].any()


@pytest.mark.parametrize("name", ["lirpg", "lirpg-discrete"])
def test_the_learned_reward_is_what_is_documented(runs, name):
    loaded = exports.load(runs.export(name))
    said, weights = loaded.said, loaded.networks
    seen = observations(said["observation"]["size"])
    params = {f"reward.{n}": p for n, p in expand_members(weights["reward"], 1).items()}
    intrinsic = loaded.learner.intrinsic
    if name == "lirpg":
        assert said["networks"]["reward"]["sees"] == "observation and action"
        action = observations(1).sin()
        found = perceptron((weights, said), "reward", torch.cat([seen, action], -1))[:, 0]
    else:
        assert said["networks"]["reward"]["sees"] == "observation"
        action = torch.arange(7) % said["action"]["size"]
        found = perceptron((weights, said), "reward", seen)[torch.arange(7), action]
    shown = intrinsic.seen(seen[None], action[None])
    torch.testing.assert_close(found, intrinsic.reward(params, shown, action[None])[0])
    assert found.abs().min() > 0.0


def test_frodos_target_is_what_is_documented(runs):
    loaded = exports.load(runs.export("frodo"))
    about, params = loaded.said["networks"]["target"], loaded.networks["target"]
    below, cell, head = (part(params, name) for name in ("below.", "cell.", "head."))
    inputs = observations(len(about["sees"]), 6)
    ended = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    hidden = memory = torch.zeros(about["width"])
    found = []
    for x, end in zip(inputs.flip(0), ended.flip(0), strict=True):
        hidden, memory = hidden * (1.0 - end), memory * (1.0 - end)
        x = torch.tanh(x @ below["layer0.weight"] + below["layer0.bias"])
        gates = x @ cell["input.weight"] + hidden @ cell["hidden.weight"] + cell["bias"]
        admit, keep, candidate, show = gates.chunk(4)
        memory = keep.sigmoid() * memory + admit.sigmoid() * candidate.tanh()
        hidden = show.sigmoid() * memory.tanh()
        found.append(hidden @ head["layer0.weight"] + head["layer0.bias"])
    learner = loaded.learner.network
    said = learner(expand_members(params, 1), inputs[None, :, None], ended[None, :, None])
    torch.testing.assert_close(torch.cat(found[::-1]), said[0, :, 0])
    assert about["sees"][:4] == ["reward", "discount", "value", "next_value"]


def test_a_recurrent_policy_is_the_librarys_cell(runs):
    loaded = exports.load(runs.export("rl2"))
    params, obs = loaded.networks["policy"], observations(loaded.said["observation"]["size"])
    cell = torch.nn.GRUCell(obs.shape[1], loaded.said["networks"]["policy"]["width"])
    names = ("input.weight", "hidden.weight", "input.bias", "hidden.bias")
    with torch.no_grad():
        for own, name in zip(cell.parameters(), names, strict=True):
            own.copy_(params[f"cell.{name}"])
        hidden, found = torch.zeros(1, cell.hidden_size), []
        for x in obs:
            hidden = cell(x[None], hidden)
            found.append(hidden @ params["head.layer0.weight"] + params["head.layer0.bias"])
    dist = loaded.learner.policy.distribution(expand_members(params, 1), obs[:, None])
    torch.testing.assert_close(torch.cat(found).log_softmax(-1), dist.logits[:, 0])


def test_an_agent_of_a_table_or_of_features_is_what_is_documented(runs):
    """Members 0 and 1 live in the first world, 2 and 3 in the second."""
    for member, kind in ((1, "table"), (2, "features")):
        loaded = exports.load(runs.export("lpg-agent", member))
        about, params = loaded.said["networks"]["policy"], loaded.networks["policy"]
        state, _, _ = run_folder.restore(runs.trained("lpg-agent"))
        there = state["params"][f"world{member // 2}.layer0.weight"][member % 2]
        assert torch.equal(params["layer0.weight"], there)
        assert about["kind"] == kind
        assert len(loaded.said["spec"]["worlds"]) == 1
        count = about["num_indices"]
        rows = [torch.arange(count) + 3, torch.tensor([5] + [-1] * (count - 1))]
        obs = torch.full((2, loaded.said["observation"]["size"]), -1)
        obs[:, 0] = 2
        found = []
        for place, index in enumerate(rows):
            obs[place, 1 : 1 + count] = index
            x = params["layer0.weight"][index[index >= 0]].sum(0)
            if kind == "features":
                x = torch.relu(x + params["layer0.bias"])
                x = x @ params["layer1.weight"] + params["layer1.bias"]
            found.append(x[:2].log_softmax(-1))
        agent = loaded.learner.policy.agents[0]
        heads = agent.heads(expand_members(params, 1), obs[None])
        torch.testing.assert_close(torch.stack(found), heads.log_policy[0, :, :2])
        assert float(heads.log_policy[0, :, 2:].max()) < -1e6
        assert about["widths"][-1] == about["num_actions"] + about["num_predictions"]


def test_convolutions_are_what_is_documented():
    spec = Spec(obs_size=4 * 84 * 84, action_size=3, discrete=True, horizon=9, image=(4, 84, 84))
    learner = make_learner(A2cConfig(), spec)
    params = learner.policy.init(torch.Generator().manual_seed(0))
    about = json.loads(json.dumps(describe(learner, spec, templates(learner), 1)))
    network = about["networks"]["policy"]
    assert about["observation"]["dtype"] == "uint8"
    assert network["tensors"] == {n: list(p.shape) for n, p in sorted(params.items())}
    obs = torch.randint(0, 256, (2, spec.obs_size), generator=torch.Generator().manual_seed(1))
    x = obs.view(2, *network["image"]) / 255
    for i, (_, _, stride) in enumerate(network["convolutions"]):
        weight, bias = params[f"conv{i}.weight"], params[f"conv{i}.bias"]
        x = torch.relu(functional.conv2d(x, weight, bias, stride))
    hidden = torch.relu(x.flatten(1) @ params["layer0.weight"] + params["layer0.bias"])
    logits = hidden @ params["layer1.weight"] + params["layer1.bias"]
    dist = learner.policy.distribution(expand_members(params, 1), obs.to(torch.uint8)[None])
    torch.testing.assert_close(logits.log_softmax(-1), dist.logits[0], atol=1e-5, rtol=1e-4)
    assert network["widths"] == [x.flatten(1).shape[1], 512, 3]
    assert about["networks"]["value"]["widths"] == [512, 1]
    assert about["networks"]["value"]["sees"] == "policy's hidden layer"


# What is refused


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("format", 2, "not of format 1 but 2"),
        ("format", ..., "it lacks format"),
        ("adaptation", ..., "it lacks adaptation"),
        ("sha256", ..., "it lacks sha256"),
        ("method", "mamml", "unknown method 'mamml'"),
        ("method", "ppo", "describes no policy: .*inner_lr"),
        ("learner.inner_lr", -1.0, "inner_lr must be above 0"),
        ("learner.inner_lr", 0.2, "adaptation.inner_lr is 0.1, but the settings make it 0.2"),
        ("learner.inner_lr", "fast", "describes no policy"),
        ("learner.hidden", [6, 4], r"widths is \[2, 6, 5, 2\], but"),
        ("learner.hidden", [10**12, 10**12], "describes no policy"),
        ("learner.surprise", 1, "describes no policy: .*surprise"),
        ("spec.obs_size", 3, "observation.size is 2, but the settings make it 3"),
        ("spec.obs_size", 0, "obs_size must be a whole number above 0"),
        ("spec.obs_size", 10**7, "observation.size is 2, but"),
        ("spec.discrete", "no", "discrete must be true or false"),
        ("spec.horizon", ..., "describes no policy: .*horizon"),
        ("spec.worlds", 3, "describes no policy"),
        ("bounds.low", [0.0], "bounds.low must be 2 numbers"),
        ("bounds.high", ["a", "b"], "bounds.high must be 2 numbers"),
        ("bounds", None, "describes no policy"),
        ("observation.normalized", True, "observation.normalized is True, but"),
        ("action.distribution", "categorical", "action.distribution is 'categorical', but"),
        ("networks.policy.activation", "relu", "activation is 'relu', but the settings"),
        ("networks.policy.file", "../x", "networks.policy.file is not known"),
        ("networks.policy.tensors.log_std", ..., "tensors.log_std is missing"),
        ("networks.more", {}, "networks.more is not known"),
        ("adaptation.later_lr_scale", 1.0, "later_lr_scale is 1.0, but the settings make it 0.5"),
        ("learner.num_inner_updates", 10**12, "num_updates is 1, but the settings make it 10000"),
        ("adaptation.baseline", None, "adaptation.baseline is None, but"),
        ("trained.num_envs", 0, "num_envs must be a whole number above 0"),
        ("trained", [], "describes no policy"),
        ("sha256", None, "describes no policy"),
        ("sha256.policy", ..., "hashes differ"),
        ("sha256.policy", "00", "hashes differ"),
    ],
)
def test_an_altered_description_is_refused(spoilt, path, value, reason):
    exports.load(spoilt)
    alter(spoilt, path, value)
    with pytest.raises(ConfigError, match=reason) as caught:
        exports.load(spoilt)
    assert str(spoilt) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"format": 1,', "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[1]", "is no object"),
        (None, "holds no policy: it has no policy.json. `metaloop export RUN` writes one"),
    ],
)
def test_what_is_no_description_is_refused(spoilt, content, reason):
    (spoilt / "policy.json").unlink()
    if content is not None:
        (spoilt / "policy.json").write_text(content)
    with pytest.raises(ConfigError, match=reason):
        exports.load(spoilt)


def test_weights_that_are_missing_or_were_changed_are_refused(spoilt):
    path = spoilt / "policy.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="hashes differ"):
        exports.load(spoilt)
    path.unlink()
    with pytest.raises(ConfigError, match=r"has no policy\.safetensors"):
        exports.load(spoilt)


def test_crafted_weights_with_a_fitting_hash_are_refused(spoilt):
    params = safetensors.torch.load_file(spoilt / "policy.safetensors")
    rewrite(spoilt, params)
    exports.load(spoilt)
    for changed, reason in (
        ({"log_std": torch.zeros(3)}, r"log_std is \[3\] torch.float32, not \[2\] torch.float32"),
        ({"log_std": torch.zeros(2).double()}, r"log_std is \[2\] torch.float64, not"),
        ({"more": torch.zeros(1)}, r"more is \[1\] torch.float32, not none"),
        ({"log_std": torch.tensor([0.0, torch.nan])}, "log_std is not finite"),
    ):
        rewrite(spoilt, params | changed)
        with pytest.raises(ConfigError, match=reason):
            exports.load(spoilt)
    rewrite(spoilt, {n: p for n, p in params.items() if n != "log_std"})
    with pytest.raises(ConfigError, match=r"log_std is none, not \[2\] torch.float32"):
        exports.load(spoilt)


def test_a_pickle_in_place_of_the_weights_is_never_opened(spoilt, tmp_path):
    class Opened:
        def __reduce__(self):
            return (open, (str(tmp_path / "opened"), "w"))

    torch.save(Opened(), spoilt / "policy.safetensors")
    content = (spoilt / "policy.safetensors").read_bytes()
    alter(spoilt, "sha256.policy", hashlib.sha256(content).hexdigest())
    with pytest.raises(ConfigError, match="cannot be used"):
        exports.load(spoilt)
    assert not (tmp_path / "opened").exists()


def test_a_policy_of_several_worlds_shows_that_of_its_member_alone(runs):
    for member in range(4):
        world = said_in(runs.export("lpg-agent", member))["spec"]["worlds"][0]
        assert world["tabular"] == (member < 2)


def test_a_changed_iteration_is_exported_anew(runs, tmp_path):
    """The newest checkpoint counts, not the one that was there at the first export."""
    run = shutil.copytree(runs.trained("maml-trpo"), tmp_path / "run")
    before = exports.load(exports.export(run, None))
    from system.run import train

    train(replace(config_of("maml-trpo"), iterations=3), run)
    after = exports.load(exports.export(run, None))
    assert after.said["trained"]["iterations"] == 3
    name = "layer0.weight"
    assert not torch.equal(before.networks["policy"][name], after.networks["policy"][name])
