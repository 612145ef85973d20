"""The registry of task families.

Importing it loads no family and none of their libraries: a family's module is imported when the
family is asked for.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actors.family import TaskFamily

FAMILIES: dict[str, str] = {
    "navigation-2d": "actors.tasks.navigation_2d:Navigation2D",
    "half-cheetah-dir": "actors.tasks.half_cheetah:HalfCheetahDir",
    "half-cheetah-vel": "actors.tasks.half_cheetah:HalfCheetahVel",
    "ant-dir": "actors.tasks.ant:AntDir",
    "ant-vel": "actors.tasks.ant:AntVel",
    "ant-goal": "actors.tasks.ant:AntGoal",
    "hopper": "actors.tasks.locomotion:Hopper",
    "half-cheetah": "actors.tasks.locomotion:HalfCheetah",
    "walker2d": "actors.tasks.locomotion:Walker2d",
    "ant": "actors.tasks.locomotion:Ant",
    "humanoid": "actors.tasks.locomotion:Humanoid",
    "delayed-hopper": "actors.tasks.locomotion:DelayedHopper",
    "delayed-half-cheetah": "actors.tasks.locomotion:DelayedHalfCheetah",
    "delayed-walker2d": "actors.tasks.locomotion:DelayedWalker2d",
    "delayed-ant": "actors.tasks.locomotion:DelayedAnt",
    "delayed-humanoid": "actors.tasks.locomotion:DelayedHumanoid",
    "bandit": "actors.tasks.bandit:Bandit",
    "tabular-mdp": "actors.tasks.tabular_mdp:TabularMDP",
    "catch": "actors.tasks.catch:Catch",
    "random-walk-flip": "actors.tasks.random_walk:RandomWalkFlip",
    "random-walk-off-policy": "actors.tasks.random_walk:RandomWalkOffPolicy",
    "worlds": "actors.tasks.worlds:Worlds",
    "maze": "actors.tasks.maze:Maze",
}
"""Name → "module:Class".

Beside these, `atari-<game>`, `gym:<id>` and a user's `module:Class`; and `trials:` before any name.
"""

ATARI_PREFIX = "atari-"
GYM_PREFIX = "gym:"
TRIALS_PREFIX = "trials:"
TRIALS_OPTIONS = ("episodes",)


def task_names() -> list[str]:
    """The names of the built-in families."""
    return list(FAMILIES)


def load_family(
    name: str, options: Mapping[str, float | int | bool | str] | None = None
) -> TaskFamily:
    """The family of that name, with those options.

    Args:
        name: a built-in name, `atari-<game>`, `gym:<Gymnasium id>`, or `module:Class` for a user's
            own family; or `trials:` and one of these, for trials of `episodes` episodes each.
        options: values of the family's fields; the others keep their defaults.

    Raises:
        ValueError: unknown name or id, import path that leads nowhere, unknown option, or a value
            that the family refuses.
    """
    family, fixed = _find_family(name.removeprefix(TRIALS_PREFIX))
    in_trials = name.startswith(TRIALS_PREFIX)
    allowed = [field.name for field in dataclasses.fields(family) if field.name not in fixed]
    own = TRIALS_OPTIONS if in_trials else ()
    options = dict(options or {})
    _check_options(name, options, [*own, *allowed])
    of_trials = {option: options.pop(option) for option in own if option in options}
    loaded: TaskFamily = family(**fixed, **options)
    if in_trials:
        loaded = _import_class("actors.tasks.trials:Trials")(loaded, **of_trials)
    return loaded


def option_values(family: TaskFamily) -> dict[str, Any]:
    """The options of a family with their values; those of a family within it are among them."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(family):  # type: ignore[arg-type]
        value = getattr(family, field.name)
        inner = dataclasses.is_dataclass(value)
        values |= option_values(value) if inner else {field.name: value}
    return values


def closest(given: str, allowed: Iterable[str]) -> str:
    """The three entries of `allowed` that are most like `given`, separated by commas."""
    return ", ".join(difflib.get_close_matches(given, list(allowed), n=3, cutoff=0.0))


def _find_family(name: str) -> tuple[type[Any], dict[str, Any]]:
    """The class of the family of that name, and the fields that the name decides."""
    if name.startswith(GYM_PREFIX):
        fixed = {"env_id": name.removeprefix(GYM_PREFIX)}
        return _import_class("actors.tasks.gym_env:GymFamily"), fixed
    if name.startswith(ATARI_PREFIX):
        fixed = {"game": name.removeprefix(ATARI_PREFIX)}
        return _import_class("actors.tasks.atari:AtariFamily"), fixed
    if name in FAMILIES:
        return _import_class(FAMILIES[name]), {}
    if ":" in name:
        return _import_class(name), {}
    raise ValueError(
        f"there is no task family {name!r}; closest: {closest(name, FAMILIES)}. "
        "`metaloop list` lists all; atari-<game> takes an Atari game, gym:<id> a Gymnasium "
        "environment, module:Class your own family and trials:<family> episodes of one in a row"
    )


def _import_class(path: str) -> type[Any]:
    """The class at "package.module:Class"."""
    module_name, _, class_name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"task family {path!r}: the module {module_name!r} cannot be imported ({error})"
        ) from error
    found = getattr(module, class_name, None)
    if found is None:
        classes = [key for key, value in vars(module).items() if isinstance(value, type)]
        raise ValueError(
            f"task family {path!r}: the module {module_name!r} has no class {class_name!r}; "
            f"closest: {closest(class_name, classes) or 'it has no classes'}"
        )
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise ValueError(
            f"task family {path!r}: {class_name!r} must be a dataclass that follows "
            "actors.family.TaskFamily"
        )
    return found


def _check_options(name: str, options: Mapping[str, Any], allowed: list[str]) -> None:
    """Raises ValueError where an option is not among those that the family of that name has."""
    for option in options:
        if option not in allowed:
            known = closest(option, allowed)
            hint = f"closest: {known}" if known else "it has none"
            raise ValueError(f"task family {name!r} has no option {option!r}; {hint}")
