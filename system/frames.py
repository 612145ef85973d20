"""Still pictures and films of episodes, with captions, and the files that hold them.

An image is [H, W, 3] uint8. matplotlib and Pillow are imported only where something is drawn.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from actors.scenes import Frame, Plan, Pose, Scene
from learners.core.errors import ConfigError
from system import robots
from system.episodes import Panel, Shown
from system.plans import draw_plan
from system.replay import Episode

FORMATS = (".png", ".gif", ".mp4")

FPS = 30.0
"""Most frames per second."""

LEAST_FPS = 10.0
"""Films that leave steps out run faster than the world rather than slower than this."""

MAX_PLANS = 60
"""Frames of an episode's film that are plans, which take long to draw."""

IN_STRIP = 6
"""Frames of an episode in a still picture."""

HOLD_S = 1.5
"""Seconds for which the last frame stays."""

SMALL, LARGE = 160, 480
"""Widths in pixels below which a picture is enlarged, and above which it is reduced."""

LINE, MARGIN, LETTERS = 17, 8, 13
"""Pixels of a caption's line, around a picture, and of the letters' height."""

BLOCK = 16
"""Width and height of a film are multiples of it: video encoders want that."""

Moment = tuple[Episode, int]
"""An episode, and the number of its scene."""

Cell = tuple[Frame, Sequence[str]]
"""An image and the lines above it."""


@dataclass(frozen=True)
class Film:
    """Images of one size, in the order of time; they are made as they are asked for."""

    images: Iterable[Frame]
    fps: float


# --- What is shown ---


def still(shown: Shown) -> Frame:
    """One picture: paths side by side, or of each panel a strip of frames in a row of its own."""
    if isinstance(first_scene(shown), Plan):
        cells = [[(panel, last_moment(panel)) for panel in row] for row in shown.rows]
    else:
        cells = [[(panel, m) for m in strip(panel)] for row in shown.rows for panel in row]
    images = iter(draw([moment for row in cells for _, moment in row]))
    return compose([[(next(images), caption(*cell)) for cell in row] for row in cells])


def film(shown: Shown) -> Film:
    """All panels at once; one that is over stays as it is until the last one is."""
    stride, fps = pace(shown)
    panels = [panel for row in shown.rows for panel in row]
    courses = [course(panel, stride) for panel in panels]
    images = iter(draw([moment for moments in courses for moment in moments]))
    cells = [
        [(next(images), caption(panel, moment)) for moment in moments]
        for panel, moments in zip(panels, courses, strict=True)
    ]

    def composed() -> Iterator[Frame]:
        for t in range(max(map(len, cells)) + round(HOLD_S * fps)):
            now = iter([course[min(t, len(course) - 1)] for course in cells])
            yield compose([[next(now) for _ in row] for row in shown.rows])

    return Film(composed(), fps)


def pace(shown: Shown) -> tuple[int, float]:
    """Scenes from one frame to the next, and frames per second."""
    episodes = [e for row in shown.rows for panel in row for e in panel.episodes]
    longest = max(len(episode.scenes) for episode in episodes)
    stride = math.ceil(shown.steps_per_second / shown.steps_between / FPS)
    if isinstance(first_scene(shown), Plan):
        stride = max(stride, math.ceil(longest / MAX_PLANS))
    real = shown.steps_per_second / (shown.steps_between * stride)
    return stride, max(real, min(LEAST_FPS, shown.steps_per_second))


def first_scene(shown: Shown) -> Scene:
    """All others are of its kind."""
    return shown.rows[0][0].episodes[0].scenes[0]


def last_moment(panel: Panel) -> Moment:
    """The end of the first episode."""
    episode = panel.episodes[0]
    return episode, len(episode.scenes) - 1


def strip(panel: Panel) -> list[Moment]:
    """A few moments of the first episode, from its start to its end."""
    episode, last = last_moment(panel)
    numbers = np.linspace(0, last, min(IN_STRIP, last + 1)).round().astype(int)
    return [(episode, i) for i in numbers.tolist()]


def course(panel: Panel, stride: int) -> list[Moment]:
    """The panel's moments in a film; the end of each episode is one."""
    moments: list[Moment] = []
    for episode in panel.episodes:
        last = len(episode.scenes) - 1
        moments += [(episode, i) for i in [*range(0, last, stride), last]]
    return moments


