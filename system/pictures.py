"""Pictures of what a learner describes: pure functions from arrays to images.

An image is [H, W, 3] uint8. matplotlib takes a second to import, hence only where something is
drawn, and without pyplot, which keeps global state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Described = Mapping[str, np.ndarray]
"""What `learners.core.contract.Describes` returned."""

DPI = 100
"""Pixels of a figure's inch: texts of 11 points are 15 pixels high."""

OPACITY = 0.85
"""Of the overlay where saliency is largest."""


def draw(described: Described) -> dict[str, np.ndarray]:
    """The images by TensorBoard tag for which `described` has what they show."""
    images: dict[str, np.ndarray] = {}
    if "episode_intrinsic" in described:
        images["lirpg/episode"] = episode(
            described["episode_intrinsic"], described["episode_extrinsic"]
        )
    if "slices" in described:
        images["lirpg/reward_slices"] = reward_slices(
            described["slices"], described["slice_velocity"], described["slice_action"]
        )
    if "frames" in described:
        images["lirpg/saliency"] = saliency(
            described["frames"], described["saliency"], described["frame_reward"]
        )
    if "sensitivity" in described:
        images["frodo/target"] = learned_target(described["target"], described["vtrace"])
        images["frodo/sensitivity"] = sensitivity(described["sensitivity"])
    if "pi_hat" in described:
        images["lpg/pi_hat"] = update_directions(described["pi_hat"], described["advantage"])
        images["lpg/meaning"] = prediction_meaning(described["meaning"])
        images["lpg/course"] = course(described["course"])
    if "trial_reward" in described:
        images["rl2/trial"] = trial(described["trial_reward"], described["trial_entropy"])
    if "maze_path" in described:
        images["rl2/maze"] = maze(described)
    if "cells" in described:
        images["lpg/grid"] = grid(described)
    return images


def histograms(described: Described) -> dict[str, np.ndarray]:
    """The distributions by TensorBoard tag."""
    name = "intrinsic_reward"
    return {f"lirpg/{name}": described[name]} if name in described else {}


def episode(intrinsic: np.ndarray, extrinsic: np.ndarray) -> np.ndarray:
    """Both rewards [T] step by step, and their sums so far below; each has a scale of its own."""
    figure = new_figure(9.0, 6.0)
    panels = figure.subplots(2, 1, sharex=True)
    steps = np.arange(1, len(intrinsic) + 1)
    figure.suptitle(f"Rewards along {len(steps)} steps of the first replica")
    per_step = (intrinsic, extrinsic, "reward per step")
    so_far = (np.cumsum(intrinsic), np.cumsum(extrinsic), "sum so far")
    for axes, (own, other, name) in zip(panels, (per_step, so_far), strict=True):
        lines = []
        for side, values, kind, color in (
            (axes, own, "intrinsic", "tab:blue"),
            (axes.twinx(), other, "extrinsic", "tab:orange"),
        ):
            label = f"{kind} {name}"
            lines += side.plot(steps, values, color=color, label=label, drawstyle="steps-mid")
            side.set_ylabel(label, color=color)
            side.tick_params(axis="y", colors=color)
            side.margins(x=0.01, y=0.2)
        axes.legend(handles=lines, loc="upper left", ncols=2)
        axes.grid(alpha=0.3)
    panels[1].xaxis.get_major_locator().set_params(integer=True)
    panels[1].set_xlabel("environment step (the extrinsic reward as it is learned from)")
    return to_image(figure)


def reward_slices(slices: np.ndarray, velocity: np.ndarray, action: np.ndarray) -> np.ndarray:
    """r_in [A', G, G] over velocity [G] (columns) and each action dimension [G] (rows)."""
    num_columns = min(len(slices), 3)
    num_rows = -(-len(slices) // num_columns)
    figure = new_figure(3.4 * num_columns + 1.2, 3.0 * num_rows + 0.7)
    panels = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False)
    limit = max(float(np.abs(slices).max()), 1e-6)
    figure.suptitle("Learned reward r_in, all other inputs at their mean; first replica")
    for number, axes in enumerate(panels.flat):
        if number >= len(slices):
            axes.set_visible(False)
            continue
        points = (velocity, action, slices[number])
        shown = axes.pcolormesh(*points, cmap="RdBu_r", vmin=-limit, vmax=limit, shading="gouraud")
        if slices[number].min() < slices[number].max():
            axes.contour(*points, colors="black", linewidths=0.6, alpha=0.6)
        axes.set_title(f"action dimension {number}", fontsize=11)
    figure.supxlabel("forward velocity (standard deviations from its mean)", fontsize=11)
    figure.supylabel("action (units of the action space)", fontsize=11)
    figure.colorbar(shown, ax=panels, label="r_in per step", fraction=0.04, pad=0.02)
    return to_image(figure)


