"""What a process of Ray's wrote before it died, as far as its file lies on this machine."""

from __future__ import annotations

from pathlib import Path

import ray

NUM_LINES = 20


def logs() -> Path | None:
    """The folder in which Ray's processes of this machine write, where there is one."""
    node = ray._private.worker.global_worker.node
    return Path(node.get_logs_dir_path()) if node is not None else None


def last_words(pid: int, folder: Path | None, num_lines: int = NUM_LINES) -> list[str]:
    """The last lines that a worker process wrote to its standard error.

    Args:
        pid: of the process.
        folder: see `logs`.
        num_lines: how many at most.
    """
    found = sorted(folder.glob(f"worker-*-{pid}.err")) if folder is not None else []
    if not found:
        return []
    lines = found[-1].read_text(errors="replace").splitlines()
    # What begins with a colon is Ray's own: the names of job and actor.
    return [line for line in lines if line.strip() and not line.startswith(":")][-num_lines:]


def told(pid: int, memory_mb: float) -> str:
    """What is known of the death of a process: its memory, and what it wrote last."""
    held = f"it last held {memory_mb:.0f} MB" if memory_mb else "it had answered nothing yet"
    lines = last_words(pid, logs())
    return held + ("; it wrote last:\n  " + "\n  ".join(lines) if lines else "")
