"""The command line: what it accepts, what it prints, and how it says no."""

import json
import re
import subprocess
import sys

import psutil
import pytest
import torch

from actors.tasks import FAMILIES
from learners.config import MamlTrpoConfig
from system import cli, run_folder
from system.arguments import (
    EvaluateArguments,
    RenderArguments,
    TrainArguments,
    check_flags,
    flag_names,
)
from system.checkpoint import STATE
from system.config import RuntimeConfig, to_dict
from system.loop import Loop
from system.presets import PRESETS

pytestmark = pytest.mark.usefixtures("torch_threads")

NAVIGATION = "maml-trpo/navigation-2d"

USER_MODULE = """
from dataclasses import dataclass

from gymnasium.envs.classic_control import PendulumEnv

from actors.tasks.gym_env import SingleEnvFamily


class Pole(PendulumEnv):
    def reset(self, *, seed=None, options=None):
        self.m = options["task"]["mass"]
        return super().reset(seed=seed)


@dataclass(frozen=True)
class PoleMass(SingleEnvFamily):
    horizon: int = 20
    heaviest: float = 2.0

    def make_single(self):
        return Pole()

    def sample(self, rng, num_tasks):
        return [{"mass": m} for m in rng.uniform(0.5, self.heaviest, num_tasks).tolist()]
"""


