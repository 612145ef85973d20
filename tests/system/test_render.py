"""What a trained run does, as pictures and films."""

import io
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from actors.scenes import Plan, Pose
from actors.tasks import load_family
from learners.core.errors import ConfigError
from system import checkpoint, episodes, frames, plans, robots, run
from system.config import MAY_CHANGE
from system.episodes import Panel, Shown
from system.presets import PRESETS
from system.replay import Episode

pytestmark = pytest.mark.usefixtures("torch_threads")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_run):
    """(task) → the folder of a short run of MAML-TRPO; each is trained once."""
    known = {}

    def get(task="navigation-2d", **changes) -> Path:
        key = (task, *changes)
        if key not in known:
            known[key] = tmp_path_factory.mktemp("run")
            run.train(tiny_run(task, iterations=1, **changes), known[key])
        return known[key]

    return get


def shown(folder, *numbers):
    with run.restored(folder, {"backend": "serial"}) as (loop, _):
        return episodes.watch(loop, *numbers)


# --- What is shown ---


def test_each_task_before_and_after_its_updates(trained):
    found = shown(trained(), 2)
    assert (found.what, found.steps_between, found.steps_per_second) == ("adaptation", 1, 15.0)
    assert len(found.rows) == 2
    goals = set()
    for before, after in found.rows:
        assert before.lines[0] == after.lines[0]
        assert (before.lines[1], after.lines[1]) == ("before adaptation", "after 3 updates")
        (first,), (second,) = before.episodes, after.episodes
        assert first.scenes[0].agent.tolist() == second.scenes[0].agent.tolist() == [0.0, 0.0]
        # The same noise moves them, another policy.
        assert not np.array_equal(first.scenes[5].agent, second.scenes[5].agent)
        goal = first.scenes[0].marks[0]
        assert before.lines[0] == f"goal {goal[0]:.3g} {goal[1]:.3g}"
        goals.add(tuple(goal))
        assert first.returns[-1] < 0.0
    assert len(goals) == 2


def test_the_tasks_are_those_of_an_evaluation(trained):
    with run.restored(trained(), {"backend": "serial"}) as (loop, _):
        tasks, _ = loop.evaluate(3)
        rows = episodes.watch(loop, 3).rows
    drawn = [row[0].episodes[0].scenes[0].marks[0, :2] for row in rows]
    np.testing.assert_allclose(drawn, [task["goal"] for task in tasks], atol=1e-6)


def test_fewer_updates(trained):
    ((_, one), *_) = shown(trained(), 1, 1).rows
    ((_, three), *_) = shown(trained(), 1).rows
    assert one.lines[1] == "after 1 update"
    ends = [panel.episodes[0].scenes[-1].agent for panel in (one, three)]
    assert not np.array_equal(*ends)


@pytest.mark.parametrize("number", [0, 4])
def test_numbers_of_updates_that_do_not_fit(trained, number):
    with pytest.raises(ConfigError, match=f"--updates must be 1 to 3, .*; not {number}"):
        shown(trained(), 1, number)


def made(preset, folder, **changes):
    """A run of a preset that has learned nothing."""
    config = PRESETS[preset]()
    runtime = replace(config.runtime, backend="serial", device="cpu", learner_threads=1)
    defaults = {"iterations": 1, "eval_every": 0, "eval_tasks": 2, "picture_every": 0}
    run.train(replace(config, runtime=runtime, **(defaults | changes)), folder)
    return folder


def test_replicas_of_short_games(tmp_path):
    found = shown(made("frodo/catch", tmp_path, num_members=3, num_envs=2), 2)
    assert found.what == "episode"
    ((first, second),) = found.rows
    assert (first.lines, second.lines) == (("replica 0",), ("replica 1",))
    assert [len(panel.episodes) for panel in (first, second)] == [8, 8]
    assert {e.returns[-1] for e in (*first.episodes, *second.episodes)} <= {1.0, -1.0}
    assert {e.steps[-1] for e in first.episodes} == {5}
    with pytest.raises(ConfigError, match="--updates 1 has no effect"):
        shown(tmp_path, 1, 1)


