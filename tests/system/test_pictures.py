"""Pictures: what is drawn, when, and that TensorBoard reads it back."""

import io
import json
import warnings
from dataclasses import replace

import imageio.v3 as imageio
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from actors.tasks import load_family
from learners.core.errors import ConfigError
from system import pictures, run
from system.config import MAY_CHANGE
from system.learner_host import LearnerHost
from system.presets import PRESETS
from system.telemetry import Telemetry

pytestmark = pytest.mark.usefixtures("torch_threads")

TAGS = [
    "frodo/sensitivity",
    "frodo/target",
    "lirpg/episode",
    "lirpg/reward_slices",
    "lirpg/saliency",
    "lpg/course",
    "lpg/grid",
    "lpg/meaning",
    "lpg/pi_hat",
    "rl2/maze",
    "rl2/trial",
]


def described(seed=0, num_slices=3, num_frames=8):
    rng = np.random.default_rng(seed)
    return {
        "intrinsic_reward": rng.uniform(-1, 1, 50),
        "episode_intrinsic": rng.uniform(-1, 1, 20),
        "episode_extrinsic": rng.uniform(0, 5, 20),
        "slices": rng.uniform(-1, 1, (num_slices, 5, 5)),
        "slice_velocity": np.linspace(-3, 3, 5),
        "slice_action": np.linspace(-1, 1, 5),
        "frames": rng.integers(0, 256, (num_frames, 9, 7), dtype=np.uint8),
        "saliency": rng.uniform(0, 1e-4, (num_frames, 9, 7)),
        "frame_reward": rng.uniform(-1, 1, num_frames),
        "target": rng.uniform(-1, 1, 30),
        "vtrace": rng.uniform(-1, 1, 30),
        "sensitivity": rng.uniform(0, 1, 6),
        "trial_reward": rng.uniform(0, 1, 120),
        "trial_entropy": rng.uniform(0, 1, 120),
        "maze_lines": rng.integers(0, 5, (9, 2, 2)) - 0.5,
        "maze_path": np.column_stack([rng.integers(0, 5, (30, 2)), np.arange(30) // 20]),
        "maze_target": rng.integers(0, 5, 2),
        "pi_hat": rng.uniform(-1, 1, 30),
        "advantage": rng.uniform(-1, 1, 30),
        "meaning": rng.uniform(0, 1, (2, 6)),
        "course": np.where(rng.uniform(size=(2, 10)) < 0.7, rng.uniform(size=(2, 10)), np.nan),
        "grid": np.array([3, 4]),
        "cells": rng.integers(0, 12, (5, 2)),
        "cell_value": rng.uniform(-1, 1, 10),
        "cell_y": rng.dirichlet(np.ones(4), 10),
        "cell_end": rng.uniform(size=(5, 2)) < 0.2,
    }


def reader(folder):
    sizes = {"images": 0, "histograms": 0, "scalars": 0}
    return EventAccumulator(str(folder / "tb"), size_guidance=sizes).Reload()


def test_images_are_bytes_in_colour_and_no_warning_is_given():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = pictures.draw(described())
    assert sorted(images) == TAGS
    for image in images.values():
        assert image.dtype == np.uint8
        assert image.ndim == 3
        assert image.shape[2] == 3
        assert min(image.shape[:2]) > 300
        assert len(np.unique(image.reshape(-1, 3), axis=0)) > 20


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("episode_intrinsic", "lirpg/episode"),
        ("episode_extrinsic", "lirpg/episode"),
        ("slices", "lirpg/reward_slices"),
        ("frames", "lirpg/saliency"),
        ("saliency", "lirpg/saliency"),
        ("frame_reward", "lirpg/saliency"),
        ("target", "frodo/target"),
        ("vtrace", "frodo/target"),
        ("sensitivity", "frodo/sensitivity"),
        ("trial_reward", "rl2/trial"),
        ("trial_entropy", "rl2/trial"),
        ("maze_lines", "rl2/maze"),
        ("maze_path", "rl2/maze"),
    ],
)
def test_each_input_changes_its_picture_and_no_other(name, tag):
    images = pictures.draw(described())
    changed = pictures.draw(described() | {name: described(seed=1)[name]})
    differing = [t for t in images if not np.array_equal(images[t], changed[t])]
    assert differing == [tag]


def test_the_same_arrays_give_the_same_pictures():
    for one, other in zip(
        pictures.draw(described()).values(), pictures.draw(described()).values(), strict=True
    ):
        assert np.array_equal(one, other)


