"""Completion of verbs, presets, flags and their values in a shell: a script that asks nobody."""

from __future__ import annotations

import dataclasses
import shlex
import typing
from collections.abc import Iterable, Iterator

from learners.config import METHODS
from learners.core.errors import ConfigError
from system.arguments import WITHOUT_PRESET, SubmitArguments, TrainArguments, flag_names
from system.config import RunConfig, RuntimeConfig
from system.presets import PRESETS

SHELLS = ("bash", "zsh")
OF_A_PRESET = {"train": TrainArguments, "submit": SubmitArguments, "show": TrainArguments}
"""Verbs whose first word is a preset, with what they take."""

SCRIPT = """\
_metaloop() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words=
    local verb=${{COMP_WORDS[1]}} preset=${{COMP_WORDS[2]}}
    COMPREPLY=()
    if (( COMP_CWORD == 1 )); then
        words={verbs}
    else
        case "$before" in
{values}
        esac
        if [[ -z $words ]]; then
            case "$verb:$COMP_CWORD:$word" in
                {of_a_preset}:2:*) words={presets} ;;
                *:*:-*)
                    case "$verb:$preset" in
{flags}
                    esac ;;
            esac
        fi
    fi
    COMPREPLY=( $(compgen -W "$words" -- "$word") )
}}
complete -o default -F _metaloop metaloop
"""
"""Where no word of ours fits, the shell completes the names of files."""


def script(shell: str) -> str:
    """What a shell has to read for completion: `source <(metaloop completion bash)`.

    Raises:
        ConfigError: there is no completion for this shell.
    """
    if shell not in SHELLS:
        raise ConfigError(f"there is completion for {' and '.join(SHELLS)}, not for {shell!r}")
    text = SCRIPT.format(
        verbs=words([*OF_A_PRESET, *WITHOUT_PRESET, "list", "completion"]),
        presets=words(PRESETS),
        of_a_preset=f"@({'|'.join(OF_A_PRESET)})",
        values=cases((f"--{name}", values) for name, values in choices().items()),
        flags=cases(flags()),
    )
    first = "autoload -Uz bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return first + ("shopt -s extglob\n" if shell == "bash" else "setopt KSH_GLOB\n") + text


def flags() -> Iterator[tuple[str, Iterable[str]]]:
    """The flags of each verb, and of each method where a preset comes first."""
    for verb, kind in OF_A_PRESET.items():
        for method, learner in METHODS.items():
            yield f"{verb}:{method}/*", sorted(flag_names(kind, learner))
    for verb, own in WITHOUT_PRESET.items():
        yield f"{verb}:*", sorted(flag_names(own))


def choices() -> dict[str, tuple[str, ...]]:
    """Values of the flags that take one of a few, by the flag without its dashes."""
    kinds = (RunConfig, RuntimeConfig, *METHODS.values(), *WITHOUT_PRESET.values())
    found: dict[str, tuple[str, ...]] = {}
    for kind in kinds:
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            named = [
                str(value)
                for part in (hints[field.name], *typing.get_args(hints[field.name]))
                if typing.get_origin(part) is typing.Literal
                for value in typing.get_args(part)
            ]
            if named:
                known = found.get(field.name.replace("_", "-"), ())
                found[field.name.replace("_", "-")] = tuple(dict.fromkeys([*known, *named]))
    return found


def cases(patterns: Iterable[tuple[str, Iterable[str]]]) -> str:
    """Branches of a `case`, each of which offers some words."""
    return "\n".join(f"            {pattern}) words={words(own)} ;;" for pattern, own in patterns)


def words(names: Iterable[str]) -> str:
    """Words as one quoted word of the shell."""
    return shlex.quote(" ".join(names))
