import io
import math
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from system.progress import Progress, describe, duration, evaluation_parts, seconds_left, series

METRICS = {
    "adapt/ep_rew_mean_0": -35.25,
    "adapt/ep_rew_mean_1": 100.0,
    "adapt/ep_rew_mean_10": 1210.5,
    "perf/env_steps_per_s": 12345.6,
    "sys/actor_restarts": 2.0,
    "meta/loss": 0.1,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_where_there_is_no_terminal(capsys):
    with Progress(500, 11, "maml/toy") as progress:
        progress.update(12, 480_000, METRICS)
        progress.say("actor 3 was restarted [2/5]")
        progress.update(13, 520_000, METRICS | {"eval/success": 0.5})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert re.sub(r"eta \S+", "eta 0:00:00", lines[0]) == (
        "maml/toy  12/500  eta 0:00:00  env steps 480,000  12,346 steps/s  "
        "return -35.25 -> 1,210.50  restarts 2"
    )
    assert lines[1] == "actor 3 was restarted [2/5]"
    assert lines[2].endswith("eval/success 0.50")


def test_lines_hold_no_control_characters_and_only_ascii(capsys, monkeypatch):
    for variable in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.setenv(variable, "1")
    with Progress(2, 0, "toy") as progress:
        progress.update(1, 10, METRICS)
        progress.update(2, 20, {})
    out = capsys.readouterr().out
    assert out.isascii()
    assert "\x1b" not in out
    assert out.count("\n") == 2


def test_lines_reach_a_pipe_at_once():
    code = (
        "import os\n"
        "from system.progress import Progress\n"
        "with Progress(3, 0, 'toy') as p:\n"
        "    p.update(1, 10, {})\n"
        "    os._exit(0)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.startswith("toy  1/3  eta ")


def test_importing_it_does_not_import_torch():
    code = "import sys, system.progress; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_live_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with Progress(10, 4, "toy [x]", stream) as progress:
        progress.update(5, 50, METRICS | {"eval/success": 0.5})
        progress.say("note [bold] stays as it is")
        progress.update(6, 60, METRICS)
    out = stream.getvalue()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out)
    assert "toy [x]" in plain
    assert "4/10" in plain
    assert "6/10" in plain
    assert "return -35.25 -> 1,210.50  restarts 2" in plain
    assert "note [bold] stays as it is\n" in plain
    # An evaluation stays on the screen after the iteration that made it.
    assert "eval/success 0.50" in plain.rsplit("6/10", 1)[1]
    assert out.endswith("\x1b[?25h")  # the cursor is shown again


def test_a_live_bar_lets_an_error_through(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with pytest.raises(RuntimeError, match="stop"), Progress(10, 0, "toy", stream):
        raise RuntimeError("stop")
    assert "\x1b[?25h" in stream.getvalue()


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Progress(10, 0, "toy", stream) as progress:
        progress.update(1, 10, {})
    assert re.fullmatch(r"toy  1/10  eta \S+  env steps 10\n", stream.getvalue())


def test_returns_that_are_shown():
    assert "return 5.00 " not in describe("-", 1, {})
    assert describe("-", 1, {"adapt/ep_rew_mean_0": 5.0}).endswith("return 5.00")
    assert describe("-", 1, {"rollout/ep_rew_mean": 5.0}).endswith("return 5.00")
    unfinished = {"adapt/ep_rew_mean_0": math.nan, "adapt/ep_rew_mean_1": 2.0}
    assert describe("-", 1, unfinished).endswith("return - -> 2.00")


def test_numbered_tags_are_taken_in_the_order_of_their_numbers():
    assert series({"a_10": 3.0, "a_2": 2.0, "a_0": 1.0, "a_x": 9.0, "b_1": 8.0}, "a_") == [1, 2, 3]
    shown = evaluation_parts({"eval/iqm_0": 1.0, "eval/iqm_2": 3.0, "eval/gain": 2.0, "a": 0.0})
    assert shown == ["eval/iqm 1.00 -> 3.00", "eval/gain 2.00"]


def test_metrics_are_not_changed():
    given_metrics = METRICS | {"eval/success": 0.5}
    copy = dict(given_metrics)
    with Progress(2, 0, "toy", io.StringIO()) as progress:
        progress.update(1, 10, given_metrics)
    assert given_metrics == copy


def test_remaining_time():
    assert seconds_left([(100.0, 4), (110.0, 6), (130.0, 9)], 19) == 60.0
    assert seconds_left([(100.0, 4), (130.0, 19)], 19) == 0.0
    assert seconds_left([(100.0, 4), (130.0, 25)], 19) == 0.0
    assert math.isnan(seconds_left([(100.0, 4)], 19))
    assert math.isnan(seconds_left([(100.0, 4), (101.0, 4)], 19))


def test_durations_by_hand():
    assert [duration(s) for s in (0, 59.6, 3599.4, 3600, 360_000)] == [
        "0:00:00", "0:01:00", "0:59:59", "1:00:00", "100:00:00"
    ]  # fmt: skip
    assert duration(math.nan) == duration(math.inf) == "-"


@given(st.floats(0, 1e7))
def test_a_duration_reads_back(seconds):
    hours, minutes, rest = map(int, duration(seconds).split(":"))
    assert minutes < 60
    assert rest < 60
    assert 3600 * hours + 60 * minutes + rest == round(seconds)


def test_lag_is_shown_where_there_can_be_some():
    assert "lag" not in describe("-", 10, METRICS)
    assert "  lag 0.75  restarts 2" in describe("-", 10, METRICS | {"perf/policy_lag_mean": 0.75})