@pytest.fixture
def tiny_train(tmp_path, tiny_flags):
    """Arguments of a serial run of one iteration in a new folder."""
    return [
        *("train", NAVIGATION, *tiny_flags, "--backend", "serial", "--iterations", "1"),
        *("--run-dir", tmp_path / "run"),
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_flags):
    """The folder of a run of one iteration."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    flags = ["--backend", "serial", "--iterations", "1", "--run-dir", str(folder)]
    assert cli.main(["train", NAVIGATION, *tiny_flags, *flags]) == 0
    return folder


# Refusals


@pytest.mark.parametrize(
    ("arguments", "closest", "listing"),
    [
        (["tarin"], ["train"], "metaloop --help"),
        (["train", "maml-trpo/navigation"], [NAVIGATION], "metaloop list"),
        (["show", "maml/half-cheetah"], ["maml-trpo/half-cheetah-dir"], "metaloop list"),
        (["train", NAVIGATION, "--task", "half-cheeta-dir"], list(FAMILIES)[1:3], "metaloop list"),
        (["train", NAVIGATION, "--num-member", "3"], ["--num-members"], f"train {NAVIGATION} --h"),
        (["show", NAVIGATION, "--inner_lrr", "3"], ["--inner-lr"], f"show {NAVIGATION} --help"),
        (["train", NAVIGATION, "--preset", "x"], ["--"], f"train {NAVIGATION} --help"),
        (["evaluate", "x", "--jsno"], ["--json"], "metaloop evaluate --help"),
    ],
)
def test_unknown_names_are_answered_with_the_closest_and_how_to_list(
    metaloop, arguments, closest, listing
):
    status, out, err = metaloop(*arguments)
    assert status == 2
    assert out == ""
    named = re.search(r"closest: (.*?)[.;\n]*(?: `|$)", err.replace("\n", " "))
    assert named, err
    assert len(named[1].split(", ")) <= 3
    for name in closest:
        assert name in named[1]
    given = next(a for a in reversed(arguments) if a not in ("3", "x"))
    assert given.replace("_", "-") in err.replace("_", "-")
    assert f"`{listing}" in err or f"`metaloop {listing}" in err, "how to list them all is not said"


def test_an_unknown_option_of_a_task_is_answered_with_the_closest_and_all(metaloop):
    status, _, err = metaloop("show", "maml-trpo/half-cheetah-vel", "--task.max-velocty", "3")
    assert status == 2
    assert re.search(r"no option 'max_velocty'; closest: max_velocity", err)
    for option in ("horizon", "action_scale", "control_cost", "max_velocity"):
        assert option in err


def test_three_closest_are_named_where_there_are_three(metaloop):
    for arguments in (["trian"], ["train", "maml-trpo/ant"], ["train", NAVIGATION, "--num"]):
        _, _, err = metaloop(*arguments)
        named = re.search(r"closest: (.*)\. `", err)[1]
        assert len(set(named.split(", "))) == 3


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--iterations", "0"], "iterations must be at least 1, not 0"),
        (["--iterations", "many"], "many"),
        (["--backend", "mpi"], "mpi"),
        (["--inner-lr", "-1"], "inner_lr must be above 0, not -1"),
        (["--gamma", "1.5"], r"gamma must lie in \[0, 1\], not 1.5"),
        (["--task.horizon", "long"], "--task.horizon takes a whole number, not 'long'"),
        (["--task.horizon"], "--task.horizon needs a value"),
        (["--task.horizon", "0"], "horizon must be a whole number of at least 1, not 0"),
        (["--task", "nowhere:Family"], "the module 'nowhere' cannot be imported"),
        (["--task", "json:Family"], "has no class 'Family'"),
        (["--task", "gym:CartPoel-v1"], "closest: CartPole"),
        (["stray"], "stray"),
    ],
)
def test_values_that_cannot_be_used_are_refused(metaloop, tiny_train, arguments, expected):
    status, _, err = metaloop(*tiny_train, *arguments)
    assert status == 2
    assert re.search(expected, err)
    assert "Traceback" not in err
    assert not tiny_train[-1].exists()


def test_a_folder_of_another_run_is_refused(metaloop, trained, tiny_train):
    arguments = [*tiny_train[:-1], trained, "--seed", "5", "--inner-lr", "0.3"]
    status, _, err = metaloop(*arguments)
    assert status == 2
    assert "seed: 0 there, 5 now" in err
    assert "learner.inner_lr: 0.1 there, 0.3 now" in err


@pytest.mark.parametrize("exists", [True, False])
def test_evaluating_a_folder_that_is_no_run(metaloop, tmp_path, exists):
    folder = tmp_path if exists else tmp_path / "nowhere"
    status, out, err = metaloop("evaluate", folder)
    assert (status, out) == (2, "")
    assert f"{folder} is not a run's folder" in err


def test_training_in_a_folder_that_is_no_run(metaloop, tmp_path, tiny_train):
    (tmp_path / "notes.txt").write_text("mine")
    status, _, err = metaloop(*tiny_train[:-1], tmp_path)
    assert status == 2
    assert "holds no run" in err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_checkpoints_that_are_all_damaged_are_reported_without_a_trace(metaloop, tiny_train, verb):
    folder = tiny_train[-1]
    assert metaloop(*tiny_train)[0] == 0
    (folder / "checkpoints" / "00000001" / STATE).write_bytes(b"")
    status, _, err = metaloop(*(tiny_train if verb == "train" else ["evaluate", folder]))
    assert status in (1, 2)
    assert "no checkpoint of 1 can be used" in err
    assert "move the folder away to begin anew" in err
    assert "Traceback" not in err


def test_cuda_that_is_not_there_is_refused(metaloop, tiny_train, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, _, err = metaloop(*tiny_train, "--device", "cuda")
    assert status == 2
    assert "--device cuda: torch finds no CUDA device here; use --device cpu or auto" in err
    assert not tiny_train[-1].exists()


@pytest.mark.parametrize(
    "setting",
    [("--num-actors", "3"), ("--address", "127.0.0.1:6379"), ("--accept-open-cluster",)],
)
def test_a_setting_without_effect_is_not_passed_over_in_silence(metaloop, tiny_train, setting):
    _, out, err = metaloop(*tiny_train, *setting)
    assert setting[0] in out + err


# Errors of a run


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OSError(28, "No space left on device"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_that_explain_themselves_need_no_trace(
    metaloop, tiny_train, monkeypatch, error, status
):
    def fail(self, counters):
        raise error

    monkeypatch.setattr(Loop, "iterate", fail)
    found, _, err = metaloop(*tiny_train)
    assert found == status
    assert "Traceback" not in err
    assert (str(error) or "stopped") in err


@pytest.mark.parametrize("kind", [IndexError, ZeroDivisionError])
def test_a_mistake_in_the_program_shows_its_trace(metaloop, tiny_train, monkeypatch, kind):
    def fail(self, counters):
        raise kind("a mistake in the program")

    monkeypatch.setattr(Loop, "iterate", fail)
    with pytest.raises(kind, match="a mistake"):
        metaloop(*tiny_train)


def test_an_environment_that_raises_is_one_line(metaloop, tiny_train, tmp_path):
    orders = tmp_path / "orders"
    orders.mkdir()
    (orders / "raise").write_text("every task")
    task = ["--task", "tests.system.families:Obedient", "--task.orders", orders]
    status, _, err = metaloop(*tiny_train, *task)
    assert status == 1
    assert re.fullmatch(
        r"metaloop: collecting slot 0 \(tasks .*simulator broke.*", err.splitlines()[-1]
    )
    assert "Traceback" not in err


# Listing


def test_list_names_presets_tasks_and_learners(metaloop):
    status, out, _ = metaloop("list")
    assert status == 0
    beside = ("gym:<id>", "module:Class", "trials:<family>")
    for name in [*PRESETS, *FAMILIES, *beside, "maml-trpo\n"]:
        assert name in out


@pytest.mark.parametrize("name", PRESETS)
def test_show_prints_the_preset_as_json(metaloop, name):
    status, out, err = metaloop("show", name)
    assert (status, err) == (0, "")
    assert json.loads(out) == to_dict(PRESETS[name]())


def test_show_prints_what_the_flags_make_of_it(metaloop):
    status, out, _ = metaloop(
        *("show", NAVIGATION, "--iterations=7", "--inner_lr", "0.25", "--hidden", "8", "9"),
        *("--task.horizon", "30", "--task.action-scale=0.5", "--num-actors", "3"),
    )
    shown = json.loads(out)
    assert status == 0
    assert shown["iterations"] == 7
    assert shown["learner"]["inner_lr"] == 0.25
    assert shown["learner"]["hidden"] == [8, 9]
    assert shown["task_options"] == {"horizon": 30, "action_scale": 0.5}
    assert shown["runtime"]["num_actors"] == 3
    assert shown["num_members"] == PRESETS[NAVIGATION]().num_members


def test_another_task_does_not_inherit_the_options_of_the_presets_task(metaloop):
    _, out, _ = metaloop("show", NAVIGATION, "--task", "bandit", "--task.arms", "3")
    assert json.loads(out)["task_options"] == {"arms": 3}


def test_trials_have_their_own_option_and_those_of_their_family(metaloop):
    show = ("show", "maml-trpo/bandit", "--task", "trials:bandit")
    _, out, _ = metaloop(*show, "--task.episodes", "3", "--task.arms", "4")
    assert json.loads(out)["task"] == "trials:bandit"
    assert json.loads(out)["task_options"] == {"episodes": 3, "arms": 4}
    status, _, err = metaloop(*show, "--task.episode", "3")
    assert status == 2
    assert "task trials:bandit has no option 'episode'; closest: episodes, " in err
    assert "It has arms, pulls, episodes" in err
    assert "takes a whole number, not 'few'" in metaloop(*show, "--task.episodes", "few")[2]
    status, _, err = metaloop("show", NAVIGATION, "--task", "trials:bandti")
    assert status == 2
    assert "no task family 'bandti'; closest: bandit" in err


@pytest.mark.parametrize("flag", ["first-order", "learn-inner-lr"])
def test_boolean_flags_go_both_ways(metaloop, flag):
    name = flag.replace("-", "_")
    for preset in (NAVIGATION, "maml-trpo/bandit"):
        for argument, value in [(f"--{flag}", True), (f"--no-{flag}", False)]:
            status, out, _ = metaloop("show", preset, argument)
            assert status == 0
            assert json.loads(out)["learner"][name] is value


@pytest.mark.parametrize("value", ["true", "False"])
def test_boolean_task_options_take_a_word(metaloop, value):
    _, out, _ = metaloop("show", "maml-trpo/ant-dir", "--task.contact-obs", value)
    assert json.loads(out)["task_options"]["contact_obs"] is (value == "true")
    status, _, err = metaloop("show", "maml-trpo/ant-dir", "--task.contact-obs", "maybe")
    assert status == 2
    assert "--task.contact_obs takes true or false, not 'maybe'" in err


# Help


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["-h"], ["help"], ["train"], ["train", "--help"], ["show", "-h"]]
)
def test_help_of_the_command_and_its_verbs(metaloop, arguments):
    status, out, err = metaloop(*arguments)
    assert (status, err) == (0, "")
    assert "metaloop" in out


@pytest.mark.parametrize(
    "arguments", [["train", NAVIGATION], ["show", NAVIGATION], ["evaluate"], ["render"]]
)
def test_every_flag_that_help_names_is_accepted(metaloop, arguments, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    status, out, _ = metaloop(*arguments, "--help")
    assert status == 0
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", out)) - {"--help"}
    alone = {"evaluate": EvaluateArguments, "render": RenderArguments}
    known = (
        flag_names(alone[arguments[0]])
        if arguments[0] in alone
        else flag_names(TrainArguments, MamlTrpoConfig)
    )
    assert len(flags) >= len(known)
    for flag in sorted(flags):
        check_flags([flag], known, "metaloop")


def test_help_list_and_show_import_neither_torch_nor_ray():
    """They answer at once because of it."""
    heavy = "{'torch', 'ray', 'mujoco', 'gymnasium', 'tensorboard'}"
    code = f"""
