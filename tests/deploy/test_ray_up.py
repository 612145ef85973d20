"""The cluster files of `ray up`, by Ray's own schema and defaults; no machine is asked for."""

from __future__ import annotations

import re
import shlex
from typing import Any

import jsonschema
import pytest
from deployment import ROLES, ROOT, documents, labels_of, ray_start, read
from ray.autoscaler._private.util import prepare_config, validate_config

FILES = ("ray-up/on-premise.yaml", "ray-up/aws.yaml")


def start_words(commands: list[str]) -> list[str]:
    """What follows `ray start` in the last of the commands, with the settings before it."""
    words = shlex.split(commands[-1])
    return words[words.index("start") + 1 :]


def faults(text: str) -> list[str]:
    """What the file must not say, and says.

    Raises:
        jsonschema.ValidationError: Ray does not accept it.
    """
    (file,) = documents(text)
    validate_config(prepare_config(file))
    found = []
    for kind in ("head", "worker"):
        commands = file[f"{kind}_start_ray_commands"]
        # Given to a later command after `;` the settings would not reach Ray.
        if not re.search(r"; RAY_AUTH_MODE=token [^;]*ray start ", commands[-1]):
            found.append(f"{kind}: Ray starts without asking for the token")
        options = ray_start(start_words(commands))
        if options["head"] != (kind == "head"):
            found.append(f"{kind}: another place in the cluster")
        if kind == "head" and options["dashboard_host"] != "127.0.0.1":
            found.append("the dashboard is open to the network")
    mounts = file["file_mounts"]
    token = [remote for remote, local in mounts.items() if local == "~/.ray/auth_token"]
    if [remote.rsplit("/", 2)[1:] for remote in token] != [[".ray", "auth_token"]]:
        found.append("the nodes do not get the token where Ray looks for it")
    setup = " ".join(file["setup_commands"])
    if "chmod 600 ~/.ray/auth_token" not in setup or "chmod 700 ~/.ray" not in setup:
        found.append("others can read the token")
    if "-c constraints.txt" not in setup:
        found.append("the versions are not locked")
    return found + role_faults(file)


def role_faults(file: dict[str, Any]) -> list[str]:
    """What is wrong with who does what."""
    types = file.get("available_node_types")
    if types is None:
        commands = [file[f"{kind}_start_ray_commands"] for kind in ("head", "worker")]
        roles = [labels_of(start_words(each)).get("metaloop.role") for each in commands]
        cpus = ray_start(start_words(commands[0]))["num_cpus"]
        expected = ["learner", "actor"]
    else:
        roles = [each["labels"]["metaloop.role"] for each in types.values()]
        cpus = types[file["head_node_type"]]["resources"]["CPU"]
        expected = ["head", "learner", "actor"]
        if types["learner"]["resources"] != {"CPU": 0, "GPU": 1}:
            return ["the learner's machine is not for the learner alone"]
        if file["max_workers"] != sum(each.get("max_workers", 0) for each in types.values()):
            return ["max_workers is not the number of workers"]
    assert set(roles) <= ROLES
    found = [] if roles == expected else [f"roles {roles}"]
    return found if cpus == 0 else [*found, "actors on the head"]


@pytest.mark.parametrize("name", FILES)
def test_cluster_file(name):
    assert faults(read(name)) == []


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("RAY_AUTH_MODE=token RAY", "RAY"),
        ("RAY_AUTH_MODE=token RAY", "RAY_AUTH_MODE=token; RAY"),
        ("--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0"),
        (".ray/auth_token: ~/.ray/auth_token", "token: ~/.ray/auth_token"),
        ("chmod 600 ~/.ray/auth_token", "true"),
        ("-c constraints.txt ", ""),
        ("ray start --head", "ray start"),
    ],
)
def test_fault_is_found(name, old, new):
    text = read(name)
    assert old in text
    assert faults(text.replace(old, new)) != []


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        (FILES[0], "--num-cpus=0", "--num-cpus=4"),
        (FILES[0], "role=actor", "role=learner"),
        (FILES[1], "resources: {CPU: 0}", "resources: {CPU: 4}"),
        (FILES[1], "{metaloop.role: learner}", "{metaloop.role: actor}"),
        (FILES[1], "{CPU: 0, GPU: 1}", "{CPU: 8, GPU: 1}"),
        (FILES[1], "max_workers: 3", "max_workers: 9"),
    ],
)
def test_wrong_role_is_found(name, old, new):
    text = read(name)
    assert old in text
    assert faults(text.replace(old, new)) != []


@pytest.mark.parametrize("name", FILES)
def test_unknown_field_is_refused(name):
    with pytest.raises(jsonschema.ValidationError, match="clustername"):
        faults(read(name) + "\nclustername: metaloop\n")


@pytest.mark.parametrize("name", FILES)
def test_mounted_project_is_this_one(name):
    mounts = documents(read(name))[0]["file_mounts"]
    ours = {remote: local for remote, local in mounts.items() if "/metaloop/" in remote}
    assert all(remote.endswith(f"/metaloop/{local}") for remote, local in ours.items())
    assert all((ROOT / local).exists() for local in ours.values())
    copied = re.findall(r"^COPY (.+) \S+$", read("Dockerfile"), re.MULTILINE)
    assert set(ours.values()) == {each.removesuffix("/*.py") for each in " ".join(copied).split()}