def caption(panel: Panel, moment: Moment) -> list[str]:
    """What is written above a moment."""
    episode, i = moment
    lines = list(panel.lines)
    if len(panel.episodes) > 1:
        lines.append(f"episode {panel.episodes.index(episode) + 1} of {len(panel.episodes)}")
    return [*lines, f"step {episode.steps[i]}, return {episode.returns[i]:.2f}"]


# --- Drawing ---


def draw(moments: Sequence[Moment]) -> list[Frame]:
    """Images of moments; those of robots are drawn together.

    Raises:
        ConfigError: robots cannot be drawn here.
    """
    scenes = [episode.scenes[i] for episode, i in moments]
    drawn = iter(robots.draw([scene for scene in scenes if isinstance(scene, Pose)]))
    images = []
    for (episode, i), scene in zip(moments, scenes, strict=True):
        if isinstance(scene, Pose):
            images.append(next(drawn))
        elif isinstance(scene, Plan):
            images.append(draw_plan(episode.scenes[: i + 1]))  # type: ignore[arg-type]
        else:
            images.append(fit(scene))
    return images


def fit(image: Frame) -> Frame:
    """The image in a size that can be seen and takes not too much room."""
    from PIL import Image

    width = image.shape[1]
    if width < SMALL:
        factor = math.ceil(SMALL / width)
        return image.repeat(factor, 0).repeat(factor, 1)
    if width <= LARGE:
        return image
    size = (LARGE, round(image.shape[0] * LARGE / width))
    return np.asarray(Image.fromarray(image).resize(size))


def compose(rows: Sequence[Sequence[Cell]]) -> Frame:
    """Images in rows and columns, each below its lines, on white."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(LETTERS)
    cells = [cell for row in rows for cell in row]
    widths = [image.shape[1] for image, _ in cells]
    texts = [math.ceil(font.getlength(line)) for _, lines in cells for line in lines]
    across = max(*widths, *texts) + MARGIN
    lines_above = max(len(lines) for _, lines in cells)
    heights = [max(image.shape[0] for image, _ in row) for row in rows]
    downs = [height + LINE * lines_above + MARGIN for height in heights]
    columns = max(map(len, rows))
    size = [-(-n // BLOCK) * BLOCK for n in (across * columns + MARGIN, sum(downs) + MARGIN)]
    canvas = Image.new("RGB", (size[0], size[1]), "white")
    pen, y = ImageDraw.Draw(canvas), MARGIN
    for row, down in zip(rows, downs, strict=True):
        for number, (image, lines) in enumerate(row):
            x = MARGIN + number * across
            for i, line in enumerate(lines):
                pen.text((x, y + i * LINE), line, fill="black", font=font)
            canvas.paste(Image.fromarray(image), (x, y + LINE * lines_above))
        y += down
    return np.asarray(canvas)


# --- Files ---


def check_format(out: Path) -> None:
    """Refuses names that end otherwise, and videos where nothing here can write one.

    Raises:
        ConfigError: the message names what is missing.
    """
    if out.suffix not in FORMATS:
        raise ConfigError(f"--out {out} must end in {', '.join(FORMATS)}, not {out.suffix!r}")
    if out.suffix == ".mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise ConfigError(
            f"--out {out}: videos need the package imageio-ffmpeg: pip install 'metaloop[video]'; "
            "a name that ends in .gif needs nothing"
        )


def write(shown: Shown, out: Path) -> None:
    """Draws what there is to look at into a file, in the format that its name says."""
    from PIL import Image

    if out.suffix == ".png":
        Image.fromarray(still(shown)).save(out)
    elif out.suffix == ".gif":
        with out.open("wb") as file:
            write_gif(film(shown), file)
    else:
        write_mp4(film(shown), out)


def write_gif(film: Film, file: IO[bytes]) -> None:
    """A GIF that begins anew for ever."""
    from PIL import Image

    images = (Image.fromarray(image) for image in film.images)
    first = next(images)
    duration = 1000 / film.fps
    first.save(file, "GIF", save_all=True, append_images=images, duration=duration, loop=0)


def write_mp4(film: Film, out: Path) -> None:
    """A video in H.264."""
    import imageio

    writer: Any
    with imageio.get_writer(out, format="FFMPEG", fps=film.fps) as writer:
        for image in film.images:
            writer.append_data(image)