import sys
from system.cli import main
for arguments in (["--help"], ["train", "{NAVIGATION}", "--help"], ["evaluate", "--help"],
                  ["list"], ["show", "{NAVIGATION}"], ["show", "{NAVIGATION}", "--seed", "3"]):
    try:
        main(arguments)
    except SystemExit:
        pass
    found = {heavy} & set(sys.modules)
    assert not found, (arguments, found)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# Whole commands


def test_evaluate_json_prints_one_object_and_nothing_else(command_line, trained):
    status, out, err = command_line.run("evaluate", trained, "--json", "--eval-tasks", "3")
    assert status == 0, err
    result = json.loads(out)
    assert result["preset"] == NAVIGATION
    assert result["tasks"] == 3
    assert [row["k"] for row in result["adapt"]] == [0, 1, 2, 3]
    for row in result["adapt"]:
        assert set(row) == {"k", "mean", "iqm", "ci95"}
        assert row["ci95"][0] <= row["mean"] <= row["ci95"][1]
    assert result["iteration"] == 1


@pytest.mark.parametrize("given", [None, "192.0.2.7:6379"])
def test_evaluate_stays_on_this_machine_unless_told(metaloop, trained, monkeypatch, given):
    """Also where the run was trained on a cluster."""
    from system import run

    asked = []
    monkeypatch.setattr(run, "evaluate", lambda folder, changes: asked.append(changes) or {})
    metaloop("evaluate", trained, "--json", *(["--address", given] if given else []))
    assert asked[0]["address"] == given


