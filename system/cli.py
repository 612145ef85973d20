"""The command line. Torch and ray are imported only once a verb needs them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from actors.tasks import FAMILIES, closest
from learners.core.errors import ConfigError
from system.arguments import (
    BenchArguments,
    EvaluateArguments,
    ExportArguments,
    PlotArguments,
    RenderArguments,
    ReportArguments,
    VisibleSubmitArguments,
    parse,
    parse_config,
    without_flags,
)
from system.config import RuntimeConfig, to_dict
from system.presets import PRESETS

USAGE = """\
metaloop: distributed actor-learner meta-reinforcement learning

  metaloop train PRESET [flags]     train, or go on with the run that is in the folder
  metaloop submit PRESET --address http://HEAD:8265 [flags]
                                    the same as a job of a Ray cluster
  metaloop evaluate RUN [--json]    adapt to evaluation tasks; returns after 0 … K+2 inner updates
  metaloop render RUN --out FILE    what it does before and after adaptation: .png, .gif or .mp4
  metaloop plot RUN … --out X.png   learning curves of several runs with their intervals, and more
  metaloop report RUN [--out DIR]   report.md: what was run, what it reached, its pictures
  metaloop export RUN [--out DIR]   the policy, or lpg's update rule, for torch alone
  metaloop bench NAME [flags]       how fast it is, and where the time goes
  metaloop list                     presets, tasks, learners
  metaloop show PRESET [flags]      the resolved configuration
  metaloop completion bash|zsh      completion of all this: source <(metaloop completion bash)

`metaloop train PRESET --help` lists all flags; --task.OPTION VALUE sets an option of the task.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # A family given by import path may lie in the working folder.
    sys.path.append(os.getcwd())
    verbs: dict[str, Callable[[list[str]], int]] = {
        "train": train,
        "submit": submit,
        "evaluate": evaluate,
        "render": render,
        "plot": plot,
        "report": report,
        "export": export,
        "bench": bench,
        "list": list_all,
        "show": show,
        "completion": completion,
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


def evaluate(arguments: list[str]) -> int:
    """Metaloop evaluate RUN [flags]."""
    parsed = parse(EvaluateArguments, arguments, "evaluate")
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


def render(arguments: list[str]) -> int:
    """Metaloop render RUN --out FILE [flags]."""
    parsed = parse(RenderArguments, arguments, "render")
    from system import episodes, frames, mirror, robots, run

    frames.check_format(parsed.out)
    here = {"backend": "serial", "device": "cpu", "address": None}
    with mirror.copied(parsed.run) as folder, ExitStack() as stack:
        with robots.unloaded():
            loop, _ = stack.enter_context(run.restored(folder, here))
        shown = episodes.watch(loop, parsed.tasks, parsed.updates)
    parsed.out.parent.mkdir(parents=True, exist_ok=True)
    frames.write(shown, parsed.out)
    print(parsed.out)
    return 0


def plot(arguments: list[str]) -> int:
    """Metaloop plot RUN … --out PICTURE [flags]."""
    parsed = parse(PlotArguments, arguments, "plot")
    from system import curves, plots, records

    plots.check_format(parsed.out)
    groups = curves.grouped(records.read_all(parsed.runs))
    panels = curves.panels(groups, parsed.tag, parsed.statistic)
    plots.save(plots.figure(panels, parsed.statistic), parsed.out)
    plots.print_table(panels, parsed.statistic)
    for remark in curves.remarks(groups, parsed.tag):
        print(remark, file=sys.stderr)
    print(f"picture  {parsed.out}")
    return 0


def report(arguments: list[str]) -> int:
    """Metaloop report RUN [--out DIR]."""
    parsed = parse(ReportArguments, arguments, "report")
    from system import records, report, storage

    if parsed.out is None and storage.is_url(parsed.run):
        raise ConfigError(f"{parsed.run} is a URL: say with --out DIR where to write the report")
    with records.at(parsed.run, records.is_record_or_event) as folder:
        path = report.write(folder, parsed.run, parsed.out or folder)
    print(f"report  {path}")
    return 0


def export(arguments: list[str]) -> int:
    """Metaloop export RUN [--out DIR] [--member M]."""
    parsed = parse(ExportArguments, arguments, "export")
    from learners.config import LpgConfig
    from system import exports, mirror, rules, run_folder, storage

    if parsed.out is None and storage.is_url(parsed.run):
        raise ConfigError(f"{parsed.run} is a URL: say with --out DIR where to write")
    with mirror.copied(parsed.run, wanted=exports.is_needed) as folder:
        if not isinstance(run_folder.read_config(folder).learner, LpgConfig):
            print(f"policy  {exports.export(folder, parsed.out, parsed.member)}")
            return 0
        if parsed.member is not None:
            raise ConfigError("--member is for policies of replicas; a run of lpg has one rule")
        out = rules.export(folder, parsed.out)
    print(f"rule  {out}")
    print(f"next  metaloop train lpg-agent/sampled --rule {out}")
    return 0


def bench(arguments: list[str]) -> int:
    """Metaloop bench NAME [flags]."""
    parsed = parse(BenchArguments, arguments, "bench")
    from system import bench as measurements

    result = measurements.measure(parsed)
    measurements.print_table(result)
    if parsed.compare is not None:
        print("\n".join(measurements.compare(result, parsed.compare)))
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


def completion(arguments: list[str]) -> int:
    """Metaloop completion SHELL."""
    from system.completion import script

    print(script(*(arguments or [Path(os.environ.get("SHELL", "")).name])), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