def test_trials_show_their_first_and_last_episode(tmp_path):
    options = {"episodes": 3, "horizon": 20}
    learner = replace(PRESETS["rl2/maze"]().learner, num_minibatches=1, width=8)
    folder = made("rl2/maze", tmp_path, num_members=2, task_options=options, learner=learner)
    found = shown(folder, 2)
    assert found.what == "trial"
    for number, (first, last) in enumerate(found.rows):
        assert first.lines == (f"task {number}", "episode 1 of the trial")
        assert last.lines == (f"task {number}", "episode 3 of the trial")
        starts = [panel.episodes[0].scenes[0].agent.tolist() for panel in (first, last)]
        assert starts[0] == starts[1]


def test_families_without_a_picture_are_told_which_have_one(tmp_path, metaloop, trained):
    folder = trained("tabular-mdp")
    status, _, err = metaloop("render", folder, "--out", tmp_path / "x.png")
    assert status == 2
    assert "there is no picture of tabular-mdp. " in err
    for known in ("navigation-2d", "half-cheetah-dir", "worlds", "maze", "gym:<id>"):
        assert known in err
    assert "bandit" not in err


# --- The command ---


def test_a_picture_of_paths(tmp_path, metaloop, trained):
    out = tmp_path / "new" / "paths.png"
    assert metaloop("render", trained(), "--out", out) == (0, f"{out}\n", "")
    image = np.asarray(Image.open(out)).astype(int)
    assert min(image.shape[:2]) > 600
    green = image[..., 1] > image[..., 0] + 60
    half = len(image) // 2
    assert green[:half].any()
    assert green[half:].any()
    metaloop("render", trained(), "--out", out, "--tasks", "1")
    assert np.asarray(Image.open(out)).shape[0] < 450


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--out", "x.jpg"], "x.jpg must end in .png, .gif, .mp4, not '.jpg'"),
        (["--out", "x"], "must end in"),
        (["--out", "x.png", "--tasks", "0"], "--tasks must be at least 1, not 0"),
        (["--out", "x.png", "--update", "1"], "there is no flag --update; closest: --updates"),
        (["--out", "x.png", "--updates", "7"], "--updates must be 1 to 3"),
    ],
)
def test_what_does_not_fit_is_named(metaloop, trained, flags, named, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, _, err = metaloop("render", trained(), *flags)
    assert status == 2
    assert named in err
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_checkpoint_is_named(metaloop, tmp_path):
    status, _, err = metaloop("render", tmp_path, "--out", tmp_path / "x.png")
    assert status == 2
    assert "is not a run's folder" in err


def test_a_video_needs_a_writer_that_is_named(metaloop, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(frames.importlib.util, "find_spec", lambda name: None)
    status, _, err = metaloop("render", trained(), "--out", tmp_path / "x.mp4")
    assert status == 2
    assert "imageio-ffmpeg: pip install 'metaloop[video]'" in err
    assert ".gif" in err


# --- Films ---


def grey(value, size=(30, 200)):
    return np.full((*size, 3), value, np.uint8)


def episode(values, every=1):
    steps = [every * i for i in range(len(values))]
    return Episode([grey(v) for v in values], steps, [0.5 * step for step in steps])


def of(*panels, every=1, rate=10.0):
    return Shown([list(panels)], rate, every, "episode")


def test_a_film_shows_all_panels_until_the_last_one_ends():
    long, short = Panel(("long",), [episode([10, 20, 30])]), Panel(("short",), [episode([90, 91])])
    film = frames.film(of(long, short))
    images = list(film.images)
    assert film.fps == 10.0
    assert len(images) == 3 + 15  # the last one stays for 1.5 seconds
    assert len({image.shape for image in images}) == 1
    height, width = images[0].shape[:2]
    assert height % 16 == width % 16 == 0
    middle = (2 * 17 + 8 + 15, 8 + 100), (2 * 17 + 8 + 15, 8 + 208 + 100)
    seen = [[int(image[place][0]) for place in middle] for image in images]
    assert seen[:3] == [[10, 90], [20, 91], [30, 91]]
    assert seen[3:] == [[30, 91]] * 15


def test_episodes_in_a_row_are_counted():
    panel = Panel(("replica 0",), [episode([1, 2]), episode([3, 4])])
    moments = frames.course(panel, 1)
    said = [frames.caption(panel, moment) for moment in moments]
    assert said == [
        ["replica 0", f"episode {number} of 2", f"step {step}, return {step / 2:.2f}"]
        for number in (1, 2)
        for step in (0, 1)
    ]


def test_steps_are_left_out_where_the_world_is_fast():
    panel = Panel(("hopper",), [episode(range(100), every=2)])
    stride, fps = frames.pace(of(panel, every=2, rate=125.0))
    assert (stride, fps) == (3, pytest.approx(125 / 6))
    numbers = [i for _, i in frames.course(panel, stride)]
    assert numbers == [*range(0, 99, 3), 99]


def test_a_slow_film_of_a_long_episode_runs_faster_than_the_world():
    panel = Panel(("cheetah",), [episode([1, 2], every=5)])
    assert frames.pace(of(panel, every=5, rate=20.0)) == (1, 10.0)
    assert frames.pace(of(panel, every=1, rate=3.0)) == (1, 3.0)


def test_a_strip_goes_from_the_start_to_the_end():
    panel = Panel(("x",), [episode(range(101))])
    assert [i for _, i in frames.strip(panel)] == [0, 20, 40, 60, 80, 100]
    image = frames.still(of(panel, panel))
    assert image.shape[0] > 2 * 30
    assert image.shape[1] > 6 * 200


@pytest.mark.parametrize(("width", "expected"), [(40, 160), (84, 168), (300, 300), (960, 480)])
def test_pictures_get_a_size_that_can_be_seen(width, expected):
    image = frames.fit(grey(7, (width // 2, width)))
    assert image.shape == (expected // 2, expected, 3)
    assert (image == 7).all()


def test_a_plan_shows_path_things_and_walls():
    bounds = (-0.5, 3.5, 1.5, -0.5)
    marks = np.array([[3.0, 0.0, 1.0], [3.0, 1.0, -1.0]])
    blocks = np.array([[1.0, 1.0]])

    def plan(x, marks):
        return Plan(bounds, np.array([x, 0.0]), marks, blocks=blocks, cell=1.0)

    def count(image, color):
        return int((np.abs(image.astype(int) - color) < 40).all(2).sum())

    green, red, block = (44, 160, 44), (214, 39, 40), (89, 89, 89)
    start = plans.draw_plan([plan(0.0, marks)])
    assert start.shape == (160, 320, 3)
    assert count(start, green) > 50 < count(start, red)
    assert count(start, block) > 5000
    end = plans.draw_plan([plan(0.0, marks), plan(1.0, marks), plan(2.0, marks[1:])])
    assert 0 < count(end, green) < count(start, green)  # hollow: it was there
    assert count(end, red) == count(start, red)
    assert not np.array_equal(end, start)


def test_a_gif_plays_for_ever(tmp_path, metaloop, trained):
    out = tmp_path / "paths.gif"
    assert metaloop("render", trained(), "--out", out, "--tasks", "1")[0] == 0
    with Image.open(out) as film:
        assert film.info["loop"] == 0
        assert film.n_frames == 21  # twenty steps
        assert film.size[0] > film.size[1]


def test_a_video(tmp_path, trained, metaloop):
    pytest.importorskip("imageio_ffmpeg")
    import imageio.v3

    out = tmp_path / "paths.mp4"
    assert metaloop("render", trained(), "--out", out, "--tasks", "1")[0] == 0
    video = imageio.v3.imread(out, plugin="FFMPEG")
    assert len(video) == 21 + 22
    assert video.shape[1] % 16 == video.shape[2] % 16 == 0


# --- Robots ---


def test_each_kind_of_opengl_that_fails_is_named(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(robots, "BACKENDS", ("smoke", "mirrors"))
    with pytest.raises(ConfigError) as caught:
        robots.draw([Pose("hopper.xml", np.zeros(6))])
    lines = str(caught.value).splitlines()
    assert lines[1] == (
        "  MUJOCO_GL=smoke: RuntimeError: invalid value for environment variable MUJOCO_GL: smoke"
    )
    assert lines[2].startswith("  MUJOCO_GL=mirrors: RuntimeError: ")
    for named in ("MUJOCO_GL=egl", "libegl1", "MUJOCO_GL=osmesa", "libosmesa6"):
        assert named in lines[3]


def test_only_what_the_user_chose_is_tried(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "smoke")
    with pytest.raises(ConfigError) as caught:
        robots.draw([Pose("hopper.xml", np.zeros(6))])
    assert [line for line in str(caught.value).splitlines() if "Error:" in line] == [
        "  MUJOCO_GL=smoke: RuntimeError: invalid value for environment variable MUJOCO_GL: smoke"
    ]


def test_mujoco_is_imported_without_the_opengl_that_was_chosen(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "smoke")
    with robots.unloaded():
        assert "MUJOCO_GL" not in os.environ
    assert os.environ["MUJOCO_GL"] == "smoke"


def test_robots_before_and_after_adaptation(tmp_path, metaloop, trained, monkeypatch):
    poses = [Pose("half_cheetah.xml", np.linspace(0.0, x, 9)) for x in (0.0, 0.0, 0.5)]
    goals = [
        Pose("ant.xml", load_family("ant-goal").make(1).model.qpos0, np.array(g))
        for g in ([1.0, 1.0], [9.0, 9.0])
    ]
    try:
        drawn = robots.draw([*poses[:2], *goals, poses[2]])
    except ConfigError as error:
        pytest.skip(str(error))
    assert {image.shape for image in drawn} == {(240, 320, 3)}
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[4])
    reds = [int((image[..., 0] > image[..., 1] + 100.0).sum()) for image in drawn[2:4]]
    assert reds[0] > 20 > reds[1]
    out = tmp_path / "cheetah.gif"
    monkeypatch.chdir(tmp_path)
    folder = trained("half-cheetah-dir", task_options={"horizon": 6})
    assert metaloop("render", folder, "--out", out, "--tasks", "1") == (0, f"{out}\n", "")
    with Image.open(out) as film:
        assert film.n_frames == 7
        assert film.info["duration"] == 50  # as the world: a step is 0.05 s
    assert list(tmp_path.iterdir()) == [out]  # no log of MuJoCo's


# --- While a run trains ---


def test_films_in_tensorboard_change_nothing_that_is_learned(tmp_path, tiny_run):
    config = tiny_run(iterations=3, task_options={"horizon": 8})
    run.train(config, tmp_path / "without")
    run.train(replace(config, video_every=2), tmp_path / "with")
    states = []
    for name in ("without", "with"):
        loaded = checkpoint.load_newest(tmp_path / name / "checkpoints")
        states.append(loaded.tensors)
    assert states[0].keys() == states[1].keys()
    assert all(np.array_equal(states[0][n], states[1][n]) for n in states[0])
    sizes = {"images": 0}
    found = EventAccumulator(str(tmp_path / "with" / "tb"), size_guidance=sizes).Reload()
    (event,) = found.Images("videos/adaptation")
    rows = [json.loads(line) for line in (tmp_path / "with/metrics.jsonl").read_text().splitlines()]
    assert event.step == rows[1]["env_steps"]
    with Image.open(io.BytesIO(event.encoded_image_string)) as film:
        assert film.format == "GIF"
        assert film.n_frames == 9
        assert film.size == (event.width, event.height)


def test_a_run_whose_films_fail_says_so_once_and_goes_on(tmp_path, tiny_run, capsys):
    result = run.train(tiny_run("tabular-mdp", iterations=3, video_every=1), tmp_path)
    assert result is not None
    said = capsys.readouterr()
    assert (said.out + said.err).count("no more videos") == 1


def test_the_setting_is_checked_and_may_change(tiny_run):
    with pytest.raises(ConfigError, match="video_every must not be negative, not -1"):
        tiny_run(video_every=-1)
    assert "video_every" in MAY_CHANGE
