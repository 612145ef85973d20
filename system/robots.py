"""Draws poses of MuJoCo's robots, in a process of its own.

Which OpenGL MuJoCo draws with is decided where it is imported, by the variable MUJOCO_GL, and a
driver may end the process that asks it for too much. So each way is tried in a new process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actors.scenes import Frame, Pose
from learners.core.errors import ConfigError

BACKENDS = ("egl", "osmesa", "glfw")
"""Values of MUJOCO_GL, in the order in which they are tried."""

WIDTH, HEIGHT = 320, 240

TIMEOUT_S = 600

VIEW, VIEW_WITH_GOAL = (3.5, -15.0), (7.0, -35.0)
"""The camera's distance from the robot, in metres, and its elevation, in degrees."""


@contextmanager
def unloaded() -> Iterator[None]:
    """Keeps MuJoCo, imported in this block, from loading the OpenGL that the user chose.

    That may be missing, which is to be said where something is drawn.
    """
    chosen = os.environ.pop("MUJOCO_GL", None)
    try:
        yield
    finally:
        if chosen is not None:
            os.environ["MUJOCO_GL"] = chosen


def draw(poses: Sequence[Pose]) -> list[Frame]:
    """Pictures [240, 320, 3] of poses; the camera stays beside the robot.

    Raises:
        ConfigError: OpenGL works in none of the ways; the message has each one's reason.
    """
    frames: dict[int, Frame] = {}
    for xml_file in dict.fromkeys(pose.xml_file for pose in poses):
        own = [i for i, pose in enumerate(poses) if pose.xml_file == xml_file]
        frames |= zip(own, draw_robot(xml_file, [poses[i] for i in own]), strict=True)
    return [frames[i] for i in range(len(poses))]


def draw_robot(xml_file: str, poses: Sequence[Pose]) -> NDArray[np.uint8]:
    """`draw` of poses of one robot, [n, 240, 320, 3]."""
    given = os.environ.get("MUJOCO_GL")
    reasons = []
    with tempfile.TemporaryDirectory() as folder:
        nowhere = np.full(2, np.nan)
        np.savez(
            Path(folder) / "poses.npz",
            xml_file=np.array(xml_file),
            qpos=np.stack([pose.qpos for pose in poses]),
            goal=np.stack([nowhere if pose.goal is None else pose.goal for pose in poses]),
        )
        for backend in (given,) if given else BACKENDS:
            reason = draw_elsewhere(Path(folder), backend)
            if reason is None:
                drawn: NDArray[np.uint8] = np.load(Path(folder) / "frames.npy")
                return drawn
            reasons.append(f"  MUJOCO_GL={backend}: {reason}")
    raise ConfigError(
        "MuJoCo cannot draw here. Tried:\n" + "\n".join(reasons) + "\nWithout a screen it needs "
        "MUJOCO_GL=egl (Debian's packages libegl1 and, without a GPU, libgl1-mesa-dri) or "
        "MUJOCO_GL=osmesa (libosmesa6)"
    )


def draw_elsewhere(folder: Path, backend: str) -> str | None:
    """Draws what is in a folder with one kind of OpenGL; the reason where that fails."""
    command = [sys.executable, "-m", "system.robots", str(folder)]
    # The packages lie where this process found them. MuJoCo's log of warnings stays in the folder.
    path = os.pathsep.join(map(os.path.abspath, sys.path))
    environment = os.environ | {"MUJOCO_GL": backend, "PYTHONPATH": path}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return f"it took more than {TIMEOUT_S} s"
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return lines[-1][:200] if lines else f"the process ended with status {done.returncode}"


# --- In the other process ---


def draw_here(folder: Path) -> None:
    """Draws the poses in a folder, in this process."""
    import mujoco
    from gymnasium.envs.mujoco.mujoco_env import expand_model_path

    poses = np.load(folder / "poses.npz")
    model = mujoco.MjModel.from_xml_path(expand_model_path(str(poses["xml_file"])))
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    camera = mujoco.MjvCamera()
    camera.azimuth = 90.0
    with_goal = np.isfinite(poses["goal"]).any()
    camera.distance, camera.elevation = VIEW_WITH_GOAL if with_goal else VIEW
    camera.lookat[:] = data.subtree_com[0]
    frames = np.empty((len(poses["qpos"]), HEIGHT, WIDTH, 3), np.uint8)
    with mujoco.Renderer(model, HEIGHT, WIDTH) as renderer:
        # Without a GPU these take most of the time.
        renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
        renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        for frame, qpos, goal in zip(frames, poses["qpos"], poses["goal"], strict=True):
            data.qpos[:] = qpos
            mujoco.mj_forward(model, data)
            camera.lookat[:2] = data.subtree_com[0][:2]
            renderer.update_scene(data, camera)
            if np.isfinite(goal).all():
                geom = renderer.scene.geoms[renderer.scene.ngeom]
                mujoco.mjv_initGeom(
                    geom,
                    mujoco.mjtGeom.mjGEOM_SPHERE,
                    np.full(3, 0.2),
                    np.array([*goal, 0.2]),
                    np.eye(3).reshape(-1),
                    np.array([0.9, 0.1, 0.1, 1.0], np.float32),
                )
                renderer.scene.ngeom += 1
            renderer.render(out=frame)
    np.save(folder / "frames.npy", frames)


if __name__ == "__main__":
    draw_here(Path(sys.argv[1]))
