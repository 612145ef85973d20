import shutil
import subprocess

import pytest

from system.completion import script
from system.presets import PRESETS

COMPLETE = """
COMP_WORDS=(GIVEN)
COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 ))
_metaloop
printf '%s\\n' "${COMPREPLY[@]}"
"""


def completed(*words):
    """What bash offers for the last word."""
    given = " ".join(f"'{word}'" for word in words)
    done = subprocess.run(
        ["bash", "-c", script("bash") + COMPLETE.replace("GIVEN", given)],
        capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    assert not done.stderr
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["metaloop", "ev"], ["evaluate"]),
        (["metaloop", "train", "maml-trpo/nav"], ["maml-trpo/navigation-2d"]),
        (["metaloop", "show", "frodo/ca"], [name for name in PRESETS if "frodo/ca" in name]),
        (["metaloop", "train", "rl2/bandit", "--num-min"], ["--num-minibatches"]),
        (["metaloop", "train", "maml-trpo/ant-dir", "--num-min"], []),
        (["metaloop", "train", "rl2/bandit", "--backend", ""], ["ray", "serial"]),
        (["metaloop", "evaluate", "runs/a", "--eval"], ["--eval-tasks"]),
        (["metaloop", "submit", "a2c/cartpole", "--wa"], ["--wait", "--wait-for-nodes"]),
        (["metaloop", "evaluate", "ru"], []),
    ],
)
def test_bash_offers_what_fits(words, offered):
    assert completed(*words) == offered


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh")
def test_zsh_reads_its_script():
    done = subprocess.run(["zsh", "-c", script("zsh")], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


def test_a_shell_without_completion_is_refused(metaloop):
    status, _, err = metaloop("completion", "fish")
    assert status == 2
    assert "bash and zsh, not for 'fish'" in err


def test_completion_is_that_of_the_users_shell(metaloop, monkeypatch):
    monkeypatch.setenv("SHELL", "/bin/bash")
    assert metaloop("completion") == (0, script("bash"), "")