def test_evaluate_prints_a_table(metaloop, trained):
    status, out, _ = metaloop("evaluate", trained)
    assert status == 0
    assert "held-out tasks" in out
    assert "gain of 1" in out


def test_evaluate_says_on_standard_error_what_it_passed_over(metaloop, tiny_train):
    assert metaloop(*tiny_train)[0] == 0
    again = [*tiny_train[:-3], "2", *tiny_train[-2:]]
    assert again[-4:-2] == ["--iterations", "2"]
    assert metaloop(*again)[0] == 0
    folder = tiny_train[-1]
    (folder / "checkpoints" / "00000002" / STATE).write_bytes(b"")
    status, out, err = metaloop("evaluate", folder, "--json")
    assert status == 0
    assert json.loads(out)["iteration"] == 1
    assert "00000002 is refused" in err


def test_training_prints_where_things_are_and_what_came_of_it(metaloop, tiny_train):
    status, out, _ = metaloop(*tiny_train)
    folder = tiny_train[-1]
    assert status == 0
    assert out.count(f"tensorboard --logdir {folder}") == 2
    assert "1/1" in out
    assert "return of 4 held-out tasks" in out


def test_a_gymnasium_id_is_a_task(metaloop, tiny_train):
    status, out, err = metaloop(*tiny_train, "--task", "gym:CartPole-v1")
    assert status == 0, err
    assert "return of 4 members, tasks that training knows too" in " ".join(out.split())
    config = run_folder.read_config(tiny_train[-1])
    assert (config.task, config.task_options) == ("gym:CartPole-v1", {"horizon": 20})


