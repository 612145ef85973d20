"""The command line. Torch and ray are imported only once a verb needs them."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from actors.tasks import ATARI_PREFIX, FAMILIES, TRIALS_PREFIX, closest
from learners.core.errors import ConfigError
from system.config import RunConfig, RuntimeConfig, TaskOption, to_dict
from system.presets import PRESETS

USAGE = """\
metaloop: distributed actor-learner meta-reinforcement learning

  metaloop train PRESET [flags]     train, or go on with the run that is in the folder
  metaloop submit PRESET --address http://HEAD:8265 [flags]
                                    the same as a job of a Ray cluster
  metaloop evaluate RUN [--json]    adapt to evaluation tasks; returns after 0 … K+2 inner updates
  metaloop export RUN [--out DIR]   the update rule of a run of lpg, for --rule
  metaloop bench NAME [flags]       seconds of a meta-iteration, and of its parts
  metaloop list                     presets, tasks, learners
  metaloop show PRESET [flags]      the resolved configuration

`metaloop train PRESET --help` lists all flags; --task.OPTION VALUE sets an option of the task.
"""


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
class ExportArguments:
    """What `export` takes."""

    run: tyro.conf.Positional[str]
    """Folder of the run, or its URL."""
    out: Path | None = None
    """Where to write; by default the folder `rule` in the run's, where that is no URL."""


