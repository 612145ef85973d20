"""The report of a run: what it says, what it shows, and what it says of what it cannot show."""

import io
import json
import re
import shutil

import imageio.v3 as imageio
import numpy as np
import pytest

from system import report
from system.records import Records
from system.telemetry import Telemetry
from tests.system import recorded

META = {
    "command": ["metaloop", "train", recorded.PRESET, "--seed", "3", "--run-dir", "runs/mine"],
    "python": "3.12.1",
    "versions": {"ray": "2.60.0", "metaloop": None},
    "git": {"commit": "abc123", "changed": True},
    "task": "delayed-hopper",
    "device": "cpu",
    "machine": {"processor": "Some CPU", "cores": 2, "system": "Linux"},
}
COLOURS = {"b/second": (0, 200, 0), "a/first": (200, 0, 0)}


def picture(value):
    return np.full((5, 7, 3), value, np.uint8)


@pytest.fixture
def whole(tmp_path):
    """A run with everything: two sittings, in which pictures were recorded twice."""
    folder = tmp_path / "runs" / "mine"
    with Telemetry(folder) as telemetry:
        telemetry.write(1, 100, {"rollout/ep_rew_mean": 1.0, "meta/loss": 2.0})
        telemetry.show(100, {tag: picture(9) for tag in COLOURS}, {"a/spread": np.arange(9.0)})
    with Telemetry(folder, resume_step=1) as telemetry:
        telemetry.write(2, 200, {"rollout/ep_rew_mean": 1.25, "meta/loss": 0.123456})
        telemetry.show(200, {tag: picture(colour) for tag, colour in COLOURS.items()}, {})
    objects = {
        "config": recorded.config(seed=3, iterations=2, learner={"lr": 0.1}),
        "meta": META,
        "evaluation": recorded.evaluation(),
    }
    for name, value in objects.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def sections(text):
    """The parts of a report by their headings."""
    return dict(re.findall(r"^#+ (.+)\n\n((?:(?!\n#+ )[\s\S])*)", text, re.MULTILINE))


def shown(text):
    """What a report shows, by what it is called."""
    return dict(re.findall(r"!\[(.+?)\]\((.+?)\)", text))


def test_a_report_has_everything(metaloop, whole):
    status, said, _ = metaloop("report", whole)
    assert status == 0
    assert str(whole / "report.md") in said.replace("\n", "")
    parts = sections((whole / "report.md").read_text())
    head = parts[f"{recorded.PRESET}, seed 3"]
    assert "2 of 2 iterations, 200 environment steps." in head
    for fact in (
        "`metaloop train ppo/delayed-hopper --seed 3 --run-dir runs/mine`",
        "abc123 and changes that were not committed",
        "Some CPU, 2 cores, Linux",
        "python 3.12.1, ray 2.60.0 |",
    ):
        assert fact in head
    assert "| 2 | 4 | [3, 6] | 4.5 |" in parts["What it reached"]
    assert "| gain | 3 | [0.5, 4.5] |  |" in parts["What it reached"]
    assert "| rollout/ep_rew_mean | 1.25 | 200 |" in parts["Last values"]
    assert "| meta/loss | 0.12346 | 200 |" in parts["Last values"]
    assert "| learner.lr | 0.1 |" in parts["Configuration"]


def test_the_pictures_are_the_newest_of_each_tag(whole):
    path = report.write(whole, str(whole), whole)
    found = shown(path.read_text())
    assert list(found) == ["learning curve", "a/first", "b/second"]
    for tag, colour in COLOURS.items():
        assert (imageio.imread(whole / found[tag]) == picture(colour)).all()
    assert "`a/first` after 200 environment steps" in path.read_text()
    assert imageio.imread(whole / found["learning curve"]).std() > 10


def test_a_folder_that_was_moved_still_shows_its_pictures(whole, tmp_path):
    report.write(whole, str(whole), whole)
    moved = shutil.move(whole, tmp_path / "moved")
    text = (moved / "report.md").read_text()
    assert len(shown(text)) == 3
    assert all((moved / name).is_file() for name in shown(text).values())
    assert "metaloop evaluate ." in text
    assert str(tmp_path) not in text


def test_a_report_may_lie_elsewhere(metaloop, whole, tmp_path):
    before = sorted(whole.rglob("*"))
    assert metaloop("report", whole, "--out", tmp_path / "pages" / "one")[0] == 0
    text = (tmp_path / "pages" / "one" / "report.md").read_text()
    assert len(shown(text)) == 3
    assert all((tmp_path / "pages" / "one" / name).is_file() for name in shown(text).values())
    assert "metaloop evaluate ../../runs/mine" in text
    assert sorted(whole.rglob("*")) == before


