"""Policies outside of a run: files that act and adapt with torch and safetensors alone.

`policy.json` says what `policy.safetensors` and the other files beside it are; docs/export.md
explains its fields, and shows code that needs nothing of this project.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gymnasium.spaces import Box

from actors.family import TaskFamily
from actors.tasks import load_family
from learners.config import LpgConfig, method_of
from learners.configs.checks import check_whole
from learners.core.contract import Learner, State
from learners.core.errors import ConfigError
from learners.core.population import Population
from learners.core.replicas import Replicas
from learners.core.trajectory import Spec, World
from learners.lpg_agent import LpgAgent
from learners.registry import make_learner
from system import described_weights, records, run_folder
from system.config import RunConfig, learner_from_dict, to_dict
from system.export_description import Networks, describe, networks_of, templates
from system.mirror import is_in_checkpoint
from system.records import META, METRICS

DESCRIPTION = "policy.json"
FORMAT = 1
DERIVED = ("observation", "action", "networks", "adaptation")
"""Fields that follow from those before them."""
FIELDS = ("method", "learner", "spec", "bounds", *DERIVED, "sha256", "trained", "versions")


@dataclass(frozen=True)
class Export:
    """An exported policy that was found to be whole.

    Attributes:
        said: the description.
        learner: as it was; its policy acts, its inner update adapts.
        networks: the weights, without axis M.
    """

    said: dict[str, Any]
    learner: Learner
    networks: Networks


def is_needed(name: str) -> bool:
    """Whether an export reads this file of a run's folder."""
    return name in (META, METRICS) or is_in_checkpoint(name)


# --- Writing ---


def export(folder: Path, out: Path | None, member: int | None = None) -> Path:
    """Writes the policy of a run's newest checkpoint.

    Args:
        folder: of the run.
        out: where to; by default `export` in the run's folder.
        member: which replica's; by default the best by the last record.

    Returns:
        The folder with `policy.json` and the files of weights.

    Raises:
        ConfigError: the run has no checkpoint yet, no such replica, or is one of lpg.
    """
    config = run_folder.read_config(folder)
    if isinstance(config.learner, LpgConfig):
        raise ConfigError(f"{folder} is a run of lpg: what is exported is its rule")
    state, counters, _ = run_folder.restore_newest(folder)
    family = load_family(config.task, config.task_options)
    learner = make_learner(config.learner, family.spec)
    member = chosen_member(folder, config, learner, member)
    networks, spec = of_member(learner, family.spec, config, state, member or 0)
    about = describe(make_learner(config.learner, spec), spec, networks, config.num_envs)
    out = out or folder / "export"
    out.mkdir(parents=True, exist_ok=True)
    hashes = {n: described_weights.save(p, out / file_of(n)) for n, p in networks.items()}
    settings = to_dict(config)["learner"]
    said = {
        "format": FORMAT,
        "method": settings.pop("method"),
        "learner": settings,
        "spec": asdict(spec),
        "bounds": action_bounds(family),
        **about,
        "sha256": hashes,
        "trained": {
            **described_weights.origin(config, counters),
            "num_envs": config.num_envs,
            "member": member,
        },
        "versions": json.loads((folder / META).read_text())["versions"],
    }
    run_folder.write_json(out / DESCRIPTION, said)
    return out


def file_of(network: str) -> str:
    """The name of a network's file."""
    return f"{network}.safetensors"


def chosen_member(
    folder: Path, config: RunConfig, learner: Learner, member: int | None
) -> int | None:
    """Which replica is exported; None where all members share what is learned.

    Raises:
        ConfigError: there is no such replica, or there are none.
    """
    if not isinstance(learner, Replicas | LpgAgent):
        if member is None:
            return None
        raise ConfigError(
            f"--member {member}: {method_of(config.learner)} learns one policy for all members; "
            "only runs of replicas have several"
        )
    if member is None:
        return best_member(last_record(folder), config.num_members)
    if not 0 <= member < config.num_members:
        raise ConfigError(
            f"--member must lie in [0, {config.num_members - 1}], not {member}: the run has "
            f"{config.num_members} replicas"
        )
    return member


def last_record(folder: Path) -> Mapping[str, Any]:
    """What a run recorded last; empty where it recorded nothing."""
    rows = records.read_rows(folder / METRICS)
    return rows[-1] if rows else {}


