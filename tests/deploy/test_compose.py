"""compose.yaml: a strict reading of what it may hold, and Docker's own where there is Docker."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Any

import pytest
from deployment import (
    COUNT,
    DEPLOY,
    TEXT,
    TEXTS,
    closed,
    documents,
    labels_of,
    listed,
    ray_start,
    read,
    schema_faults,
)

COMPOSE = read("compose.yaml")
PUBLISHED = {"head": "127.0.0.1:8265:8265", "tensorboard": "127.0.0.1:6006:6006"}
HEALTH = closed(
    {"test": listed(TEXT), "interval": TEXT, "timeout": TEXT, "start_period": TEXT},
    retries=COUNT,
)
AFTER = closed({"head": closed({"condition": {"const": "service_healthy"}})})
SERVICE = closed(
    {
        "image": {"const": "metaloop:cpu"},
        "init": {"const": True},
        "shm_size": {"pattern": r"^\d+(mb|gb)$"},
        "environment": TEXTS,
        "secrets": listed({"const": "ray_token"}, 0),
        "volumes": listed({"enum": ["runs:/runs", "runs:/runs:ro"]}),
        "cap_drop": {"const": ["ALL"]},
        "security_opt": {"const": ["no-new-privileges:true"]},
        "restart": TEXT,
        "command": listed(TEXT),
        "healthcheck": HEALTH,
    },
    build=closed({"context": TEXT, "dockerfile": TEXT, "args": TEXTS}),
    depends_on=AFTER,
    ports=listed({"pattern": r"^127\.0\.0\.1:\d+:\d+$"}),
)
FILE = {
    **closed(
        {
            "name": TEXT,
            "services": closed(
                dict.fromkeys(("head", "worker-1", "worker-2", "tensorboard"), SERVICE)
            ),
            "volumes": closed({"runs": {"const": {}}}),
            "secrets": closed({"ray_token": closed({"file": {"pattern": r"^\$\{\w+:\?"}})}),
        }
    ),
    "patternProperties": {"^x-": {}},
}


def faults(text: str) -> list[str]:
    """What the file must not say, and says."""
    (file,) = documents(text)
    found = schema_faults(file, FILE)
    if found:
        return found
    services = file["services"]
    for name, service in services.items():
        if service.get("ports", []) != ([PUBLISHED[name]] if name in PUBLISHED else []):
            found.append(f"{name} publishes {service.get('ports')}")
        if name != "tensorboard":
            found += ray_faults(name, service)
    watcher = services["tensorboard"]
    if watcher["secrets"] or watcher["volumes"] != ["runs:/runs:ro"]:
        found.append("tensorboard may do more than read")
    return found


def ray_faults(name: str, service: dict[str, Any]) -> list[str]:
    """What is wrong with a service that is a node of the cluster."""
    found = []
    expected = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/run/secrets/ray_token"}
    if service["environment"] != expected or service["secrets"] != ["ray_token"]:
        found.append(f"{name} does not get the token")
    if not service["shm_size"].endswith("gb"):
        found.append(f"{name} has no room for objects")
    words = [word.replace("${ACTORS_PER_WORKER:-2}", "2") for word in service["command"]]
    if words[:2] != ["ray", "start"]:
        return [*found, f"{name} does not start Ray"]
    options = ray_start(words[2:])
    head = name == "head"
    if not options["block"]:
        found.append(f"{name} would end at once")
    if options["head"] != head or options["address"] != (None if head else "head:6379"):
        found.append(f"{name} has another place in the cluster")
    if options["num_cpus"] != (0 if head else 2):
        found.append(f"{name} gives {options['num_cpus']} CPUs")
    if labels_of(words[2:]) != {"metaloop.role": "learner" if head else "actor"}:
        found.append(f"{name} has another role")
    path = ":8265/api/gcs_healthz" if head else ":52365/api/local_raylet_healthz"
    if not service["healthcheck"]["test"][-1].endswith(path):
        found.append(f"{name} is asked after another health")
    return found


def test_compose():
    assert faults(COMPOSE) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("127.0.0.1:8265:8265", "8265:8265"),
        ("127.0.0.1:6006:6006", "0.0.0.0:6006:6006"),
        ("    RAY_AUTH_MODE: token", "    RAY_AUTH_MODE: disabled"),
        ("  secrets: [ray_token]\n", "  secrets: []\n"),
        ("--num-cpus=0", "--num-cpus=4"),
        ("--labels=metaloop.role=actor", "--labels=metaloop.role=learner"),
        ("--address=head:6379", "--address=head:6380"),
        ("  shm_size: 2gb\n", ""),
        ("      - --block\n      - --port", "      - --port"),
        ("    healthcheck:", "    health_check:"),
        ("volumes:\n  runs: {}\n", "volumes:\n  other: {}\n"),
        ("${RAY_TOKEN_FILE:?the path of a file with the token}", "./token"),
        ('["runs:/runs:ro"]', '["runs:/runs"]'),
    ],
)
def test_fault_is_found(old, new):
    assert old in COMPOSE
    assert faults(COMPOSE.replace(old, new)) != []


def test_unknown_option_of_ray_start_is_found():
    with pytest.raises(Exception, match="No such option"):
        faults(COMPOSE.replace("--dashboard-port=", "--dashboard-prot="))


def test_build_names_the_dockerfile():
    build = documents(COMPOSE)[0]["services"]["head"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).resolve() == DEPLOY / "Dockerfile"
    arguments = [line for line in read("Dockerfile").splitlines() if line.startswith("ARG ")]
    assert {line.split()[1].split("=")[0] for line in arguments} == build["args"].keys()


def has_compose() -> bool:
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0


@pytest.mark.skipif(not has_compose(), reason="there is no docker compose")
def test_docker_reads_it(tmp_path):
    token = tmp_path / "token"
    token.write_text("x")
    command = ["docker", "compose", "-f", str(DEPLOY / "compose.yaml"), "config", "--quiet"]
    with_token = os.environ | {"RAY_TOKEN_FILE": str(token)}
    done = subprocess.run(command, env=with_token, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