def test_a_report_of_a_url_lies_elsewhere(metaloop, whole, tmp_path):
    url = f"file://{whole}"
    status, _, error = metaloop("report", url)
    assert status == 2
    assert "say with --out DIR" in error
    assert metaloop("report", url, "--out", tmp_path / "copy")[0] == 0
    text = (tmp_path / "copy" / "report.md").read_text()
    assert len(shown(text)) == 3
    assert f"metaloop evaluate {url}" in text
    assert "tensorboard" not in sections(text)["How to go on"]


def test_what_is_missing_is_said(metaloop, tmp_path):
    folder = recorded.write(tmp_path / "bare-seed1", [])
    assert metaloop("report", folder)[0] == 0
    text = (folder / "report.md").read_text()
    for reason in (
        "# bare\n",
        "Nothing is recorded yet: metrics.jsonl is missing or empty.",
        "there is no meta.json",
        "There is no learning curve: ",
        "evaluation.json is missing",
        "the run has no tb/ here",
        "there is no config.json",
    ):
        assert reason in text
    assert shown(text) == {}
    (folder / "tb").mkdir()
    metaloop("report", folder)
    assert "tb/ holds no images" in (folder / "report.md").read_text()


def test_what_is_no_run_is_refused(metaloop, tmp_path):
    status, _, error = metaloop("report", tmp_path / "nothing")
    assert status == 2
    assert "is not a run's folder" in error
    assert not (tmp_path / "nothing").exists()


def test_events_cut_short_are_no_hindrance(whole):
    newest = max((whole / "tb").iterdir(), key=lambda path: path.name)
    newest.write_bytes(newest.read_bytes()[:-40])
    found = report.newest_images(whole / "tb")
    assert found["b/second"][0] in (100, 200)
    assert imageio.imread(io.BytesIO(found["b/second"][1])).shape == (5, 7, 3)


def test_groups_and_opponents_have_tables():
    result = recorded.evaluation(
        means=(1.0, 2.0),
        unit="episodes before",
        groups=[{"task": {"world": "maze"}, "members": 4, **recorded.evaluation(means=(7.0,))}],
        trial_return={"mean": 6.6464, "ci95": [6.5, 6.75]},
        opponents={"thompson": {"mean": 5.5, "ci95": [5.0, 6.0]}},
        bounds={"known task": {"mean": 8.0, "ci95": [7.0, 9.0]}},
    )
    text = "\n".join(report.evaluation(result))
    assert "| k, episodes before | mean | 95 % | IQM |" in text
    assert "Of these, 4 with world maze:" in text
    assert "| 0 | 7 | [6, 9] | 7.5 |" in text
    for row in ("ppo/delayed-hopper | 6.6464", "thompson | 5.5", "known task | 8"):
        assert f"| {row} |" in text


def test_of_many_numbered_metrics_some_are_shown():
    tags = ["perf/x", *(f"adapt/ep_rew_mean_{k}" for k in range(50)), "replica/a_0", "eval/gain"]
    shown_tags = report.main_tags(tags)
    ks = (0, 1, 2, 4, 8, 16, 32, 49)
    assert shown_tags == [*(f"adapt/ep_rew_mean_{k}" for k in ks), "eval/gain", "perf/x"]


@pytest.mark.parametrize(
    ("done", "command", "flags"),
    [
        (5, META["command"], ["--seed", "3"]),
        (10, META["command"], ["--seed", "3", "--iterations", "20"]),
        (10, ["metaloop", "train", "p", "--iterations=10"], ["--iterations", "20"]),
        (5, ["python", "evaluate"], []),
        (5, [], []),
    ],
)
def test_how_to_go_on(done, command, flags):
    run = Records(
        "runs/mine", [{"iteration": done, "env_steps": 1}], recorded.config(), {"command": command}
    )
    assert report.go_on_flags(run) == flags
    line = " ".join(["metaloop train", recorded.PRESET, *flags, "--run-dir ."])
    assert line in report.how_to_go_on(run, ".").splitlines()


def test_paths_among_the_flags_are_said_to_be_from_elsewhere():
    command = ["metaloop", "train", recorded.PRESET, "--rule", "runs/a/rule"]
    run = Records("runs/mine", config=recorded.config(), meta={"command": command})
    assert "where the run was started" in report.how_to_go_on(run, ".")
