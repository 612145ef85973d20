"""A first hour with metaloop: every step's command and output, written to a page.

    python docs/tour.py [--out docs/tour.md] [--install] [--quick]

The steps are those of a new user who has the README alone. They run in a folder of their own;
`--install` clones the repository there first and uses what `make .venv` installs, `--quick` makes
the trainings short. Where there is Chromium, TensorBoard's page is photographed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUN = "runs/maml-trpo-navigation-2d-seed0"
OWN_RUN = "runs/own"
QUICK = (
    *("--iterations", "6", "--num-members", "4", "--num-envs", "3", "--members-per-slot", "2"),
    *("--eval-tasks", "4", "--learner-threads", "1", "--backend", "serial"),
)
LONGEST_OUTPUT = 24
"""Lines of a step's output that are shown; of a longer one its beginning and its end."""


@dataclass(frozen=True)
class Step:
    """A command with what is to be said before it, and the pictures that it leaves."""

    text: str
    command: str
    interrupt_at: int = 0  # iteration in which Ctrl-C is pressed
    pictures: tuple[str, ...] = ()


STEPS = (
    Step("What is there?", "metaloop list"),
    Step(
        "Meta-train on navigation to a point: two Ray actors, a learner, and Ctrl-C in the middle.",
        "metaloop train maml-trpo/navigation-2d",
        interrupt_at=3,
    ),
    Step("The same command goes on from there.", "metaloop train maml-trpo/navigation-2d"),
    Step("Adapt to tasks that training never drew.", f"metaloop evaluate {RUN}"),
    Step(
        "The paths before and after adaptation.",
        f"metaloop render {RUN} --out paths.png",
        pictures=("paths.png",),
    ),
    Step(
        "The learning curve, and the returns after each inner update.",
        f"metaloop plot {RUN} --out curves.png",
        pictures=("curves.png",),
    ),
    Step("All of it on one page, `report.md` in the run's folder.", f"metaloop report {RUN}"),
    Step("The policy, for torch alone.", f"metaloop export {RUN}"),
    Step(
        "A task family of one's own: `poles.py` from the README, in the folder that we are in.",
        f"metaloop train maml-trpo/half-cheetah-dir --task poles:PoleMass --iterations 3 "
        f"--num-members 8 --run-dir {OWN_RUN}",
    ),
)


