"""Draws worlds seen from above, and the paths through them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from actors.scenes import Frame, Plan
from system.pictures import DPI, to_image

SIZE = 3.2
"""Width of the picture, inches."""

TRAIL = 100
"""Steps of a path that are drawn strongly; those before them are faint."""

DRIFT, DRIFT_STEPS = 0.25, 15.0
"""Part of a cell by which a path sways, so that going back and forth can be seen, and how fast."""


def draw_plan(plans: Sequence[Plan]) -> Frame:
    """The world as the last plan has it, and the path through all, dark at first and then bright.

    Green is sought, red avoided; what has gone since the first plan is hollow. The path begins in
    the white dot and ends in the blue one.
    """
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    now, path = plans[-1], np.stack([plan.agent for plan in plans])
    left, right, low, high = now.bounds
    height = SIZE * abs((high - low) / (right - left))
    # Without a layout to find, drawing takes half the time.
    figure = Figure(figsize=(SIZE, height), dpi=DPI)
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axes.set(xlim=(left, right), ylim=(low, high), xticks=[], yticks=[], aspect="equal")
    for x, y in now.blocks - 0.5:
        axes.add_patch(Rectangle((x, y), 1.0, 1.0, color="0.35"))
    axes.add_collection(LineCollection(list(now.lines), colors="black", linewidths=2.0))
    for marks, filled in ((plans[0].marks, False), (now.marks, True)):
        for x, y, worth in marks:
            color = "tab:green" if worth > 0 else "tab:red"
            face = color if filled else "none"
            axes.plot(x, y, marker="s", markersize=9, color=color, markerfacecolor=face)
    swaying = path + now.cell * DRIFT * np.sin(np.arange(len(path)) / DRIFT_STEPS)[:, None]
    time = np.arange(len(path) - 1)
    if len(time):
        alpha = np.where(time >= len(time) - TRAIL, 1.0, 0.15)
        pieces = list(np.stack([swaying[:-1], swaying[1:]], 1))
        axes.add_collection(LineCollection(pieces, array=time, cmap="plasma", alpha=alpha))
    axes.plot(*path[0], marker="o", color="black", markerfacecolor="white")
    axes.plot(*path[-1], marker="o", color="tab:blue")
    return to_image(figure)
