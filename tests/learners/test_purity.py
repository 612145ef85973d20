"""What an import brings with it, in a fresh interpreter."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
UPPER_FLOORS = {"actors", "system", "deploy"}
FOREIGN = {"ray", "gymnasium", "mujoco", "tensorboard", "tyro", "rich", "matplotlib"}


def imported_by(*modules: str) -> list[set[str]]:
    """Names of all loaded modules after each import in turn."""
    code = "import importlib, json, sys\n"
    for module in modules:
        code += f"importlib.import_module({module!r})\nprint(json.dumps(sorted(sys.modules)))\n"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [set(json.loads(line)) for line in done.stdout.splitlines()]


def test_learners_bring_torch_alone_and_each_other_only_when_asked():
    package, config, registry, maml = imported_by(
        "learners", "learners.config", "learners.registry", "learners.maml"
    )
    assert "learners" in package
    assert "learners.config" in config
    assert not config & {"torch", "numpy"}, "the command line reads configurations without torch"
    assert "learners.registry" in registry
    assert "learners.maml" not in registry
    assert "learners.maml" in maml
    assert not maml & (FOREIGN | UPPER_FLOORS)
