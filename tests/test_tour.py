"""The tour runs, and its page is of the commands that it runs now."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


spec = importlib.util.spec_from_file_location("tour", ROOT / "docs" / "tour.py")
assert spec is not None
assert spec.loader is not None
tour = sys.modules["tour"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tour)


def commands(page: str) -> list[str]:
    return [line[2:] for line in page.splitlines() if line.startswith("$ ")]


@pytest.mark.slow
def test_every_step_of_the_tour_runs_and_leaves_what_it_shows(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(tour.shutil, "which", lambda name: None)  # no photographs
    tour.main(["--quick", "--out", str(tmp_path / "tour.md")])
    page = (tmp_path / "tour.md").read_text()
    assert commands(page) == [*(step.command for step in tour.STEPS), "tensorboard --logdir runs"]
    assert "stopped at iteration 3; the same command goes on" in page
    assert "from iteration 3" in page
    for step in tour.STEPS:
        for name in step.pictures:
            assert f"(tour/{name})" in page
            assert (tmp_path / "tour" / name).stat().st_size > 1000


def test_the_page_shows_these_commands():
    shown = commands((ROOT / "docs" / "tour.md").read_text())
    expected = [*(step.command for step in tour.STEPS), "tensorboard --logdir runs"]
    assert shown[-len(expected) :] == expected