def best_member(record: Mapping[str, Any], num_members: int) -> int:
    """The replica of the highest return, or of the least error of its values; 0 if none is known.

    Args:
        record: a line of `metrics.jsonl`.
        num_members: M.
    """

    def score(member: int) -> float:
        error = record.get(f"replica/value_error_{member}")
        if error is not None:
            return float(-error)
        value = record.get(f"replica/ep_rew_mean_{member}")
        return -math.inf if value is None else float(value)

    return max(range(num_members), key=score)


def of_member(
    learner: Learner, spec: Spec, config: RunConfig, state: State, member: int
) -> tuple[Networks, Spec]:
    """The networks of one member, and what its environments are to it."""
    _, agents = learner.begin(state, config.num_members, evaluating=True)
    if not isinstance(learner.policy, Population):
        return networks_of(learner, agents.params, state, member), spec
    block = learner.policy.block(config.num_members, (member, member + 1))
    worlds = spec.worlds[block.world : block.world + 1]
    return networks_of(learner, block.of(agents.params), state, 0), replace(spec, worlds=worlds)


def action_bounds(family: TaskFamily) -> dict[str, Any]:
    """What the environments do to actions: clip them, or count them from another number than 0."""
    env = family.make(1)
    space = env.single_action_space
    env.close()
    if not isinstance(space, Box):
        return {"start": int(getattr(space, "start", 0))}
    return {
        name: [float(x) if math.isfinite(x) else None for x in bound.flatten()]
        for name, bound in (("low", space.low), ("high", space.high))
    }


# --- Reading ---


def load(path: Path) -> Export:
    """An exported policy, checked against its description, and that against itself.

    Raises:
        ConfigError: a file is missing, changed or of another format; a field is not what the
            settings of the learner make it; entries or shapes are others than described.
    """
    said = described_weights.read_description(path / DESCRIPTION, "policy", FORMAT, FIELDS)
    try:
        spec = spec_of(said["spec"])
        learner = make_learner(learner_from_dict(said["method"], said["learner"]), spec)
        check_bounds(said["bounds"], spec)
        check_whole("num_envs", said["trained"]["num_envs"])
        like = templates(learner)
        about = describe(learner, spec, like, said["trained"]["num_envs"])
        hashes = dict(said["sha256"])
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        raise ConfigError(f"{path / DESCRIPTION} describes no policy: {e}") from e
    for field in DERIVED:
        wrong = difference(said[field], json.loads(json.dumps(about[field])), field)
        if wrong is not None:
            raise ConfigError(f"{path / DESCRIPTION} contradicts itself: {wrong}")
    networks = {
        name: described_weights.load(path / file_of(name), hashes.get(name), own, DESCRIPTION)
        for name, own in like.items()
    }
    return Export(said, learner, networks)


def spec_of(values: dict[str, Any]) -> Spec:
    """A specification from JSON values.

    Raises:
        ConfigError: a size is none.
        TypeError: a field is unknown, missing or of another type.
    """
    worlds = tuple(World(**tuples(world)) for world in values["worlds"])
    spec = Spec(**(tuples(values) | {"worlds": worlds}))
    for name in ("obs_size", "action_size", "horizon"):
        check_whole(name, getattr(spec, name))
    if not isinstance(spec.discrete, bool):
        raise TypeError(f"discrete must be true or false, not {spec.discrete!r}")
    return spec


def tuples(values: dict[str, Any]) -> dict[str, Any]:
    """The same fields with tuples, also within one another, where JSON has lists."""

    def of(value: Any) -> Any:
        return tuple(map(of, value)) if isinstance(value, list) else value

    return {name: of(value) for name, value in values.items()}


def check_bounds(bounds: dict[str, Any], spec: Spec) -> None:
    """Raises TypeError unless these can be bounds of actions."""
    if spec.discrete:
        if not isinstance(bounds["start"], int):
            raise TypeError(f"bounds.start must be a whole number, not {bounds['start']!r}")
        return
    for name in ("low", "high"):
        numbers = [x for x in bounds[name] if x is None or isinstance(x, int | float)]
        if len(numbers) != len(bounds[name]) or len(numbers) != spec.action_size:
            raise TypeError(f"bounds.{name} must be {spec.action_size} numbers or nulls")


def difference(given: Any, wanted: Any, where: str) -> str | None:
    """The first place where a field is not what it must be, and how; None where it is."""
    if not isinstance(given, dict) or not isinstance(wanted, dict):
        same = given == wanted
        return None if same else f"{where} is {given!r}, but the settings make it {wanted!r}"
    for name in {**wanted, **given}:
        place = f"{where}.{name}"
        if name not in given or name not in wanted:
            return f"{place} is {'missing' if name in wanted else 'not known'}"
        if (found := difference(given[name], wanted[name], place)) is not None:
            return found
    return None
