import json
import math
import re
import time

import pytest
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata

from system.telemetry import Telemetry, flat_settings

TAGS = ("rollout/ep_rew_mean", "meta/loss")


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Sleeping moves the clock instead of taking time."""
    real, ahead = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + ahead[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: ahead.append(ahead.pop() + seconds))


def metrics(iteration, offset=0.0):
    return {"rollout/ep_rew_mean": iteration + offset, "meta/loss": 1.0 / (iteration + 1)}


def record(run_dir, iterations, resume=None, offset=0.0):
    with Telemetry(run_dir, resume) as telemetry:
        telemetry.config_text({"seed": 1})
        for i in iterations:
            telemetry.write(i, 1000 * i, metrics(i, offset))


def events(run_dir):
    accumulator = EventAccumulator(str(run_dir / "tb"), size_guidance={"scalars": 0, "tensors": 0})
    return accumulator.Reload()


def curve(run_dir, tag=TAGS[0]):
    return [(e.step, e.value) for e in events(run_dir).Scalars(tag)]


def as_shown(run_dir, tag):
    """Steps of a tag in the reader that TensorBoard's pages use, where scalars are tensors too."""
    accumulator = plugin_event_accumulator.EventAccumulator(
        str(run_dir / "tb"), tensor_size_guidance={"scalars": 0, "text": 0}
    )
    return [event.step for event in accumulator.Reload().Tensors(tag)]


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def refuse_constant(name):
    raise AssertionError(f"{name} is not JSON")


def test_both_hold_the_same_tags_and_values(tmp_path):
    record(tmp_path / "run", range(1, 6))
    assert curve(tmp_path / "run") == [(1000 * i, float(i)) for i in range(1, 6)]
    assert rows(tmp_path / "run") == [
        {"iteration": i, "env_steps": 1000 * i, **metrics(i)} for i in range(1, 6)
    ]
    assert set(events(tmp_path / "run").Tags()["scalars"]) == set(TAGS)


def test_what_is_written_can_be_read_at_once(tmp_path):
    with Telemetry(tmp_path) as telemetry:
        for i in range(1, 4):
            telemetry.write(i, i, metrics(i))
            assert len(rows(tmp_path)) == i
            assert len(curve(tmp_path)) == i


def test_not_finite_is_null_and_a_gap(tmp_path):
    with Telemetry(tmp_path) as telemetry:
        telemetry.write(1, 10, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 2.0, "e": 1e300})
        telemetry.write(2, 20, {"a": 1.0})
    text = (tmp_path / "metrics.jsonl").read_text()
    parsed = [json.loads(x, parse_constant=refuse_constant) for x in text.splitlines()]
    assert parsed[0] == {
        "iteration": 1, "env_steps": 10, "a": None, "b": None, "c": None, "d": 2.0, "e": 1e300
    }  # fmt: skip
    assert set(events(tmp_path).Tags()["scalars"]) == {"a", "d"}  # 1e300 is no float32
    assert curve(tmp_path, "a") == [(20, 1.0)]


def test_a_resumed_curve_is_unbroken_and_has_no_double_points(tmp_path):
    record(tmp_path, range(1, 8))
    record(tmp_path, range(5, 11), resume=4, offset=0.5)
    expected = [(1000 * i, float(i)) for i in range(1, 5)]
    expected += [(1000 * i, i + 0.5) for i in range(5, 11)]
    assert curve(tmp_path) == expected
    assert [(r["env_steps"], r["rollout/ep_rew_mean"]) for r in rows(tmp_path)] == expected
    for tag in TAGS:
        assert as_shown(tmp_path, tag) == [step for step, _ in expected]
        steps = [step for step, _ in curve(tmp_path, tag)]
        assert steps == sorted(set(steps))


def test_points_after_the_checkpoint_vanish_before_new_ones_come(tmp_path):
    record(tmp_path, range(1, 8))
    record(tmp_path, [], resume=4)
    assert [step for step, _ in curve(tmp_path)] == [1000, 2000, 3000, 4000]
    assert [row["iteration"] for row in rows(tmp_path)] == [1, 2, 3, 4]


def test_resumed_twice_from_one_checkpoint(tmp_path):
    record(tmp_path, range(1, 4))
    record(tmp_path, range(3, 6), resume=2)
    record(tmp_path, range(3, 5), resume=2, offset=0.25)
    assert curve(tmp_path) == [(1000, 1.0), (2000, 2.0), (3000, 3.25), (4000, 4.25)]
    assert [row["iteration"] for row in rows(tmp_path)] == [1, 2, 3, 4]
    assert as_shown(tmp_path, "config/text_summary") == [0, 2001]


def test_starting_anew_in_a_used_folder_drops_what_was_there(tmp_path):
    record(tmp_path, range(1, 8))
    record(tmp_path, range(1, 3), offset=0.5)
    assert curve(tmp_path) == [(1000, 1.5), (2000, 2.5)]
    assert [row["iteration"] for row in rows(tmp_path)] == [1, 2]


