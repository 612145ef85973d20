"""What each verb of the command line takes, and how it is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from actors.tasks import ATARI_PREFIX, FAMILIES, TRIALS_PREFIX, closest
from learners.core.errors import ConfigError
from system.config import RunConfig, RuntimeConfig, TaskOption
from system.presets import PRESETS

Arguments = TypeVar("Arguments")

TASK_OPTION_HELP = "--task.OPTION VALUE sets an option of the task."


@dataclass(frozen=True)
class TrainArguments:
    """What `train` and `show` take."""

    config: RunConfig
    run_dir: str | None = None
    """Folder of the run, or a URL such as s3://bucket/run; by default runs/<preset>-seed<n>. A run
    that is there goes on."""


@dataclass(frozen=True)
class SubmitArguments(TrainArguments):
    """What `submit` takes: --address is that of the cluster's dashboard."""

    wait: bool = False
    """Show the job's log and end as it does: 0 done, 1 failed, 130 stopped."""
    submission_id: str | None = None
    """Name of the job; by default Ray makes one."""


@dataclass(frozen=True)
class EvaluateArguments:
    """What `evaluate` takes."""

    run: tyro.conf.Positional[str]
    """Folder of the run, or its URL."""
    json: bool = False
    """Print one JSON object and nothing else on standard output."""
    eval_tasks: int | None = None
    """Tasks to adapt to; by default as many as in training."""
    backend: Literal["ray", "serial"] | None = None
    """ray or serial; by default as in training."""
    num_actors: int | None = None
    """Rollout actors; by default as in training."""
    address: str | None = None
    """Address of a running Ray cluster; by default a local one, wherever the run was trained."""
    device: Literal["auto", "cpu", "cuda"] | None = None
    """Where the learner computes; by default as in training."""


@dataclass(frozen=True)
class PlotArguments:
    """What `plot` takes."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Folders of the runs, or their URLs. Those that differ in nothing but the seed are one curve,
    with a 95 % interval."""
    out: Path
    """The picture to write: .png or .svg."""
    tag: str | None = None
    """Metric to draw, as TensorBoard names it; by default returns, for methods that adapt before
    and after."""
    statistic: Literal["mean", "iqm"] = "mean"
    """Over runs: their mean, or their interquartile mean."""


@dataclass(frozen=True)
class ReportArguments:
    """What `report` takes."""

    run: tyro.conf.Positional[str]
    """Folder of the run, or its URL."""
    out: Path | None = None
    """Folder to write report.md and its pictures to; by default the run's, where that is no URL."""


@dataclass(frozen=True)
class RenderArguments:
    """What `render` takes."""

    run: tyro.conf.Positional[str]
    """Folder of the run, or its URL."""
    out: Path
    """Where to write, by its name a picture (.png), a film (.gif) or a video (.mp4)."""
    tasks: int = 2
    """Evaluation tasks, or replicas, that are shown."""
    updates: int | None = None
    """Inner updates before the episodes on the right; by default as many as an evaluation takes."""

    def __post_init__(self) -> None:
        """Refuses numbers of tasks that show nothing."""
        if self.tasks < 1:
            raise ConfigError(f"--tasks must be at least 1, not {self.tasks}")


@dataclass(frozen=True)
class ExportArguments:
    """What `export` takes."""

    run: tyro.conf.Positional[str]
    """Folder of the run, or its URL."""
    out: Path | None = None
    """Where to write; by default the folder `export` (lpg: `rule`) in the run's, where that is no
    URL."""
    member: int | None = None
    """Which replica's policy; by default the best by the last record."""


BENCHES = ("sampling", "maml", "navigation", "lirpg", "frodo", "lpg", "rl2", "transport")


@dataclass(frozen=True)
class BenchArguments:
    """What `bench` takes."""

    name: tyro.conf.Positional[Literal[BENCHES]]  # type: ignore[valid-type]
    """What is measured: environment steps, an iteration of a method, or Ray's transport."""
    iterations: int = 10
    """Meta-iterations, or rounds, that are measured."""
    warm_up: int = 2
    """Meta-iterations before them."""
    seconds: float = 3.0
    """Of each measurement of sampling."""
    robot: Literal["half-cheetah", "ant"] = "half-cheetah"
    """Of sampling."""
    width: int = 256
    """Units of the recurrent networks of lpg and rl2."""
    num_members: int | None = None
    """Tasks, replicas, lifetimes or trials; by default as in the reference figures."""
    num_envs: int = 16
    """Environments of each lifetime of lpg."""
    backend: Literal["ray", "serial"] = "serial"
    """Where the meta-iterations run."""
    num_actors: int = 2
    """Rollout actors on Ray."""
    learner_threads: int = 2
    """CPU threads of the learner."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the learner computes."""
    compare: Path | None = None
    """An earlier result, to print the ratios to."""
    out: Path | None = None
    """Where to write the result as JSON."""


WITHOUT_PRESET: dict[str, type] = {
    "evaluate": EvaluateArguments,
    "render": RenderArguments,
    "plot": PlotArguments,
    "report": ReportArguments,
    "export": ExportArguments,
    "bench": BenchArguments,
}
"""Verbs that need no preset, with what they take."""


# --- Parsing ---


def parse(kind: type[Arguments], arguments: Sequence[str], verb: str) -> Arguments:
    """What a verb without a preset takes, from the command line.

    Raises:
        ConfigError: an unknown flag; the message has the closest.
    """
    check_flags(arguments, flag_names(kind), f"metaloop {verb} --help")
    return tyro.cli(kind, args=arguments, prog=f"metaloop {verb}")


