"""Reading what a run recorded from its folder alone."""

import json
import subprocess
import sys

import pytest

from learners.core.errors import ConfigError
from system import records
from tests.system import recorded


def test_a_folder_with_metrics_alone_is_enough(tmp_path):
    folder = recorded.write(tmp_path / "mine-seed3", recorded.adapting())
    run = records.read(folder)
    assert (run.name, run.method) == ("mine-seed3", "mine")
    assert (run.config, run.meta, run.evaluation) == ({}, {}, {})
    assert list(run.tags) == ["adapt/ep_rew_mean_0", "adapt/ep_rew_mean_1"]
    steps, values = run.series("adapt/ep_rew_mean_1")
    assert steps.tolist() == [100, 200, 300, 400, 500, 600]
    assert values.tolist() == [row["adapt/ep_rew_mean_1"] for row in run.rows]


def test_the_preset_is_that_of_the_configuration(tmp_path):
    folder = recorded.write(tmp_path / "mine", [], config=recorded.config("ppo/cartpole"))
    assert records.read(folder).method == "ppo/cartpole"


@pytest.mark.parametrize(
    ("name", "left"), [("a-seed12", "a"), ("a_seed1", "a"), ("a", "a"), ("seed0", "seed0")]
)
def test_the_seed_ends_a_folders_name(name, left):
    assert records.Records(f"runs/{name}/").name_without_seed == left


def test_gaps_and_lines_cut_short_are_left_out(tmp_path):
    folder = recorded.write(tmp_path / "run", recorded.rows({"a/b": [None, 2, None]}, [1, 2, 3]))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4, "env_st')
    run = records.read(folder)
    assert len(run.rows) == 3
    assert run.tags == {"a/b": 1}
    assert [array.tolist() for array in run.series("a/b")] == [[2.0], [2.0]]


def test_replicas_are_in_the_order_of_their_numbers(tmp_path):
    folder = recorded.write(tmp_path / "run", recorded.with_replicas(replicas=11))
    run = records.read(folder)
    firsts = [values[0] for _, values in run.samples("rollout/ep_rew_mean")]
    assert firsts == list(range(11))
    assert len(run.samples("replica/ep_rew_mean_3")) == 1


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing is not a run's folder: it has neither metrics"):
        records.read(tmp_path / "nothing")
    folder = recorded.write(tmp_path / "run", [])
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"config.json cannot be read: it holds no object"):
        records.read(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.json cannot be read: Expecting"):
        records.read(folder)


def test_an_unknown_tag_is_answered_with_the_three_closest(tmp_path):
    folder = recorded.write(tmp_path / "run", recorded.adapting(ks=(0, 1, 2, 3)))
    with pytest.raises(ConfigError) as error:
        records.read(folder).check_tag("adapt/ep_rew_mean_11")
    said = str(error.value).partition("closest: ")[2]
    assert len(said.split(", ")) == 3
    assert "adapt/ep_rew_mean_1" in said
    empty = recorded.write(tmp_path / "empty", [])
    with pytest.raises(ConfigError, match="empty has recorded nothing yet"):
        records.read(empty).check_tag("adapt/gain")


def test_a_run_is_named_once(tmp_path, monkeypatch):
    recorded.write(tmp_path / "run", recorded.adapting())
    monkeypatch.chdir(tmp_path)
    assert [run.place for run in records.read_all(["run"])] == ["run"]
    with pytest.raises(ConfigError, match=r"\./run/ is named twice"):
        records.read_all(["run", "./run/"])
    with pytest.raises(ConfigError, match="at least one run"):
        records.read_all([])


def test_of_a_url_the_records_are_copied_and_no_checkpoint(tmp_path):
    folder = recorded.write(
        tmp_path / "far-seed1", recorded.adapting(), config=recorded.config("ppo/cartpole")
    )
    for name in ("checkpoints/00000001/state.safetensors", "tb/events.out.tfevents.1"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("x")
    (run,) = records.read_all([f"file://{folder}"])
    assert (run.method, run.name, len(run.rows)) == ("ppo/cartpole", "far-seed1", 6)
    with records.at(f"file://{folder}", records.is_record_or_event) as copy:
        names = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}
    assert names == {"config.json", "metrics.jsonl", "tb/events.out.tfevents.1"}


def test_neither_torch_nor_ray_is_needed_to_plot(tmp_path):
    folder = recorded.write(tmp_path / "run", recorded.adapting())
    arguments = ["plot", str(folder), "--out", str(tmp_path / "out.svg")]
    code = (
        f"import json, sys\nfrom system import cli\nassert cli.main({arguments!r}) == 0\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = set(json.loads(done.stdout.splitlines()[-1]))
    assert "matplotlib" in modules
    assert not modules & {"torch", "ray", "tensorboard", "mujoco", "gymnasium"}
    assert (tmp_path / "out.svg").read_text().startswith("<?xml")