def test_several_rows_of_one_iteration_are_kept(tmp_path):
    with Telemetry(tmp_path) as telemetry:
        telemetry.write(1, 10, {"a": 1.0})
        telemetry.write(1, 10, {"eval/return": 2.0})
        telemetry.write(2, 20, {"a": 3.0})
    with Telemetry(tmp_path, 1) as telemetry:
        telemetry.write(2, 20, {"a": 4.0})
    assert curve(tmp_path, "a") == [(10, 1.0), (20, 4.0)]
    assert curve(tmp_path, "eval/return") == [(10, 2.0)]
    assert [row["iteration"] for row in rows(tmp_path)] == [1, 1, 2]


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_line_cut_short_is_dropped(tmp_path, cut):
    record(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    # A line that lacks nothing but its line break is whole.
    whole = 3 if cut == 1 else 2
    record(tmp_path, [4], resume=3)
    assert [row["iteration"] for row in rows(tmp_path)] == [*range(1, whole + 1), 4]
    assert [step for step, _ in curve(tmp_path)] == [1000 * i for i in (*range(1, whole + 1), 4)]


@pytest.mark.parametrize("garbage", [b"\x00" * 50, b"\xff\xfe", b"17\n", b"[]\n", b'{"a": 1}\n'])
def test_garbage_lines_are_dropped(tmp_path, garbage):
    record(tmp_path, range(1, 3))
    with open(tmp_path / "metrics.jsonl", "ab") as stream:
        stream.write(garbage)
    record(tmp_path, [3], resume=2)
    assert [row["iteration"] for row in rows(tmp_path)] == [1, 2, 3]


def test_event_files_sort_in_the_order_they_were_made(tmp_path):
    for i in range(12):
        record(tmp_path, [i], resume=i)
    assert curve(tmp_path) == [(1000 * i, float(i)) for i in range(12)]
    seconds = [path.name.split(".")[3] for path in (tmp_path / "tb").iterdir()]
    assert len(set(seconds)) == 12


def test_an_event_file_cut_short_does_not_hide_what_follows(tmp_path):
    record(tmp_path, range(1, 5))
    (file,) = (tmp_path / "tb").iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    record(tmp_path, range(4, 6), resume=3)
    assert [step for step, _ in curve(tmp_path)] == [1000, 2000, 3000, 4000, 5000]


def test_dropping_rows_is_one_step(tmp_path, monkeypatch):
    record(tmp_path, range(1, 6))
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def fail(*paths):
        raise OSError("interrupted")

    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(f"os.{function}", fail)
            with pytest.raises(OSError, match="interrupted"):
                Telemetry(tmp_path, 2)
        assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_configuration_is_text_and_hparams_of_the_same_run(tmp_path):
    config = {"task": "a|b", "inner": {"steps": 3, "lr": 0.1}, "anneal": False, "hidden": [64, 64]}
    with Telemetry(tmp_path) as telemetry:
        telemetry.config_text(config)
        telemetry.write(1, 10, metrics(1))
    accumulator = events(tmp_path)
    (text,) = accumulator.Tensors("config/text_summary")
    table = text.tensor_proto.string_val[0].decode()
    assert "| inner.steps | 3 |" in table
    assert "| task | a\\|b |" in table

    content = accumulator.PluginTagToContent(metadata.PLUGIN_NAME)
    assert set(content) == {
        metadata.EXPERIMENT_TAG,
        metadata.SESSION_START_INFO_TAG,
        metadata.SESSION_END_INFO_TAG,
    }
    start = metadata.parse_session_start_info_plugin_data(content[metadata.SESSION_START_INFO_TAG])
    assert start.hparams["inner.steps"].number_value == 3
    assert start.hparams["inner.lr"].number_value == pytest.approx(0.1)
    assert start.hparams["anneal"].bool_value is False
    assert start.hparams["hidden"].string_value == "[64, 64]"
    # One run: one event file directly in tb/, and no folder within.
    assert [path.is_file() for path in (tmp_path / "tb").iterdir()] == [True]


def test_flat_settings():
    config = {"a": {"b": {"c": 1}, "d": None}, "e": True, "f": "two\nlines", "g": (1, 2)}
    flat = flat_settings(config)
    assert flat == {"a.b.c": 1, "a.d": "None", "e": True, "f": "two\nlines", "g": "(1, 2)"}


def test_files_are_closed_after_an_error(tmp_path):
    telemetry = Telemetry(tmp_path)

    def interrupted():
        with telemetry:
            telemetry.write(1, 10, metrics(1))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interrupted()
    with pytest.raises(ValueError, match="closed"):
        telemetry.write(2, 20, metrics(2))
    assert [row["iteration"] for row in rows(tmp_path)] == [1]


def charts_of(run_dir, members):
    with Telemetry(run_dir) as telemetry:
        telemetry.config_text({"seed": 1}, members)
        telemetry.write(1, 10, {"adapt/ep_rew_mean_0": 1.0, "adapt/ep_rew_mean_12": 2.0})
    (event,) = events(run_dir).Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    return {chart.title: chart for category in layout.category for chart in category.chart}


def test_curves_that_belong_together_are_shown_together(tmp_path):
    charts = charts_of(tmp_path, "adapting")
    (pattern,) = charts["training after k"].multiline.tag
    tags = events(tmp_path).Tags()["scalars"]
    assert [tag for tag in tags if re.fullmatch(pattern, tag)] == tags
    idle = charts["idle share of actors and learner"].multiline.tag
    assert list(idle) == ["perf/actor_idle_frac", "perf/learner_idle_frac"]


def test_replicas_are_shown_with_their_interval(tmp_path):
    (series,) = charts_of(tmp_path, "replicas")["mean and 95 % interval"].margin.series
    assert series.lower == "rollout/ep_rew_ci95_low"
