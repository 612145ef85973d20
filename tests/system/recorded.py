"""Run folders that hold records and nothing else, for the tests of what reads them."""

from __future__ import annotations

import json

import numpy as np

PRESET = "ppo/delayed-hopper"


def config(preset=PRESET, seed=0, task="delayed-hopper", **changes):
    """A configuration as a run writes it, of a version that had hardly any settings."""
    learner = {"method": preset.split("/")[0], **changes.pop("learner", {})}
    base = {"preset": preset, "task": task, "learner": learner, "task_options": {}}
    return base | {"iterations": 10, "seed": seed, "eval_every": 5} | changes


def rows(columns, steps):
    """The rows of a metrics.jsonl: tags to values [T] at steps [T]."""
    return [
        {"iteration": i + 1, "env_steps": int(step)}
        | {tag: None if values[i] is None else float(values[i]) for tag, values in columns.items()}
        for i, step in enumerate(steps)
    ]


def adapting(seed=0, num=6, ks=(0, 1)):
    """Returns after each k, rising with k and with time, at steps that depend on the seed."""
    rng = np.random.default_rng(seed)
    rising = np.linspace(0.0, 5.0, num)
    columns = {f"adapt/ep_rew_mean_{k}": rising * k + rng.normal(size=num) for k in ks}
    return rows(columns, 100 * np.arange(1, num + 1) + seed)


def with_replicas(offset=0.0, replicas=3, num=6, stem="ep_rew_mean"):
    """Returns of replicas, the m-th m above the first, and their mean."""
    values = {f"replica/{stem}_{m}": np.arange(num) + offset + m for m in range(replicas)}
    mean = {f"rollout/{stem}": np.mean(list(values.values()), axis=0)}
    return rows(mean | values, 10 * np.arange(1, num + 1))


def evaluation(preset=PRESET, means=(1.0, 3.0, 4.0), **changes):
    """An evaluation as a run writes it."""
    adapt = [
        {"k": k, "mean": mean, "ci95": [mean - 1.0, mean + 2.0], "iqm": mean + 0.5}
        for k, mean in enumerate(means)
    ]
    gain = {"mean": means[-1] - means[0], "ci95": [0.5, 4.5]}
    return {"preset": preset, "tasks": 40, "held_out": True, "adapt": adapt, "gain": gain} | changes


def write(folder, records, **objects):
    """A run's folder with metrics.jsonl and, by name, the objects of JSON files; returns it."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
    for name, value in objects.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder
