"""Measurements run, say what they measured, and compare with an earlier one."""

import json
import os

import pytest

from system.bench.iteration import PARTS, WHOLE
from system.bench.sampling import END_TO_END, KINDS

pytestmark = pytest.mark.usefixtures("torch_threads")

SHORT = ("--iterations", "1", "--warm-up", "0", "--learner-threads", "1", "--device", "cpu")
SIZES = {
    "maml": ("--num-members", "2"),
    "navigation": ("--num-members", "2"),
    "lirpg": (),
    "frodo": ("--num-members", "2"),
    "lpg": ("--num-members", "2", "--num-envs", "2", "--width", "4"),
    "rl2": ("--num-members", "20", "--width", "4"),
}
STEPS = {
    "maml": 2 * 20 * 100 * 2, "lirpg": 2048, "lpg": 2 * 2 * 20 * 6, "rl2": 20 * 100,
}  # fmt: skip


@pytest.fixture
def one_core():
    """As many processes as there are cores would only take longer."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:1])
    yield
    os.sched_setaffinity(0, before)


@pytest.mark.parametrize("name", SIZES)
def test_an_iteration_is_told_in_its_parts(name, tmp_path, metaloop):
    out = tmp_path / "bench.json"
    status, said, err = metaloop("bench", name, *SHORT, *SIZES[name], "--out", out)
    assert status == 0, err
    for part in ("environments and acting", "outer update", "environment steps", "MiB"):
        assert part in said
    result = json.loads(out.read_text())
    whole = result["seconds"][WHOLE]
    assert whole["min"] <= whole["median"] <= whole["max"]
    assert sum(result["seconds"][part]["min"] for part in PARTS) <= whole["max"]
    assert result["env_steps"] == STEPS.get(name, result["env_steps"])
    assert result["iterations"] == 1
    if name == "maml":
        assert result["seconds"]["one Fisher-vector product"]["min"] > 0.0


def test_a_measurement_is_compared_with_an_earlier_one(tmp_path, metaloop):
    out = tmp_path / "bench.json"
    flags = ("--iterations", "2", "--warm-up", "1", *SIZES["frodo"], "--device", "cpu")
    status, _, err = metaloop("bench", "frodo", *flags, "--out", out)
    assert status == 0, err
    result = json.loads(out.read_text())
    assert result["iterations"] == 2
    result["seconds"][WHOLE]["median"] *= 1000.0
    out.write_text(json.dumps(result))
    status, said, _ = metaloop("bench", "frodo", *flags, "--compare", out)
    assert status == 0
    ratio = next(line for line in said.splitlines() if line.startswith(f"{WHOLE}: "))
    assert ratio.endswith(f"times as fast as {out}")
    assert float(ratio.removeprefix(f"{WHOLE}: ").split()[0]) > 50.0


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("no_cluster")
def test_sampling_is_measured_from_bare_physics_to_the_whole_system(tmp_path, metaloop, one_core):
    out = tmp_path / "bench.json"
    status, said, err = metaloop(
        "bench", "sampling", "--seconds", "0.1", "--iterations", "1", "--out", out
    )
    assert status == 0, err
    result = json.loads(out.read_text())
    measured = set(result["steps_per_s"])
    assert set(KINDS) - measured <= {"EnvPool, torch policy"}
    assert END_TO_END in measured
    assert all(spread["min"] > 0.0 for spread in result["steps_per_s"].values())
    assert result["ratios"]["bare mj_step / bare mj_step"] == 1.0
    assert f"{END_TO_END} / bare mj_step" in said


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("no_cluster")
def test_transport_is_measured_by_size_and_by_chunks_in_flight(tmp_path, metaloop):
    out = tmp_path / "bench.json"
    flags = ("--iterations", "1", "--num-actors", "1", "--out", out)
    status, _, err = metaloop("bench", "transport", *flags)
    assert status == 0, err
    seconds = json.loads(out.read_text())["seconds"]
    assert {"chunk of 1 MB, actor to learner", "parameters of 1 MB, learner to actor"} <= set(
        seconds
    )
    assert all(spread["min"] > 0.0 for spread in seconds.values())


def test_an_unknown_flag_is_answered_with_the_closest(metaloop):
    status, _, err = metaloop("bench", "rl2", "--num-member", "4")
    assert status == 2
    assert "--num-members" in err
