"""Imports go down only: deploy, system, actors, learners; and each floor has its own tools.

Read from the source, so that an import inside a function or under a condition counts as well.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("learners", "actors", "system", "deploy")
"""From the lowest to the highest; a floor may import itself and those before it."""

OUTSIDE = {
    "learners": {"torch", "numpy"},
    "actors": {"torch", "numpy", "psutil", "gymnasium", "mujoco", "ale_py", "cv2"},
}
"""Distributions that a floor may import; the two upper floors are free but for ray."""

MAY_IMPORT_RAY = {
    "system/actor_pool.py",
    "system/bench/transport.py",
    "system/cluster.py",
    "system/last_words.py",
    "system/learner_group.py",
    "system/parameter_server.py",
    "system/ray_actors.py",
    "system/ray_backend.py",
    "system/submit.py",
}


def package_of(path: str) -> list[str]:
    """Dotted package that a file's relative imports start from."""
    return list(Path(path).parent.parts)


def modules_in(node: ast.AST, path: str) -> Iterator[str]:
    """Full names of the modules that one statement or call imports; `from a import b` gives a.b."""
    match node:
        case ast.Import():
            yield from (alias.name for alias in node.names)
        case ast.ImportFrom():
            package = package_of(path)
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{stem}.{alias.name}" for alias in node.names)
        case ast.Call(func=ast.Attribute(attr="import_module") | ast.Name(id="import_module")):
            yield from strings_of(node.args[:1])
        case ast.Call(func=ast.Name(id="__import__")):
            yield from strings_of(node.args[:1])


def strings_of(nodes: list[ast.expr]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def imports(source: str, path: str) -> set[str]:
    """Every module that a file imports anywhere."""
    return {module for node in ast.walk(ast.parse(source)) for module in modules_in(node, path)}


def violations(source: str, path: str) -> list[str]:
    """What a file imports and must not."""
    floor = path.split("/")[0]
    below = FLOORS[: FLOORS.index(floor) + 1]
    found = []
    for module in sorted(imports(source, path)):
        top = module.split(".")[0]
        if top in FLOORS:
            allowed = top in below
        elif top == "ray":
            allowed = floor == "deploy" or path in MAY_IMPORT_RAY
        elif top == "tests":
            allowed = False
        elif floor in OUTSIDE and top not in sys.stdlib_module_names:
            allowed = top in OUTSIDE[floor]
        else:
            allowed = True
        if not allowed:
            found.append(f"{path} imports {module}")
    return found


def sources(floor: str) -> list[Path]:
    return sorted((ROOT / floor).rglob("*.py"))


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_go_down_only(floor):
    files = sources(floor)
    assert files
    found = []
    for file in files:
        path = file.relative_to(ROOT).as_posix()
        found += violations(file.read_text(encoding="utf-8"), path)
    assert found == []


def test_the_ray_backend_is_where_ray_is_imported():
    """Otherwise the rule above would guard nothing."""
    path = "system/ray_backend.py"
    modules = imports((ROOT / path).read_text(encoding="utf-8"), path)
    assert any(module.split(".")[0] == "ray" for module in modules)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("learners/maml.py", "import ray"),
        ("learners/maml.py", "def f():\n    from ray import get"),
        ("learners/core/policy.py", "import scipy.linalg"),
        ("learners/core/policy.py", "from actors.rollout import Chunk"),
        ("learners/core/policy.py", "from ...actors import rollout"),
        (
            "learners/registry.py",
            "from importlib import import_module\nimport_module('system.cli')",
        ),
        ("learners/maml.py", "import numpy, gymnasium"),
        ("learners/maml.py", "if TYPE_CHECKING:\n    from system.config import RunConfig"),
        ("actors/rollout.py", "import ray.util"),
        ("actors/tasks/ant.py", "import importlib\nimportlib.import_module('ray')"),
        ("actors/tasks/ant.py", "from system import config"),
        ("actors/tasks/ant.py", "__import__('deploy')"),
        ("actors/rollout.py", "try:\n    import tyro\nexcept ImportError:\n    pass"),
        ("system/loop.py", "from ray.exceptions import RayError"),
        ("system/cli.py", "import deploy.submit"),
        ("system/cli.py", "from tests.system import families"),
    ],
)
def test_forbidden_import_is_found(path, source):
    assert violations(source, path) != []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("learners/maml.py", "import json, torch.linalg\nfrom learners.core import params"),
        ("learners/core/policy.py", "from . import params\nfrom ..config import MamlTrpoConfig"),
        ("actors/rollout.py", "import gymnasium, mujoco\nfrom learners.core.policy import Policy"),
        ("system/ray_backend.py", "import ray\nfrom actors.rollout import RolloutWorker"),
        ("system/loop.py", "import rich\nfrom learners import registry"),
        ("deploy/submit.py", "import ray\nfrom system.config import RunConfig"),
    ],
)
def test_allowed_import_is_let_through(path, source):
    assert violations(source, path) == []


# --- What the command line's help needs ---


def top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when a module is imported: no function bodies, nothing for types only."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from top_level(node.orelse)
            continue
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for field in ("body", "orelse", "finalbody"):
                yield from top_level(getattr(node, field, []))


def files_of(module: str) -> list[str]:
    """Our files that importing `module` runs, its packages' among them; attributes are cut off."""
    parts, found = module.split("."), []
    for end in range(1, len(parts) + 1):
        stem = "/".join(parts[:end])
        found += [p for p in (f"{stem}.py", f"{stem}/__init__.py") if (ROOT / p).is_file()]
    return found


def closure(path: str) -> dict[str, set[str]]:
    """Every file of ours that importing `path` runs, with the modules it imports at once."""
    seen: dict[str, set[str]] = {}
    waiting = [path]
    while waiting:
        file = waiting.pop()
        if file in seen:
            continue
        statements = top_level(ast.parse((ROOT / file).read_text(encoding="utf-8")).body)
        seen[file] = {module for node in statements for module in modules_in(node, file)}
        waiting += [other for module in seen[file] for other in files_of(module)]
    return seen


HEAVY = {"torch", "ray", "mujoco", "tensorboard", "matplotlib"}


def test_help_needs_neither_torch_nor_ray():
    reached = closure("system/cli.py")
    assert {"system/config.py", "learners/config.py", "learners/__init__.py"} <= set(reached)
    heavy = [
        f"{file} imports {module}"
        for file, modules in sorted(reached.items())
        for module in sorted(modules)
        if module.split(".")[0] in HEAVY
    ]
    assert heavy == []


def test_importing_the_command_line_loads_neither_torch_nor_ray():
    code = "import json, sys, system.cli\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    modules = set(json.loads(done.stdout.splitlines()[-1]))
    assert "system.cli" in modules
    assert not modules & HEAVY


def test_closure_follows_imports_through_packages():
    reached = closure("system/loop.py")
    assert "learners/core/trajectory.py" in reached
    assert "torch" in {module.split(".")[0] for module in reached["learners/core/trajectory.py"]}
