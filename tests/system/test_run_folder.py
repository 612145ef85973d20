"""A run's folder: opened, compared, resumed from, and refused."""

import errno
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from learners.core.errors import ConfigError
from system import run_folder
from system.checkpoint import INFO, MANIFEST, STATE, CorruptCheckpoint
from system.config import to_dict
from system.loop import Counters

STATE_OF_A_RUN = {"meta_params": {"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(3)}}


def snapshot(folder):
    """Every file with its content and the time of its last change."""
    return {
        path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def with_checkpoints(folder, config, *iterations):
    with run_folder.opened(folder, config, "cpu"):
        pass
    for iteration in iterations:
        state = {"meta_params": {"weight": torch.full((3,), float(iteration))}}
        run_folder.save(folder, state, {}, Counters(iteration, 10 * iteration, 1, 0), keep=3)
    return folder


def spoil(path):
    """Flips one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


# Opening


def test_a_new_folder_gets_configuration_and_circumstances(tmp_path, tiny_run):
    config = tiny_run(seed=3)
    folder = tmp_path / "deep" / "run"
    with run_folder.opened(folder, config, "cpu"):
        pass
    assert run_folder.read_config(folder) == config
    meta = json.loads((folder / run_folder.META).read_text())
    assert meta["seed"] == 3
    assert (meta["task"], meta["device"]) == ("navigation-2d", "cpu")
    assert meta["versions"]["torch"] == torch.__version__
    assert set(meta["versions"]) == set(run_folder.PACKAGES)
    assert meta["command"]
    assert meta["python"].startswith("3.")
    assert meta["machine"]["cores"] >= 1
    assert meta["git"] is None or len(meta["git"]["commit"]) == 40
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "lock", "meta.json"]


def test_the_same_run_opens_its_folder_again(tmp_path, tiny_run):
    with run_folder.opened(tmp_path, tiny_run(), "cpu"):
        pass
    with run_folder.opened(tmp_path, tiny_run(), "cpu"):
        pass
    assert run_folder.read_config(tmp_path) == tiny_run()


def test_what_may_change_is_written_down_anew(tmp_path, tiny_run):
    with run_folder.opened(tmp_path, tiny_run(), "cpu"):
        pass
    longer = tiny_run(iterations=9, runtime={"num_actors": 5})
    with run_folder.opened(tmp_path, longer, "cpu"):
        pass
    assert run_folder.read_config(tmp_path) == longer


def test_another_configuration_is_refused_field_by_field_and_changes_nothing(tmp_path, tiny_run):
    old = tiny_run()
    with_checkpoints(tmp_path, old, 1, 2)
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1, "env_steps": 10}\n')
    before = snapshot(tmp_path)
    learner = replace(old.learner, inner_lr=0.25)
    new = replace(old, seed=8, learner=learner, task_options={"horizon": 21}, iterations=99)
    with pytest.raises(ConfigError) as caught, run_folder.opened(tmp_path, new, "cpu"):
        pass
    said = str(caught.value)
    assert str(tmp_path) in said
    for line in (
        "seed: 0 there, 8 now",
        "learner.inner_lr: 0.1 there, 0.25 now",
        "task_options.horizon: 20 there, 21 now",
    ):
        assert line in said
    assert "iterations" not in said
    assert "Nothing was changed" in said
    assert "--run-dir" in said
    assert snapshot(tmp_path) == before


def test_a_folder_that_is_no_run_is_refused_and_left_alone(tmp_path, tiny_run):
    (tmp_path / "thesis.tex").write_text("years of work")
    before = snapshot(tmp_path)
    with (
        pytest.raises(ConfigError, match="holds no run"),
        run_folder.opened(tmp_path, tiny_run(), "cpu"),
    ):
        pytest.fail("the folder was opened")
    assert snapshot(tmp_path) == before


def test_a_second_process_is_refused_and_changes_nothing(tmp_path, tiny_run):
    hold = (
        "import sys\nfrom pathlib import Path\nfrom system.run_folder import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    with run_folder.opened(tmp_path, tiny_run(), "cpu"):
        pass
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as other:
        assert other.stdout.readline() == "held\n"
        before = snapshot(tmp_path)
        with (
            pytest.raises(ConfigError, match=f"in use by process {other.pid} on"),
            run_folder.opened(tmp_path, tiny_run(iterations=9), "cpu"),
        ):
            pytest.fail("the folder was opened")
        assert snapshot(tmp_path) == before
        other.kill()
    with run_folder.opened(tmp_path, tiny_run(iterations=9), "cpu"):
        assert run_folder.read_config(tmp_path).iterations == 9


def test_a_folder_that_cannot_be_locked_is_used_with_a_warning(
    tmp_path, tiny_run, monkeypatch, caplog
):
    def refuse(file, how):
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(run_folder.fcntl, "flock", refuse)
    with run_folder.opened(tmp_path, tiny_run(), "cpu"):
        assert run_folder.read_config(tmp_path) == tiny_run()
    assert "cannot be locked" in caplog.text
    assert "no locks here" in caplog.text


def test_an_empty_folder_is_taken(tmp_path, tiny_run):
    with run_folder.opened(tmp_path, tiny_run(), "cpu"):
        pass
    assert (tmp_path / run_folder.CONFIG).exists()


@pytest.mark.parametrize("missing", [True, False])
def test_reading_a_folder_that_is_no_run(tmp_path, missing):
    folder = tmp_path / "nothing" if missing else tmp_path
    with pytest.raises(ConfigError, match="is not a run's folder"):
        run_folder.read_config(folder)


@pytest.mark.parametrize("content", ["", "{", '{"preset": "maml-trpo/bandit"}', "[]", "null", "3"])
def test_reading_a_configuration_that_is_none(tmp_path, content):
    (tmp_path / run_folder.CONFIG).write_text(content)
    with pytest.raises(ConfigError, match="config"):
        run_folder.read_config(tmp_path)


def test_reading_a_configuration_of_another_version(tmp_path, tiny_run):
    values = to_dict(tiny_run()) | {"colour": "red"}
    (tmp_path / run_folder.CONFIG).write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="colour"):
        run_folder.read_config(tmp_path)


def test_the_default_folder_has_one_level_and_the_seed(tiny_run):
    folder = run_folder.default_folder(tiny_run(seed=12))
    assert folder.as_posix() == "runs/maml-trpo-navigation-2d-seed12"


def test_json_is_replaced_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    run_folder.write_json(path, {"a": 1})

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(run_folder.os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        run_folder.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


# Checkpoints


def test_state_and_counters_come_back(tmp_path, assert_same_state):
    counters = Counters(iteration=7, env_steps=12345678901, skipped=2, skipped_in_a_row=1)
    path = run_folder.save(tmp_path, STATE_OF_A_RUN, {}, counters, keep=2)
    assert path == tmp_path / "checkpoints" / "00000007"
    state, restored, said = run_folder.restore(tmp_path)
    assert_same_state(state, STATE_OF_A_RUN)
    assert restored == counters
    assert said == []


def test_nothing_to_restore(tmp_path, tiny_run):
    assert run_folder.restore(tmp_path) is None
    with run_folder.opened(tmp_path, tiny_run(), "cpu"):
        pass
    assert run_folder.restore(tmp_path) is None


@pytest.mark.parametrize("damage", [spoil, cut])
@pytest.mark.parametrize("file", [STATE, INFO, MANIFEST])
def test_a_damaged_checkpoint_is_refused_for_the_one_before(tmp_path, tiny_run, damage, file):
    with_checkpoints(tmp_path, tiny_run(), 1, 2, 3)
    damage(tmp_path / "checkpoints" / "00000003" / file)
    state, counters, said = run_folder.restore(tmp_path)
    assert counters == Counters(2, 20, 1, 0)
    assert torch.equal(state["meta_params"]["weight"], torch.full((3,), 2.0))
    (line,) = said
    assert "00000003 is refused" in line
    assert "going on from 00000002" in line


def test_where_no_checkpoint_can_be_used_nothing_is_begun_anew(tmp_path, tiny_run):
    with_checkpoints(tmp_path, tiny_run(), 1, 2)
    for step in ("00000001", "00000002"):
        spoil(tmp_path / "checkpoints" / step / STATE)
    before = snapshot(tmp_path)
    with pytest.raises(CorruptCheckpoint, match=r"no checkpoint of 2 can be used"):
        run_folder.restore(tmp_path)
    assert snapshot(tmp_path) == before


def test_no_checkpoint_holds_nan(tmp_path, tiny_run):
    with_checkpoints(tmp_path, tiny_run(), 1)
    before = snapshot(tmp_path)
    state = {"meta_params": {"weight": torch.tensor([1.0, float("nan")])}}
    with pytest.raises(ValueError, match="meta_params/weight"):
        run_folder.save(tmp_path, state, {}, Counters(2), keep=3)
    assert snapshot(tmp_path) == before


def test_a_folder_that_cannot_be_written_to_is_named(command_line, tiny_flags):
    """/sys lets nobody make files, whoever asks."""
    where = "/sys/kernel/metaloop-run"
    status, out, err = command_line.run(
        *("train", "maml-trpo/navigation-2d", "--run-dir", where, "--backend", "serial"),
        *tiny_flags,
    )
    assert status == 2, out + err
    assert where in err
    assert "another --run-dir" in err
    assert "Traceback" not in err


def test_a_run_on_a_disk_that_became_read_only_is_refused_and_unharmed(
    tmp_path, tiny_run, monkeypatch
):
    with run_folder.opened(tmp_path / "run", tiny_run(), "cpu"):
        pass
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}

    real_open = Path.open

    def refuse(self, mode="r", *args, **kwargs):
        if mode != "r":
            raise OSError(errno.EROFS, "Read-only file system")
        return real_open(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    with (
        pytest.raises(ConfigError, match=r"cannot be written to \(Read-only file system\)"),
        run_folder.opened(tmp_path / "run", tiny_run(), "cpu"),
    ):
        pass
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
