"""Measurements run, say what they measured, and compare with an earlier one."""

import json

import pytest

from system.cli import main

pytestmark = pytest.mark.usefixtures("torch_threads")

SMALL = ("--iterations", "2", "--warm-up", "1", "--width", "4", "--learner-threads", "1")
SIZES = {"lpg": ("--num-members", "2", "--num-envs", "2"), "rl2": ("--num-members", "20")}


@pytest.mark.parametrize("name", SIZES)
def test_a_measurement_tells_each_part_and_its_ratio_to_an_earlier_one(name, tmp_path, capsys):
    out = tmp_path / "bench.json"
    flags = [*SMALL, *SIZES[name], "--device", "cpu"]
    assert main(["bench", name, *flags, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    for part in ("environments and acting", "outer update", "environment steps", "MiB"):
        assert part in said
    result = json.loads(out.read_text())
    whole = result["seconds"].pop("iteration")
    assert whole["min"] <= whole["median"] <= whole["max"]
    assert sum(part["min"] for part in result["seconds"].values()) <= whole["max"]
    steps = {"lpg": 2 * 2 * 20 * 6, "rl2": 20 * 100}[name]
    assert result["env_steps"] == steps
    assert result["iterations"] == 2
    assert main(["bench", name, *flags, "--compare", str(out)]) == 0
    assert "times as fast as" in capsys.readouterr().out


def test_an_unknown_flag_is_answered_with_the_closest(capsys):
    assert main(["bench", "rl2", "--num-member", "4"]) == 2
    assert "--num-members" in capsys.readouterr().err