def test_a_family_in_the_working_folder_is_a_task(command_line, tiny_train, tmp_path):
    """As the README says; the command itself is installed elsewhere."""
    (tmp_path / "poles.py").write_text(USER_MODULE)
    task = ["--task", "poles:PoleMass", "--task.heaviest", "1.5"]
    status, out, err = command_line.run(*tiny_train, *task, cwd=tmp_path)
    assert status == 0, err
    assert "return of 4 held-out tasks" in out


# What Ray needs


def test_too_many_actors_are_warned_of(caplog):
    from system.cluster import check_machine

    check_machine(RuntimeConfig(num_actors=1, object_store_mb=100))
    assert caplog.text == ""
    cores = len(psutil.Process().cpu_affinity())
    check_machine(RuntimeConfig(num_actors=cores + 1, object_store_mb=100))
    assert f"{cores + 1} actors on {cores} CPU cores" in caplog.text
    assert f"--num-actors {cores} is as fast" in caplog.text


@pytest.fixture
def memory_of_1000_mb(monkeypatch):
    class Memory:
        available = 1000 * 2**20

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory)


def test_too_little_memory_is_refused_before_ray_starts(metaloop, tiny_train, memory_of_1000_mb):
    status, _, err = metaloop(*tiny_train, "--backend", "ray", "--num-actors", "2")
    assert status == 2
    assert "2 actors needs about 1900 MB and 1000 MB are free" in err
    for way_out in ("--num-actors", "--object-store-mb", "--backend serial"):
        assert way_out in err


@pytest.fixture
def pretended_ray(monkeypatch):
    """Ray that starts and ends without doing anything; records the options it is given."""
    import ray

    from system import cluster

    started = []
    monkeypatch.setattr(ray, "init", lambda **options: started.append(options))
    monkeypatch.setattr(ray, "shutdown", lambda: started.append("shut down"))
    monkeypatch.setattr(cluster, "authenticate", lambda runtime: None)
    return started


def test_a_cluster_that_is_too_small_is_refused_and_left(
    metaloop, tiny_train, pretended_ray, monkeypatch
):
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    address = ["--address", "192.0.2.7:6379"]
    status, _, err = metaloop(*tiny_train, "--backend", "ray", *address, "--num-actors", "9")
    assert status == 2
    assert "the cluster at 192.0.2.7:6379 has 4 CPUs and 9 actors need one each" in err
    assert "--num-actors 4" in err
    assert "--wait-for-nodes" in err
    assert pretended_ray[0]["address"] == "192.0.2.7:6379"
    assert pretended_ray[-1] == "shut down"


def test_nodes_that_an_autoscaler_brings_are_waited_for(pretended_ray, monkeypatch, caplog):
    import ray

    from system.cluster import start_ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    start_ray(RuntimeConfig(address="192.0.2.7:6379", num_actors=9, wait_for_nodes=True))
    assert "has 4 CPUs and 9 actors need one each; waiting 600 s" in caplog.text
    assert "shut down" not in pretended_ray


@pytest.mark.parametrize("address", ["http://head:8265", "ray://head:10001"])
def test_an_address_of_another_kind_is_told_apart(metaloop, tiny_train, pretended_ray, address):
    status, _, err = metaloop(*tiny_train, "--backend", "ray", "--address", address)
    assert status == 2
    assert f"--address {address}: needed is HOST:PORT" in err
    assert "metaloop submit PRESET --address http://" in err
    assert pretended_ray == []


@pytest.mark.parametrize("address", [None, "192.0.2.7:6379"])
def test_ray_that_does_not_start_is_explained(metaloop, tiny_train, monkeypatch, address):
    import ray

    def refuse(**options):
        raise ConnectionError("nobody answers")

    from system import cluster

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(cluster, "authenticate", lambda runtime: None)
    where = ["--address", address] if address else []
    status, _, err = metaloop(*tiny_train, "--backend", "ray", "--num-actors", "1", *where)
    assert status == 2
    assert "Ray did not start" in err
    assert "nobody answers" in err
    assert ("authentication token" if address else "--backend serial") in err