@dataclass(frozen=True)
class BenchArguments:
    """What `bench` takes."""

    name: tyro.conf.Positional[Literal["lpg", "rl2"]]
    """What is measured: lpg on small grids, or rl2 on tabular MDPs."""
    iterations: int = 10
    """Meta-iterations that are measured."""
    warm_up: int = 2
    """Meta-iterations before them."""
    width: int = 256
    """Units of the recurrent networks."""
    num_members: int | None = None
    """Lifetimes, by default 16; or trials, by default 2500."""
    num_envs: int = 16
    """Environments of each lifetime."""
    learner_threads: int = 2
    """CPU threads of the learner."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the learner computes."""
    compare: Path | None = None
    """An earlier result, to print the ratio to."""
    out: Path | None = None
    """Where to write the result as JSON."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # A family given by import path may lie in the working folder.
    sys.path.append(os.getcwd())
    verbs: dict[str, Callable[[list[str]], int]] = {
        "train": train,
        "submit": submit,
        "evaluate": evaluate,
        "export": export,
        "bench": bench,
        "list": list_all,
        "show": show,
    }
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    verb, *rest = arguments
    try:
        if verb not in verbs:
            raise ConfigError(
                f"there is no verb {verb!r}; closest: {closest(verb, verbs)}. "
                "`metaloop --help` lists all"
            )
        return verbs[verb](rest)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError, ArithmeticError) as error:
        if not known_error(error):
            raise
        print(f"metaloop: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


def known_error(error: BaseException) -> bool:
    """Whether the message alone tells a user enough; if not, the trace is shown."""
    if isinstance(error, (ConfigError, OSError)):
        return True
    ours = ("system.", "actors.", "learners.")
    return type(error).__module__.startswith(ours) or type(error) is ValueError


# --- Verbs ---


def train(arguments: list[str]) -> int:
    """Metaloop train PRESET [flags]."""
    parsed = parse_config(arguments, "train")
    from system import evaluation, mirror, run, run_folder

    warn_of_settings_without_effect(parsed.config.runtime)
    place = parsed.run_dir or str(run_folder.default_folder(parsed.config))
    with mirror.opened(place, parsed.config.runtime) as (folder, store):
        result = run.train(parsed.config, folder, store)
    if result is None:
        return 130
    evaluation.print_table(result)
    print(f"run folder   {folder}")
    print(f"TensorBoard  tensorboard --logdir {folder}")
    return 0


RAY_ONLY = ("num_actors", "address", "timeout_s", "object_store_mb", "actor_memory_mb")
JOINING_ONLY = ("accept_open_cluster", "wait_for_nodes")


def warn_of_settings_without_effect(runtime: RuntimeConfig) -> None:
    """Names what only Ray, or only a cluster that is joined, heeds, where it is neither."""
    default = RuntimeConfig()
    unheeded: tuple[str, ...]
    if runtime.backend == "serial":
        unheeded, why = (*RAY_ONLY, *JOINING_ONLY), "with --backend serial"
    elif runtime.address is None:
        unheeded, why = JOINING_ONLY, "without --address"
    else:
        unheeded, why = ("object_store_mb",), "with --address"
    for name in unheeded:
        if getattr(runtime, name) != getattr(default, name):
            print(f"--{name.replace('_', '-')} has no effect {why}", file=sys.stderr)


def submit(arguments: list[str]) -> int:
    """Metaloop submit PRESET --address URL [flags]."""
    parsed = parse_config(arguments, "submit", VisibleSubmitArguments)
    from system import submit as jobs

    assert isinstance(parsed, VisibleSubmitArguments)
    flags = without_flags(arguments[1:], ("--address", "--submission-id"), ("--wait", "--no-wait"))
    job = jobs.Job(parsed.config, parsed.run_dir, tuple(flags), parsed.submission_id)
    client, submission_id = jobs.submit(job)
    return jobs.follow(client, submission_id, job) if parsed.wait else 0


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


def evaluate(arguments: list[str]) -> int:
    """Metaloop evaluate RUN [flags]."""
    check_flags(arguments, flag_names(EvaluateArguments), "metaloop evaluate --help")
    parsed = tyro.cli(EvaluateArguments, args=arguments, prog="metaloop evaluate")
    from system import comparison, evaluation, mirror, run

    changes = {
        name: value
        for name in ("eval_tasks", "backend", "num_actors", "device")
        if (value := getattr(parsed, name)) is not None
    } | {"address": parsed.address}
    with mirror.copied(parsed.run) as folder:
        result = run.evaluate(folder, changes)
    if parsed.json:
        print(json.dumps(result))
    else:
        evaluation.print_table(result)
        comparison.print_table(result)
    return 0


def export(arguments: list[str]) -> int:
    """Metaloop export RUN [--out DIR]."""
    check_flags(arguments, flag_names(ExportArguments), "metaloop export --help")
    parsed = tyro.cli(ExportArguments, args=arguments, prog="metaloop export")
    from system import mirror, rules, storage

    if parsed.out is None and storage.is_url(parsed.run):
        raise ConfigError(f"{parsed.run} is a URL: say with --out DIR where to write the rule")
    with mirror.copied(parsed.run) as folder:
        out = rules.export(folder, parsed.out)
    print(f"rule  {out}")
    print(f"next  metaloop train lpg-agent/sampled --rule {out}")
    return 0


def bench(arguments: list[str]) -> int:
    """Metaloop bench NAME [flags]."""
    check_flags(arguments, flag_names(BenchArguments), "metaloop bench --help")
    parsed = tyro.cli(BenchArguments, args=arguments, prog="metaloop bench")
    from system import bench as measurements

    config = measurements.configured(parsed.name, parsed.width, parsed.num_members, parsed.num_envs)
    runtime = replace(config.runtime, device=parsed.device, learner_threads=parsed.learner_threads)
    config = replace(config, runtime=runtime)
    result = measurements.measure(config, parsed.iterations, parsed.warm_up)
    measurements.print_table(result, f"{parsed.name}, recurrent width {parsed.width}")
    if parsed.compare is not None:
        print(measurements.compare(result, parsed.compare))
    if parsed.out is not None:
        parsed.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def list_all(arguments: list[str]) -> int:
    """Metaloop list."""
    print("presets")
    for name, preset in PRESETS.items():
        print(f"  {name:<34} {(preset.__doc__ or '').strip().splitlines()[0]}")
    print("\ntasks, for --task")
    for name in FAMILIES:
        print(f"  {name}")
    print("  atari-<game>                       an Atari game: pip install 'metaloop[atari]'")
    print("  gym:<id>                           any Gymnasium environment, as one task")
    print("  module:Class                       your own family")
    print("  trials:<family>                    episodes of one task in a row, as one episode")
    print("\nlearners")
    for learner in sorted({name.split("/")[0] for name in PRESETS}):
        print(f"  {learner}")
    return 0


def show(arguments: list[str]) -> int:
    """Metaloop show PRESET [flags]."""
    parsed = parse_config(arguments, "show")
    print(json.dumps(to_dict(parsed.config), indent=1))
    return 0


# --- Parsing ---


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
        elif f.name not in ("preset", "task_options", "run"):
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


if __name__ == "__main__":
    sys.exit(main())
