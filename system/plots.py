"""A picture of several runs, pure functions from panels to a figure; and the same as a table.

Colours are those of Okabe and Ito, which colour-blind people tell apart; markers tell the groups
apart once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from learners.core.errors import ConfigError
from system.curves import Adaptation, Curve, Panel, Series, estimate
from system.pictures import new_figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^DvPX*<>"
FORMATS = (".png", ".svg")

ROW_HEIGHT, LEGEND_HEIGHT = 3.7, 0.24
"""Inches of a panel, and of a line of its legend."""

BAND = 0.18
"""Opacity of an interval's band."""

MAX_MARKED = 12
"""Points of a curve that have a marker."""


def check_format(out: Path) -> None:
    """Raises ConfigError unless a picture can be written to a file of that name."""
    if out.suffix.lower() not in FORMATS:
        raise ConfigError(f"--out {out} must end with {' or '.join(FORMATS)}")


def figure(panels: Sequence[Panel], statistic: str = "mean") -> Any:
    """A row for each panel: learning curves, adaptation, and pairs of groups compared.

    Args:
        panels: at least one.
        statistic: "mean" or "iqm" over runs.
    """
    with_adaptation = any(each.adaptation for panel in panels for each in panel.series)
    with_pairs = any(panel.improvements for panel in panels)
    widths = [6.2] + [3.8] * with_adaptation + [4.4] * with_pairs
    width = sum(widths)
    legends = [entries(panel, statistic) for panel in panels]
    lines = [-(-len(each) // columns(each, width)) for each in legends]
    heights = [ROW_HEIGHT + LEGEND_HEIGHT * num for num in lines]
    whole = new_figure(width, sum(heights))
    rows = whole.subfigures(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, row, found in zip(panels, rows, legends, strict=True):
        axes = list(row.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0])
        learning(axes.pop(0), panel, statistic)
        if with_adaptation:
            adaptations(axes.pop(0), panel)
        if with_pairs:
            pairs(axes.pop(0), panel)
        row.legend(
            handles=[handle(text, how) for text, how in found],
            loc="outside lower center",
            ncols=columns(found, width),
            fontsize=9,
            frameon=False,
        )
    return whole


def save(drawn: Any, out: Path) -> None:
    """Writes a figure as the format that the file's name ends with."""
    out.parent.mkdir(parents=True, exist_ok=True)
    # Without the date equal figures make equal files.
    drawn.savefig(out, metadata={"Date": None} if out.suffix.lower() == ".svg" else None)


def style(number: int) -> dict[str, Any]:
    """Colour, marker and line of a group."""
    return {
        "color": COLORS[number % len(COLORS)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 5.0,
        "linestyle": "-" if number < len(COLORS) else "-.",
    }


def marked(num: int) -> int:
    """Every how many of the points of a curve there is a marker."""
    return -(-num // MAX_MARKED)


def learning(axes: Any, panel: Panel, statistic: str) -> None:
    """Curves over environment steps with their bands; dashed without adaptation."""
    from matplotlib.ticker import EngFormatter

    for number, series in enumerate(panel.series):
        if series.before is not None:
            line(axes, series.before, statistic, style(number) | {"linestyle": "--"})
        line(axes, series.after, statistic, style(number))
    replicas = any(series.replicas for series in panel.series)
    axes.set_xlabel("environment steps" + " of a replica" * replicas)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_ylabel(panel.quantity)
    axes.set_title(panel.task, fontsize=11)
    axes.margins(x=0.02)
    axes.set_xlim(left=0.0)
    axes.grid(alpha=0.3)


def line(axes: Any, curve: Curve, statistic: str, how: dict[str, Any]) -> None:
    """One curve, and its band where there is more than one run."""
    middle, (low, high) = estimate(curve.values, statistic)
    axes.plot(curve.steps, middle, markevery=marked(len(middle)), linewidth=1.6, **how)
    if len(curve.values) > 1:
        axes.fill_between(curve.steps, low, high, alpha=BAND, color=how["color"], linewidth=0)


def adaptations(axes: Any, panel: Panel) -> None:
    """The last evaluations over how often was adapted."""
    found = [(n, each.adaptation) for n, each in enumerate(panel.series) if each.adaptation]
    if not found:
        axes.set_visible(False)
        return
    for number, adaptation in found:
        every = marked(len(adaptation.k))
        axes.plot(adaptation.k, adaptation.middle, markevery=every, **style(number))
        if adaptation.interval is not None:
            color = style(number)["color"]
            ends = adaptation.interval
            axes.fill_between(adaptation.k, *ends, alpha=BAND, color=color, linewidth=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    units = dict.fromkeys(each.unit for _, each in found if each.unit)
    axes.set_xlabel(f"k, {' or '.join(units)}" if units else "k")
    axes.set_ylabel("return after k")
    axes.set_title(f"last evaluation{interval_over([each for _, each in found])}", fontsize=11)
    axes.grid(alpha=0.3)


def interval_over(found: Sequence[Adaptation]) -> str:
    """What the intervals of adaptation curves are over, as part of a title."""
    over = dict.fromkeys(each.over for each in found if each.interval is not None)
    return f", interval over {' or '.join(over)}" if over else ""


def pairs(axes: Any, panel: Panel) -> None:
    """Probabilities that runs of one group end above those of another, with their intervals."""
    if not panel.improvements:
        axes.set_visible(False)
        return
    names = []
    flat = {"solid_capstyle": "butt"}
    for place, pair in enumerate(panel.improvements):
        low, high = pair.interval
        axes.plot([low, high], [place, place], color=COLORS[0], linewidth=7.0, alpha=0.3, **flat)
        axes.plot(pair.probability, place, "o", color=COLORS[0])
        names.append(f"{pair.label}\nabove {pair.other}")
    axes.axvline(0.5, color="grey", linewidth=1.0, linestyle=":")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(-0.03, 1.03)
    axes.set_xlabel("probability that a run ends above")
    axes.set_title("pairs of runs, 95 % interval", fontsize=11)
    axes.grid(alpha=0.3, axis="x")


# --- Legends ---

Entry = tuple[str, dict[str, Any]]
"""A text, and how the line beside it is drawn."""


def entries(panel: Panel, statistic: str) -> list[Entry]:
    """What each group is called, what dashes are, and what bands."""
    found: list[Entry] = [
        (f"{each.label} ({count(each)})", style(number)) for number, each in enumerate(panel.series)
    ]
    adapting = [each for each in panel.series if each.before is not None]
    if adapting:
        ks = sorted({each.k for each in adapting if each.k is not None})
        after = f"after adaptation (k = {', '.join(map(str, ks))})"
        found.append((after, {"color": "grey"}))
        found.append(("before (k = 0)", {"color": "grey", "linestyle": "--"}))
    if any(len(each.after.values) > 1 for each in panel.series):
        name = "IQM" if statistic == "iqm" else "mean"
        wide = {"color": "grey", "alpha": 2 * BAND, "linewidth": 8.0, "solid_capstyle": "butt"}
        found.append((f"{name} of runs: 95 % interval", wide))
    return found


def count(series: Series) -> str:
    """How many independent runs there are."""
    num = len(series.after.values)
    if num == 1:
        return "1 run, no interval"
    return f"{num} {'replicas' if series.replicas else 'runs'}"


def columns(found: Sequence[Entry], width: float) -> int:
    """How many entries fit beside each other in so many inches."""
    widths = [0.067 * len(text) + 0.7 for text, _ in found]
    return len(found) if sum(widths) <= width else max(1, int(width / max(widths)))


def handle(text: str, how: dict[str, Any]) -> Any:
    """An entry as a legend wants it."""
    from matplotlib.lines import Line2D

    return Line2D([], [], label=text, **how)


# --- The same as numbers ---


def print_table(panels: Sequence[Panel], statistic: str = "mean") -> None:
    """Where the curves end, and how pairs of groups compare there, for people."""
    console = Console()
    for panel in panels:
        table = Table(title=f"{panel.task}: {panel.quantity}".removeprefix(": "))
        name = "IQM" if statistic == "iqm" else "mean"
        for head in ("runs", "k", "number", "steps", name, "95 %"):
            table.add_column(head, justify="left" if head == "runs" else "right")
        for series in panel.series:
            if series.before is not None:
                table.add_row(series.label, "0", *cells(series.before, statistic))
            k = "" if series.before is None else str(series.k)
            table.add_row(series.label if not k else "", k, *cells(series.after, statistic))
        console.print(table)
        for pair in panel.improvements:
            low, high = pair.interval
            print(
                f"a run of {pair.label} ends above one of {pair.other} with probability "
                f"{pair.probability:.2f} [{low:.2f}, {high:.2f}]"
            )


def cells(curve: Curve, statistic: str) -> tuple[str, str, str, str]:
    """Runs, steps, and the last value of a curve with its interval."""
    middle, (low, high) = estimate(curve.values[:, -1], statistic)
    many = len(curve.values) > 1
    return (
        str(len(curve.values)),
        f"{curve.steps[-1]:,.0f}",
        f"{middle:.4g}",
        f"[{low:.4g}, {high:.4g}]" if many else "",
    )