def test_saliency_is_red_where_it_is_large():
    shown = described(num_frames=1)
    shown["frames"][:] = 128
    plain = pictures.draw(shown | {"saliency": np.zeros((1, 9, 7))})["lirpg/saliency"]
    spot = np.zeros((1, 9, 7))
    spot[0, 4, 3] = 1e-4
    image = pictures.draw(shown | {"saliency": spot})["lirpg/saliency"].astype(int)
    red = (image[..., 0] > 200) & (image[..., 1] < 60)
    assert red[:, : image.shape[1] // 2].sum() > 100
    assert not ((plain[..., 0] > 200) & (plain[..., 1] < 60))[:, : plain.shape[1] // 2].any()


@pytest.mark.parametrize("count", [1, 2, 5, 6, 8])
def test_any_number_of_panels_can_be_drawn(count):
    assert sorted(pictures.draw(described(num_slices=count, num_frames=count))) == TAGS


def test_a_reward_that_is_the_same_everywhere_can_be_drawn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            sorted(
                pictures.draw(
                    {n: 0 * a for n, a in described().items()}
                    | {
                        name: described()[name]
                        for name in ("slice_velocity", "slice_action", "grid")
                    }
                )
            )
            == TAGS
        )


def test_nothing_described_nothing_drawn():
    assert pictures.draw({}) == pictures.histograms({}) == {}


def test_histograms_leave_out_what_is_not_finite(tmp_path):
    values = np.array([0.5, np.nan, -0.25, np.inf])
    with Telemetry(tmp_path) as telemetry:
        telemetry.show(7, {}, {"some": values, "none": np.full(3, np.nan)})
    (event,) = reader(tmp_path).Histograms("some")
    found = event.histogram_value
    assert (event.step, found.num, found.min, found.max) == (7, 2, -0.25, 0.5)
    assert reader(tmp_path).Tags()["histograms"] == ["some"]


@pytest.mark.parametrize(
    ("every", "iterations"), [(0, []), (1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (50, [5])]
)
def test_when_pictures_are_due(tiny_run, every, iterations):
    config = tiny_run(iterations=5, picture_every=every)
    assert [i for i in range(1, 6) if run.pictures_are_due(config, i)] == iterations


def test_the_setting_is_checked_and_may_change(tiny_run):
    with pytest.raises(ConfigError, match="picture_every must not be negative, not -1"):
        tiny_run(picture_every=-1)
    assert "picture_every" in MAY_CHANGE


@pytest.mark.parametrize("robot", ["hopper", "half-cheetah", "walker2d", "ant", "humanoid"])
def test_the_velocity_of_a_robot_is_the_root_s(robot):
    family = load_family(f"delayed-{robot}", {})
    env = family.make(2)
    env.reset(seed=[1, 2], options={"tasks": [{}, {}]})
    rng = np.random.default_rng(0)
    obs, *_ = env.step(rng.uniform(-0.4, 0.4, (2, family.spec.action_size)))
    speed = env.qvel[:, 0].astype(np.float32)
    assert np.abs(speed).min() > 0.0
    assert np.array_equal(obs[:, family.spec.velocity], speed)
    env.close()


def test_a_method_without_pictures_describes_nothing(tiny_run):
    config = tiny_run()
    family = load_family(config.task, config.task_options)
    host = LearnerHost(config.learner, family.spec, [0], "cpu", 1)
    assert host.describe() == {}


def test_a_run_writes_pictures_and_a_histogram_beside_its_scalars(tmp_path):
    config = PRESETS["lirpg/delayed-hopper"]()
    learner = replace(
        config.learner, num_steps=64, num_minibatches=2, num_epochs=1, normalize_obs=False
    )
    runtime = replace(config.runtime, backend="serial", device="cpu", learner_threads=1)
    config = replace(
        config,
        learner=learner,
        runtime=runtime,
        iterations=1,
        num_members=1,
        eval_tasks=1,
        picture_every=1,
    )
    run.train(config, tmp_path)
    found = reader(tmp_path)
    assert sorted(found.Tags()["images"]) == ["lirpg/episode", "lirpg/reward_slices"]
    (row,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert row["env_steps"] == 64
    for tag in found.Tags()["images"]:
        (event,) = found.Images(tag)
        assert event.step == 64
        image = imageio.imread(io.BytesIO(event.encoded_image_string))
        assert image.shape == (event.height, event.width, 3)
        assert tag not in row
    (event,) = found.Histograms("lirpg/intrinsic_reward")
    assert (event.step, event.histogram_value.num) == (64, 64)
    mean = event.histogram_value.sum / 64
    assert mean == pytest.approx(row["lirpg/intrinsic_reward_mean"], abs=1e-5)
    assert "lirpg/intrinsic_reward" not in row
