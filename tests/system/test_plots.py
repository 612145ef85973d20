"""The picture of several runs, and the verb that makes it."""

from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
from matplotlib.colors import to_hex

from learners.core.errors import ConfigError
from system import curves, plots
from system.records import Records
from tests.system import recorded

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def panels(*runs):
    return curves.panels(curves.grouped(runs))


def run(name, rows, preset, evaluation=None, **changes):
    config = recorded.config(f"{preset}/x", **changes)
    return Records(name, rows, config, {}, evaluation or {})


def adapting(seeds=2):
    results = [recorded.evaluation(means=(0.0, seed + 1.0)) for seed in range(seeds)]
    return panels(
        *(
            run(f"a{s}", recorded.adapting(s), "a", result, seed=s)
            for s, result in enumerate(results)
        )
    )


def comparing(num=2):
    return panels(*(run(f"{n}", recorded.with_replicas(n), f"m{n}") for n in range(num)))


def drawn(figure):
    """The axes that are seen."""
    return [axes for axes in figure.axes if axes.get_visible()]


def band(collection):
    """Lower and upper end of a band at each x."""
    points = collection.get_paths()[0].vertices
    return {
        x: (min(ys), max(ys)) for x in set(points[:, 0]) if len(ys := points[points[:, 0] == x, 1])
    }


def test_lines_are_means_and_bands_are_intervals():
    (panel,) = adapting()
    learning, last = drawn(plots.figure([panel]))
    before, after = learning.get_lines()
    assert (before.get_linestyle(), after.get_linestyle()) == ("--", "-")
    series = panel.series[0]
    np.testing.assert_allclose(after.get_xdata(), series.after.steps)
    np.testing.assert_allclose(after.get_ydata(), series.after.values.mean(0))
    ends = band(learning.collections[1])
    for step, values in zip(series.after.steps, series.after.values.T, strict=True):
        assert ends[step] == pytest.approx((values.min(), values.max()))
    (line,) = last.get_lines()
    assert line.get_xydata().tolist() == [[0.0, 0.0], [1.0, 1.5]]
    assert band(last.collections[0])[1.0] == pytest.approx((1.0, 2.0))


def test_the_statistic_may_be_the_interquartile_mean():
    rows = recorded.with_replicas(replicas=4)
    rows[-1]["replica/ep_rew_mean_3"] = 1e6
    (panel,) = panels(run("a", rows, "a"))
    (mean,), (iqm,) = (
        drawn(plots.figure([panel], statistic))[0].get_lines() for statistic in ("mean", "iqm")
    )
    assert mean.get_ydata()[-1] > 1e5
    assert iqm.get_ydata()[-1] == 6.5


def test_a_single_run_has_no_band_and_says_so():
    (panel,) = adapting(seeds=1)
    learning, last = drawn(plots.figure([panel]))
    assert len(learning.collections) == 0
    assert len(last.collections) == 1  # over tasks
    assert "over tasks" in last.get_title()
    texts = [text for text, _ in plots.entries(panel, "mean")]
    assert texts == ["a/x (1 run, no interval)", "after adaptation (k = 1)", "before (k = 0)"]


def test_everything_drawn_is_named():
    (panel,) = comparing()
    learning, pairs = drawn(plots.figure([panel], "iqm"))
    assert learning.get_xlabel() == "environment steps of a replica"
    assert learning.get_ylabel() == "return of an episode"
    assert learning.get_title() == "delayed-hopper"
    assert [label.get_text() for label in pairs.get_yticklabels()] == ["m0/x\nabove m1/x"]
    (legend,) = learning.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "m0/x (3 replicas)",
        "m1/x (3 replicas)",
        "IQM of runs: 95 % interval",
    ]


def test_pairs_have_their_probability_and_its_interval():
    (panel,) = comparing()
    pairs = drawn(plots.figure([panel]))[1]
    interval, point, even = pairs.get_lines()
    (improvement,) = panel.improvements
    assert point.get_xdata() == [improvement.probability]
    assert tuple(interval.get_xdata()) == improvement.interval
    assert list(even.get_xdata()) == [0.5, 0.5]


def test_panels_without_something_leave_its_place_empty():
    figure = plots.figure([*adapting(), *comparing()])
    assert [axes.get_visible() for axes in figure.axes] == [True, True, False, True, False, True]


def test_many_groups_are_told_apart():
    (panel,) = comparing(15)
    lines = drawn(plots.figure([panel]))[0].get_lines()
    looks = {(to_hex(o.get_color()), o.get_marker(), o.get_linestyle()) for o in lines}
    assert len(looks) == 15
    assert len({to_hex(line.get_color()) for line in lines}) == len(plots.COLORS)


def test_markers_tell_groups_apart_without_colours():
    markers = [plots.style(number)["marker"] for number in range(len(plots.MARKERS))]
    assert len(set(markers)) == len(markers)


def test_legends_fit_their_width():
    (panel,) = comparing(15)
    found = plots.entries(panel, "mean")
    assert plots.columns(found, 1.0) == 1
    assert plots.columns(found[:2], 10.0) == 2
    assert 1 < plots.columns(found, 10.0) < len(found)


# The verb


def test_real_runs_are_drawn(metaloop, tmp_path):
    runs = [RESULTS / "maml-trpo" / f"navigation-2d-seed{seed}" for seed in range(3)]
    runs += [RESULTS / "lirpg" / f"{method}-delayed-hopper-seed0" for method in ("ppo", "lirpg")]
    out = tmp_path / "new" / "curves.png"
    status, said, _ = metaloop("plot", *runs, "--out", out)
    assert status == 0
    image = imageio.imread(out)
    assert image.shape[0] > 700
    assert image.std() > 10
    assert "navigation-2d: return of an episode" in said
    assert "a run of ppo/delayed-hopper ends above one of lirpg/delayed-hopper" in said
    assert str(out) in said.replace("\n", "")


def test_equal_runs_make_equal_pictures(metaloop, tmp_path):
    folder = recorded.write(tmp_path / "run", recorded.with_replicas())
    for name in ("a.png", "b.png", "a.svg"):
        assert metaloop("plot", folder, "--out", tmp_path / name)[0] == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert "<dc:date>" not in (tmp_path / "a.svg").read_text()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--out", "x.gif"], "--out x.gif must end with .png or .svg"),
        (["--out", "x.png", "--tag", "rollout/ep_rew"], "closest: rollout/ep_rew_mean"),
        (["--out", "x.png", "--statistics", "iqm"], "closest: --statistic"),
        (["elsewhere", "--out", "x.png"], "elsewhere is not a run's folder"),
    ],
)
def test_what_cannot_be_drawn_is_refused(metaloop, tmp_path, monkeypatch, flags, said):
    monkeypatch.chdir(tmp_path)
    recorded.write(tmp_path / "run", recorded.with_replicas())
    status, _, error = metaloop("plot", "run", *flags)
    assert status == 2
    assert said in error
    assert not (tmp_path / "x.png").exists()


def test_remarks_go_to_standard_error(metaloop, tmp_path):
    folders = [
        recorded.write(tmp_path / f"run-seed{n}", recorded.adapting(n, num=3 + 6 * n))
        for n in range(2)
    ]
    status, _, error = metaloop("plot", *folders, "--out", tmp_path / "x.png")
    assert status == 0
    assert "the curve ends after 300 steps" in error


def test_a_format_is_that_of_the_name():
    plots.check_format(Path("a.PNG"))
    with pytest.raises(ConfigError, match="must end with"):
        plots.check_format(Path("a"))