def saliency(frames: np.ndarray, strength: np.ndarray, reward: np.ndarray) -> np.ndarray:
    """Frames [8, H, W] under a red overlay of |∂r_in/∂pixel|, with r_in [8] above each.

    All share one scale; it ends at the 99.5 % quantile, so that no single pixel sets it.
    """
    num_columns = min(len(frames), 4)
    num_rows = -(-len(frames) // num_columns)
    figure = new_figure(2.5 * num_columns + 1.2, 2.7 * num_rows + 0.5)
    panels = figure.subplots(num_rows, num_columns, squeeze=False)
    limit = max(float(np.quantile(strength, 0.995)), float(np.finfo(np.float32).tiny))
    figure.suptitle("Pixels that the learned reward r_in of the action taken depends on")
    for number, axes in enumerate(panels.flat):
        axes.set_axis_off()
        if number >= len(frames):
            continue
        axes.imshow(frames[number], cmap="gray", vmin=0, vmax=255)
        shown = axes.imshow(strength[number], cmap=red(), vmin=0.0, vmax=limit)
        axes.set_title(f"r_in = {reward[number]:+.3f}", fontsize=11)
    label = "|∂r_in/∂pixel| per grey level of 255"
    bar = figure.colorbar(shown, ax=panels, label=label, fraction=0.03, pad=0.02)
    bar.formatter.set_powerlimits((-2, 2))
    return to_image(figure)


def learned_target(target: np.ndarray, vtrace: np.ndarray) -> np.ndarray:
    """The learned target [N] of a chunk's steps over V-trace's [N]."""
    figure = new_figure(5.0, 5.0)
    axes = figure.subplots()
    ends = [min(target.min(), vtrace.min()), max(target.max(), vtrace.max())]
    axes.plot(ends, ends, color="grey", linewidth=1.0, label="equal")
    axes.scatter(vtrace, target, s=14, alpha=0.5, label="a step of the last chunk")
    axes.set_xlabel("V-trace's target")
    axes.set_ylabel("learned target g")
    axes.set_title("The learned target; first replica")
    axes.legend(loc="upper left")
    axes.grid(alpha=0.3)
    return to_image(figure)


def sensitivity(slopes: np.ndarray) -> np.ndarray:
    """How much the targets move with each input [I], as bars."""
    from learners.core.target_network import INPUTS

    figure = new_figure(6.0, 3.2)
    axes = figure.subplots()
    names = [name.replace("_", " ") for name in INPUTS[: len(slopes)]]
    axes.barh(names, slopes)
    axes.invert_yaxis()
    axes.set_xlabel("mean |∂(Σ g)/∂input| over the steps of a chunk")
    axes.set_title("What the learned target depends on; first replica")
    return to_image(figure)


def update_directions(pi_hat: np.ndarray, advantage: np.ndarray) -> np.ndarray:
    """π̂ over the advantage, both [N]."""
    figure = new_figure(5.0, 5.0)
    axes = figure.subplots()
    axes.scatter(advantage, pi_hat, s=8, alpha=0.3)
    axes.axhline(0.0, color="grey", linewidth=0.8)
    axes.axvline(0.0, color="grey", linewidth=0.8)
    axes.set_xlabel("advantage around the agent's critic (GAE)")
    axes.set_ylabel(r"$\hat{\pi}$ of the learned rule")
    axes.set_title("Steps of the last query batch, all lifetimes")
    axes.grid(alpha=0.3)
    return to_image(figure)


def prediction_meaning(share: np.ndarray) -> np.ndarray:
    """How much y tells of returns, [W, G] over worlds and discounts."""
    from learners.core.lifetime_description import DISCOUNTS

    figure = new_figure(6.0, 3.6)
    axes = figure.subplots()
    for world, row in enumerate(share):
        axes.plot(range(len(DISCOUNTS)), row, marker="o", label=f"world {world}")
    axes.set_xticks(range(len(DISCOUNTS)), [str(gamma) for gamma in DISCOUNTS])
    axes.set_ylim(-0.05, 1.05)
    axes.set_xlabel("discount γ")
    axes.set_ylabel("variance explained by y, linearly")
    axes.set_title("What y tells of the rewards to come in a chunk")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return to_image(figure)


def course(returns: np.ndarray) -> np.ndarray:
    """Mean return in each tenth of a lifetime, [W, 10] over worlds; each on a scale of its own."""
    figure = new_figure(6.0, 3.6)
    axes = figure.subplots()
    for world, row in enumerate(returns):
        finite = row[np.isfinite(row)]
        if not len(finite):
            continue
        low, high = finite.min(), max(finite.max(), finite.min() + 1e-6)
        label = f"world {world}: {low:.2f} to {high:.2f}"
        axes.plot(np.arange(10) / 10 + 0.05, (row - low) / (high - low), marker="o", label=label)
    axes.set_xlabel("part of the lifetime that has passed")
    axes.set_ylabel("return, 0 and 1 the least and the most")
    axes.set_title("How agents improve under the rule")
    if axes.get_lines():
        axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return to_image(figure)


def trial(reward: np.ndarray, entropy: np.ndarray) -> np.ndarray:
    """Mean reward and mean entropy of the policy at each step of a trial, [T] each."""
    figure = new_figure(9.0, 5.0)
    panels = figure.subplots(2, 1, sharex=True)
    steps = np.arange(1, len(reward) + 1)
    figure.suptitle("Inside a trial: what the hidden state learns")
    window = max(1, len(reward) // 50)
    smooth = np.convolve(reward, np.ones(window) / window, mode="valid")
    panels[0].plot(steps, reward, color="tab:blue", alpha=0.3 if window > 1 else 1.0)
    if window > 1:
        panels[0].plot(steps[window - 1 :], smooth, color="tab:blue", label=f"mean of {window}")
        panels[0].legend()
    panels[0].set_ylabel("reward")
    panels[1].plot(steps, entropy, color="tab:orange")
    panels[1].set_ylabel("entropy (nats)")
    panels[1].set_xlabel("step of the trial")
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.margins(x=0.01)
    return to_image(figure)


def maze(described: Described) -> np.ndarray:
    """A maze and the ways through it in the first episode of a trial and in the last."""
    path, lines = described["maze_path"], described["maze_lines"]
    episodes = np.unique(path[:, 2])
    shown = episodes[[0, -1]] if len(episodes) > 1 else episodes
    figure = new_figure(4.6 * len(shown), 4.8)
    for axes, episode in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for (row, column), (to_row, to_column) in lines:
            axes.plot([column, to_column], [row, to_row], color="black", linewidth=2.0)
        own = path[path[:, 2] == episode]
        # Each visit a little further off, so that going back and forth can be seen.
        offset = np.linspace(-0.2, 0.2, len(own))
        axes.plot(own[:, 1] + offset, own[:, 0] + offset, color="tab:blue", alpha=0.8)
        axes.plot(*own[0, 1::-1] - 0.2, marker="o", color="tab:green", markersize=10)
        axes.plot(*described["maze_target"][::-1], marker="*", color="tab:red", markersize=16)
        axes.set_title(f"episode {int(episode) + 1}: {len(own) - 1} steps", fontsize=11)
        axes.invert_yaxis()
        axes.set_aspect("equal")
        axes.set_axis_off()
    figure.suptitle("First trial of the batch: from the green dot to the red star")
    return to_image(figure)


def grid(described: Described) -> np.ndarray:
    """One lifetime's grid: V, y's first principal component, and the paths of a chunk."""
    height, width = (int(size) for size in described["grid"])
    cells = described["cells"]
    y = described["cell_y"] - described["cell_y"].mean(0)
    component = y @ np.linalg.svd(y, full_matrices=False)[2][0]
    figure = new_figure(12.0, 4.2)
    panels = figure.subplots(1, 3)
    for axes, values, name in (
        (panels[0], described["cell_value"], "V of the critic"),
        (panels[1], component, "y, first principal component"),
    ):
        mean = mean_by_cell(cells.reshape(-1), values, height * width).reshape(height, width)
        shown = axes.imshow(mean, cmap="viridis")
        figure.colorbar(shown, ax=axes, fraction=0.04, pad=0.02)
        axes.set_title(f"{name}, mean over visits", fontsize=11)
    visits = np.bincount(cells.reshape(-1), minlength=height * width).reshape(height, width)
    panels[2].imshow(visits, cmap="Greys")
    for env in range(min(cells.shape[1], 3)):
        end = int(np.argmax(described["cell_end"][:, env] > 0)) or len(cells) - 1
        rows, columns = np.divmod(cells[: end + 1, env], width)
        jitter = 0.12 * (env - 1)
        panels[2].plot(columns + jitter, rows + jitter, marker=".", label=f"environment {env}")
    panels[2].set_title("visits, and the paths of three first episodes", fontsize=11)
    panels[2].legend(fontsize=8, loc="upper right")
    figure.suptitle("First lifetime of the first world with a grid, last query batch")
    return to_image(figure)


def mean_by_cell(cells: np.ndarray, values: np.ndarray, num_cells: int) -> np.ndarray:
    """Mean of the values of each cell's visits, [num_cells]; NaN where there were none."""
    count = np.bincount(cells, minlength=num_cells)
    total = np.bincount(cells, values, num_cells)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def red() -> Any:
    """A colour map from transparent to red."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list(
        "red", [(1.0, 0.0, 0.0, 0.0), (1.0, 0.0, 0.0, OPACITY)]
    )


def new_figure(width: float, height: float) -> Any:
    """An empty figure, inches, that lays itself out."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def to_image(figure: Any) -> np.ndarray:
    """The figure's pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