def parse_config(
    arguments: list[str], verb: str, kind: type[TrainArguments] | None = None
) -> TrainArguments:
    """The preset named first, changed by the flags after it, as a `kind` of arguments.

    Raises:
        ConfigError: an unknown preset, task, flag or task option; the message has the closest.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: metaloop {verb} PRESET [flags]\n\npresets: {', '.join(PRESETS)}")
        raise SystemExit(0)
    kind = kind or VisibleTrainArguments
    name, *rest = arguments
    if name not in PRESETS:
        raise ConfigError(
            f"there is no preset {name!r}; closest: {closest(name, PRESETS)}. "
            "`metaloop list` lists all"
        )
    rest, options = take_task_options(rest)
    defaults = PRESETS[name]()
    known = flag_names(kind, type(defaults.learner))
    check_flags(rest, known, f"metaloop {verb} {name} --help")
    hidden = tyro.conf.configure(tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands)
    parsed = tyro.cli(
        hidden(kind),
        args=rest,
        default=kind(defaults),
        prog=f"metaloop {verb} {name}",
        description=f"{PRESETS[name].__doc__ or ''}\n\n{TASK_OPTION_HELP}",
    )
    config = parsed.config
    if config.task != defaults.task:
        check_task_name(config.task)
        config = replace(config, task_options={})
    if options:
        config = replace(config, task_options=config.task_options | typed_options(config, options))
    return replace(parsed, config=config)


@dataclass(frozen=True)
class VisibleTrainArguments(TrainArguments):
    """`TrainArguments` as the command line sees them: the preset's own fields are not flags."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=lambda: RunConfig(preset="", task="")
    )


@dataclass(frozen=True)
class VisibleSubmitArguments(SubmitArguments):
    """`SubmitArguments` as the command line sees them."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=lambda: RunConfig(preset="", task="")
    )


def check_task_name(task: str) -> None:
    """Raises ConfigError for a task that is no built-in, no Atari game and no import path."""
    task = task.removeprefix(TRIALS_PREFIX)
    if task not in FAMILIES and ":" not in task and not task.startswith(ATARI_PREFIX):
        raise ConfigError(
            f"there is no task family {task!r}; closest: {closest(task, FAMILIES)}. "
            "`metaloop list` lists all"
        )


def flag_names(kind: type, learner: type | None = None) -> set[str]:
    """The flags that a dataclass and the dataclasses in it make."""
    names: set[str] = set()
    nested = {"config": RunConfig, "runtime": RuntimeConfig, "learner": learner}
    for f in dataclasses.fields(kind):
        inner = nested.get(f.name)
        if inner is not None:
            names |= flag_names(inner, learner)
        elif f.name not in ("preset", "task_options", "run", "runs", "name"):
            names |= {f"--{f.name.replace('_', '-')}"}
    return names


def check_flags(arguments: Sequence[str], known: set[str], help_command: str) -> None:
    """Raises ConfigError for a flag that does not exist, with the three closest."""
    negated = {f"--no-{name[2:]}" for name in known}
    for argument in arguments:
        if not argument.startswith("--"):
            continue
        flag = argument.split("=")[0].replace("_", "-")
        if flag not in known | negated | {"--help"}:
            raise ConfigError(
                f"there is no flag {flag}; closest: {closest(flag, sorted(known))}. "
                f"`{help_command}` lists all"
            )


def take_task_options(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Splits --task.OPTION VALUE (or =VALUE) from the other flags."""
    rest: list[str] = []
    options: dict[str, str] = {}
    waiting = iter(arguments)
    for argument in waiting:
        if not argument.startswith("--task."):
            rest.append(argument)
            continue
        name, equals, value = argument.removeprefix("--task.").partition("=")
        if not equals:
            following = next(waiting, None)
            if following is None:
                raise ConfigError(f"{argument} needs a value")
            value = following
        options[name.replace("-", "_")] = value
    return rest, options


def typed_options(config: RunConfig, options: dict[str, str]) -> dict[str, TaskOption]:
    """Task options with the types of the family's fields.

    Raises:
        ConfigError: no such option, or a value of another type.
    """
    from actors.tasks import load_family, option_values

    fields = option_values(load_family(config.task, config.task_options))
    typed: dict[str, TaskOption] = {}
    for name, text in options.items():
        if name not in fields:
            raise ConfigError(
                f"task {config.task} has no option {name!r}; closest: {closest(name, fields)}. "
                f"It has {', '.join(fields)}"
            )
        typed[name] = parse_like(fields[name], text, f"--task.{name}")
    return typed


def parse_like(sample: Any, text: str, flag: str) -> TaskOption:
    """`text` as a value of the type of `sample`."""
    if isinstance(sample, bool):
        truth = {"true": True, "false": False}
        if text.lower() not in truth:
            raise ConfigError(f"{flag} takes true or false, not {text!r}")
        return truth[text.lower()]
    try:
        if isinstance(sample, int):
            return int(text)
        return float(text) if isinstance(sample, float) else text
    except ValueError:
        wanted = "a whole number" if isinstance(sample, int) else "a number"
        raise ConfigError(f"{flag} takes {wanted}, not {text!r}") from None


def without_flags(
    arguments: Sequence[str], with_value: Sequence[str], alone: Sequence[str]
) -> list[str]:
    """The arguments but for some flags, written --flag VALUE, --flag=VALUE or --flag."""
    rest: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        flag, equals, _ = argument.partition("=")
        flag = flag.replace("_", "-") if flag.startswith("--") else flag
        if flag in with_value:
            if not equals:
                next(waiting, None)
        elif flag not in alone:
            rest.append(argument)
    return rest