class Tour:
    """The folder that the tour is in, and what was written so far."""

    def __init__(self, folder: Path, pictures: Path, quick: bool, commands: Path) -> None:
        self.folder, self.pictures, self.quick = folder, pictures, quick
        path = f"{commands}{os.pathsep}{os.environ['PATH']}"
        self.environment = os.environ | {"PATH": path, "COLUMNS": "100"}
        self.page: list[str] = []

    def say(self, *lines: str) -> None:
        """Adds lines to the page."""
        self.page += [*lines, ""]

    def show(self, command: str, output: str, seconds: float) -> None:
        """Adds a command and its output."""
        lines = output.replace(f"{self.folder}/", "").rstrip().splitlines()
        if len(lines) > LONGEST_OUTPUT:
            half = LONGEST_OUTPUT // 2
            lines = [*lines[:half], "…", *lines[-half:]]
        took = f"(took {seconds:.0f} s)"
        self.say("```console", f"$ {command}", *lines, took, "```")

    def take(self, step: Step) -> None:
        """Runs a step.

        Raises:
            RuntimeError: its command failed.
        """
        self.say(step.text)
        words = step.command.split()
        short = list(QUICK) if self.quick and words[1] == "train" else []
        begun = time.monotonic()
        status, output = self.run([*words, *short], step.interrupt_at)
        if status != (130 if step.interrupt_at else 0):
            raise RuntimeError(f"{step.command} ended with {status}:\n{output}")
        self.show(step.command, output, time.monotonic() - begun)
        for name in step.pictures:
            shutil.copyfile(self.folder / name, self.pictures / name)
            self.say(f"![{step.text}]({self.pictures.name}/{name})")

    def run(self, words: Sequence[str], interrupt_at: int = 0) -> tuple[int, str]:
        """Exit status and output of a command; Ctrl-C goes to all its processes."""
        process = subprocess.Popen(
            words, cwd=self.folder, env=self.environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if interrupt_at and re.search(rf"  {interrupt_at}/\d+  ", line):
                os.killpg(process.pid, signal.SIGINT)
        return process.wait(), "".join(lines)

    def look_at_tensorboard(self) -> None:
        """Starts TensorBoard on the runs, and photographs its page where there is a browser."""
        command = "tensorboard --logdir runs"
        self.say("The curves in TensorBoard, whose CUSTOM SCALARS page needs no setting up.")
        self.say("```console", f"$ {command}", "```")
        browser = shutil.which("chromium") or shutil.which("google-chrome")
        if browser is None:
            return
        port = ["--port", "0", "--host", "127.0.0.1"]
        server = subprocess.Popen(
            [*command.split(), *port], cwd=self.folder, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            address = address_of(server)
            await_data(address)
            subprocess.run(
                [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                 "--window-size=1400,1000", "--virtual-time-budget=30000",
                 f"--screenshot={self.pictures / 'tensorboard.png'}", f"{address}#custom_scalars"],
                check=True, capture_output=True, timeout=180,
            )  # fmt: skip
        finally:
            server.terminate()
            server.wait(30)
        self.say(f"![TensorBoard]({self.pictures.name}/tensorboard.png)")


def address_of(server: subprocess.Popen[str]) -> str:
    """Where TensorBoard says that it is.

    Raises:
        RuntimeError: it ended without saying so.
    """
    assert server.stdout is not None
    said = ""
    for line in server.stdout:
        said += line
        if found := re.search(r"http://127\.0\.0\.1:\d+/", line):
            return found[0]
    raise RuntimeError(f"TensorBoard did not start:\n{said}")


def await_data(address: str, seconds: float = 60.0) -> None:
    """Waits until TensorBoard has read the runs.

    Raises:
        TimeoutError: it has not.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{address}data/plugin/scalars/tags", timeout=30) as answer:
                if answer.read().strip() not in (b"", b"{}"):
                    return
        except urllib.error.URLError:
            pass
        time.sleep(0.5)
    raise TimeoutError(f"{address} shows no data after {seconds:g} s")


def own_family() -> str:
    """The README's task family."""
    blocks: list[str] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    return next(block for block in blocks if "class PoleMass" in block)


def install(tour: Tour) -> Path:
    """Clones the repository and installs it as the README says; where its commands are."""
    tour.say("Get it, and install it.")
    for command in (f"git clone {ROOT} metaloop", "make -C metaloop .venv"):
        begun = time.monotonic()
        status, output = tour.run(command.split())
        if status:
            raise RuntimeError(f"{command} ended with {status}:\n{output}")
        shown = command.replace(str(ROOT), "https://…/metaloop.git")
        tour.show(shown, "", time.monotonic() - begun)
    return tour.folder / "metaloop" / ".venv" / "bin"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs all steps and writes the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "tour.md")
    parser.add_argument("--install", action="store_true")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args(arguments)
    pictures = given.out.parent / "tour"
    pictures.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tour = Tour(folder, pictures, given.quick, Path(sys.executable).parent)
        tour.say(
            "# A tour",
            "",
            "Every command and its output, as `python docs/tour.py --install` saw them.",
        )
        if given.install:
            own = install(tour)
            tour.environment["PATH"] = f"{own}{os.pathsep}{os.environ['PATH']}"
        (folder / "poles.py").write_text(own_family())
        for step in STEPS:
            tour.take(step)
        tour.look_at_tensorboard()
    given.out.write_text("\n".join(tour.page).rstrip() + "\n")


if __name__ == "__main__":
    main()
