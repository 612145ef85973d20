"""The Kubernetes manifests: fields, references between them, rights, and who may connect."""

from __future__ import annotations

import copy
import json
import shlex
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
    cluster_faults,
    documents,
    listed,
    locked,
    parse,
    ray_start,
    read,
    schema_faults,
)

FILES = ("network-policy", "storage", "ray-cluster", "ray-job", "tensorboard")
PART = "app.kubernetes.io/part-of"

# --- What each kind may hold ---

RESOURCES = closed({"requests": TEXTS, "limits": TEXTS})
CONFINED = {
    "const": {
        "allowPrivilegeEscalation": False,
        "runAsNonRoot": True,
        "capabilities": {"drop": ["ALL"]},
    }
}
CONTAINER = closed(
    {
        "name": TEXT,
        "image": {"enum": ["metaloop:cpu", "metaloop:cuda"]},
        "securityContext": CONFINED,
        "resources": RESOURCES,
    },
    command=listed(TEXT),
    ports=listed(closed({"name": TEXT, "containerPort": COUNT})),
    readinessProbe=closed({"httpGet": closed({"path": TEXT, "port": TEXT})}),
    volumeMounts=listed(
        closed({"name": TEXT, "mountPath": {"const": "/runs"}}, readOnly={"const": True})
    ),
)
OWNER = closed(
    {
        "runAsNonRoot": {"const": True},
        "runAsUser": COUNT,
        "runAsGroup": COUNT,
        "seccompProfile": {"const": {"type": "RuntimeDefault"}},
    },
    fsGroup=COUNT,
    fsGroupChangePolicy=TEXT,
)
POD = closed(
    {
        "metadata": closed({"labels": TEXTS}),
        "spec": closed(
            {
                "automountServiceAccountToken": {"const": False},
                "securityContext": OWNER,
                "containers": listed(CONTAINER),
            },
            restartPolicy={"const": "Never"},
            tolerations=listed(TEXTS),
            volumes=listed(
                closed(
                    {
                        "name": TEXT,
                        "persistentVolumeClaim": closed(
                            {"claimName": TEXT}, readOnly={"const": True}
                        ),
                    }
                )
            ),
        ),
    }
)
SELECTOR = closed({"matchLabels": TEXTS})
PEER = closed({"podSelector": SELECTOR}, namespaceSelector={"const": {}})
GROUP = {"labels": closed({"metaloop.role": TEXT}), "rayStartParams": TEXTS, "template": POD}
SPECS = {
    ("v1", "PersistentVolumeClaim"): closed(
        {
            "accessModes": {"const": ["ReadWriteMany"]},
            "resources": closed({"requests": closed({"storage": TEXT})}),
        }
    ),
    ("ray.io/v1", "RayCluster"): closed(
        {
            "rayVersion": TEXT,
            "authOptions": closed({"mode": {"const": "token"}, "secretName": TEXT}),
            "headGroupSpec": closed(GROUP | {"serviceType": {"const": "ClusterIP"}}),
            "workerGroupSpecs": listed(
                closed(
                    GROUP
                    | {"groupName": TEXT}
                    | dict.fromkeys(("replicas", "minReplicas", "maxReplicas"), COUNT)
                )
            ),
        }
    ),
    ("ray.io/v1", "RayJob"): closed(
        {
            "clusterSelector": closed({"ray.io/cluster": TEXT}),
            "entrypoint": TEXT,
            "submitterPodTemplate": POD,
        }
    ),
    ("apps/v1", "Deployment"): closed({"replicas": COUNT, "selector": SELECTOR, "template": POD}),
    ("v1", "Service"): closed(
        {
            "type": {"const": "ClusterIP"},
            "selector": TEXTS,
            "ports": listed(closed({"name": TEXT, "port": COUNT, "targetPort": TEXT})),
        }
    ),
    ("networking.k8s.io/v1", "NetworkPolicy"): closed(
        {
            "podSelector": {"anyOf": [{"const": {}}, SELECTOR]},
            "policyTypes": {"const": ["Ingress"]},
            "ingress": listed(
                closed(
                    {"from": listed(PEER)},
                    ports=listed(closed({"protocol": {"const": "TCP"}, "port": COUNT})),
                ),
                0,
            ),
        }
    ),
}


def manifest_faults(manifest: dict[str, Any]) -> list[str]:
    """What a manifest holds and its kind does not, or lacks and its kind needs."""
    kind = (manifest.get("apiVersion"), manifest.get("kind"))
    if kind not in SPECS:
        return [f"{kind} is not known"]
    name = {"pattern": r"^[a-z]([a-z0-9-]{0,38}[a-z0-9])$"}
    metadata = closed({"name": name, "labels": TEXTS})
    schema = closed({"apiVersion": TEXT, "kind": TEXT, "metadata": metadata, "spec": SPECS[kind]})
    return [f"{kind[1]} {fault}" for fault in schema_faults(manifest, schema)]


# --- What they say of one another ---


class Cluster:
    """All manifests together."""

    def __init__(self, manifests: list[dict[str, Any]]) -> None:
        self.manifests = manifests

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [each for each in self.manifests if each["kind"] == kind]

    def one(self, kind: str) -> Any:
        (found,) = self.of(kind)
        return found["spec"]

    def pods(self) -> dict[str, Any]:
        """Pod templates, with the labels that KubeRay adds to those of its nodes."""
        ray = self.one("RayCluster")
        name = self.of("RayCluster")[0]["metadata"]["name"]
        found = {
            "job": copy.deepcopy(self.one("RayJob")["submitterPodTemplate"]),
            "tensorboard": copy.deepcopy(self.one("Deployment")["template"]),
            "head": copy.deepcopy(ray["headGroupSpec"]["template"]),
        }
        for group in ray["workerGroupSpecs"]:
            found[group["groupName"]] = copy.deepcopy(group["template"])
        for place in found.keys() - {"job", "tensorboard"}:
            found[place]["metadata"]["labels"] |= {
                "ray.io/cluster": name,
                "ray.io/is-ray-node": "yes",
                "ray.io/node-type": "head" if place == "head" else "worker",
            }
        return found


def selected(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    return selector.get("matchLabels", {}).items() <= labels.items()


def reference_faults(cluster: Cluster) -> list[str]:
    """Names, labels and ports that do not fit."""
    found = []
    claims = {each["metadata"]["name"] for each in cluster.of("PersistentVolumeClaim")}
    for place, pod in cluster.pods().items():
        spec = pod["spec"]
        volumes = {each["name"]: each["persistentVolumeClaim"] for each in spec.get("volumes", [])}
        if not {each["claimName"] for each in volumes.values()} <= claims:
            found.append(f"{place}: no such claim")
        mounts = {m["name"] for c in spec["containers"] for m in c.get("volumeMounts", [])}
        if mounts != volumes.keys() or (place != "job" and not mounts):
            found.append(f"{place}: the mounts {mounts} are not the volumes")
        for container in spec["containers"]:
            resources = container["resources"]
            if not resources["requests"].keys() == resources["limits"].keys() >= {"cpu", "memory"}:
                found.append(f"{place}: other limits than requests")
    return found + tensorboard_faults(cluster) + ray_faults(cluster)


def tensorboard_faults(cluster: Cluster) -> list[str]:
    """Where the service does not lead to the pod."""
    found = []
    pod = cluster.one("Deployment")["template"]
    labels = pod["metadata"]["labels"]
    service = cluster.one("Service")
    if not selected(cluster.one("Deployment")["selector"], labels):
        found.append("the deployment does not find its pods")
    if not service["selector"].items() <= labels.items():
        found.append("the service does not find its pods")
    (container,) = pod["spec"]["containers"]
    (port,) = container["ports"]
    targets = {each["targetPort"] for each in service["ports"]}
    if targets | {container["readinessProbe"]["httpGet"]["port"]} != {port["name"]}:
        found.append("the service leads to another port")
    if f"--port={port['containerPort']}" not in container["command"]:
        found.append("TensorBoard listens elsewhere")
    return found


def ray_faults(cluster: Cluster) -> list[str]:
    """What is wrong with the cluster and the run on it."""
    found = []
    ray, job = cluster.one("RayCluster"), cluster.one("RayJob")
    if ray["rayVersion"] != locked("ray"):
        found.append(f"Ray {ray['rayVersion']}, and {locked('ray')} is installed")
    groups = {each["groupName"]: each for each in ray["workerGroupSpecs"]}
    roles = {name: each["labels"]["metaloop.role"] for name, each in groups.items()}
    if roles != {"learner": "learner", "actor": "actor"}:
        found.append(f"roles {roles}")
    cpus = {"head": ray_cpus(ray["headGroupSpec"])}
    cpus |= {name: ray_cpus(each) * each["replicas"] for name, each in groups.items()}
    if cpus["head"] or cpus["learner"]:
        found.append("actors beside the head or the learner")
    (container,) = groups["actor"]["template"]["spec"]["containers"]
    if container["resources"]["limits"]["cpu"] != groups["actor"]["rayStartParams"]["num-cpus"]:
        found.append("Ray counts other CPUs than the actors' pods have")
    if job["clusterSelector"]["ray.io/cluster"] != cluster.of("RayCluster")[0]["metadata"]["name"]:
        found.append("the job is for another cluster")
    program, *words = shlex.split(job["entrypoint"])
    if program != "metaloop" or words[0] != "train":
        found.append(f"the job runs {program}")
    else:
        found += cluster_faults(words)
        if parse(words).config.runtime.num_actors != cpus["actor"]:
            found.append("the job has other actors than the cluster has CPUs")
        if not str(parse(words).run_dir).startswith("/runs/"):
            found.append("the run is not written to the volume")
    return found


def ray_cpus(group: dict[str, Any]) -> int:
    """The CPUs that Ray counts in a pod of the group, by the options of `ray start`."""
    options = ray_start([f"--{name}={text}" for name, text in group["rayStartParams"].items()])
    return int(options["num_cpus"])


def policy_faults(cluster: Cluster) -> list[str]:
    """Connections that are let in and should not be, or the other way round."""
    policies = [each["spec"] for each in cluster.of("NetworkPolicy")]
    found = []
    if {"podSelector": {}, "policyTypes": ["Ingress"], "ingress": []} not in policies:
        found.append("not everything is denied by default")
    pods = {name: pod["metadata"]["labels"] for name, pod in cluster.pods().items()}
    pods["stranger"] = {"app": "other"}
    pods["viewer"] = {"metaloop.dashboard": "allowed"}
    nodes = {"head", "learner", "actor"}
    for source in pods:
        for target in pods.keys() - {"stranger", "viewer"}:
            for port in (6379, 8265, 6006, 10001):
                expected = source in nodes and target in nodes
                if source in ("job", "viewer"):
                    expected = (target, port) in {("head", 8265), ("tensorboard", 6006)}
                if lets_in(policies, pods[source], pods[target], port) != expected:
                    found.append(f"{source} to {target}:{port} is not {expected}")
    return found


def lets_in(policies: list[Any], source: dict[str, str], target: dict[str, str], port: int) -> bool:
    """Whether a pod of the same namespace reaches another one's port."""
    applying = [each for each in policies if selected(each["podSelector"], target)]
    rules = [rule for each in applying for rule in each["ingress"]]
    return not applying or any(
        any(selected(peer["podSelector"], source) for peer in rule["from"])
        and ("ports" not in rule or port in {each["port"] for each in rule["ports"]})
        for rule in rules
    )


def faults(text: str) -> list[str]:
    """All that is wrong with the manifests of `text`."""
    manifests = documents(text)
    found = [fault for each in manifests for fault in manifest_faults(each)]
    if found:
        return found
    cluster = Cluster(manifests)
    return reference_faults(cluster) + policy_faults(cluster)


ALL = "".join(read(f"kubernetes/{name}.yaml") for name in FILES)


def test_manifests():
    assert faults(ALL) == []


def test_every_file_is_checked():
    names = {path.stem for path in (DEPLOY / "kubernetes").iterdir()}
    assert names == {*FILES, "learner-gpu"}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('rayVersion: "2.60.0"', 'rayVersion: "2.55.0"'),
        ("mode: token", "mode: disabled"),
        ("runAsNonRoot: true", "runAsNonRoot: false"),
        ("runAsUser: 1000", "runAsUser: 0"),
        ("capabilities: {drop: [ALL]}", "capabilities: {}"),
        ("type: ClusterIP", "type: LoadBalancer"),
        ("serviceType: ClusterIP", "serviceType: NodePort"),
        ("claimName: metaloop-runs", "claimName: runs"),
        ("metadata:\n  name: metaloop-runs", "metadata:\n  name: runs"),
        ("  podSelector: {}\n", "  podSelector: {matchLabels: {a: b}}\n"),
        ("  ingress: []\n", "  ingress: [{from: [{podSelector: {matchLabels: {}}}]}]\n"),
        ("{metaloop.dashboard: allowed}\n        - name", "{app: other}\n        - name"),
        ("      ports:\n        - {protocol: TCP, port: 8265}\n", ""),
        ("port: 8265}", "port: 8266}"),
        ("targetPort: http", "targetPort: web"),
        ("--port=6006", "--port=6007"),
        ("selector: {app.kubernetes.io/part-of: metaloop, ", "selector: {app: x, "),
        ("ray.io/cluster: metaloop}\n  entrypoint", "ray.io/cluster: other}\n  entrypoint"),
        ("--address auto", ""),
        ("--num-actors 16", "--num-actors 64"),
        ("--run-dir /runs/half-cheetah-dir", "--run-dir runs"),
        ("metaloop.role: learner}\n      rayStart", "metaloop.role: actor}\n      rayStart"),
        ('{num-cpus: "0"}', '{num-cpus: "2"}'),
        ('limits: {cpu: "1"', 'limit: {cpu: "1"'),
        ("workerGroupSpecs:", "workerGroupSpec:"),
        ('            limits: {cpu: "2", memory: 4Gi}\n', ""),
    ],
)
def test_fault_is_found(old, new):
    assert old in ALL
    assert faults(ALL.replace(old, new)) != []


def test_wrong_flag_and_wrong_option_are_found():
    with pytest.raises(ValueError, match="--num-actor"):
        faults(ALL.replace("--num-actors 16", "--num-actor 16"))
    with pytest.raises(Exception, match="No such option"):
        faults(ALL.replace("num-cpus:", "numcpus:"))


# --- The learner on a GPU ---


def patched(manifest: Any, patch: list[dict[str, Any]]) -> Any:
    """A JSON patch of `test` and `add` applied."""
    manifest = copy.deepcopy(manifest)
    for step in patch:
        *way, last = step["path"].strip("/").replace("~1", "/").split("/")
        place = manifest
        for part in way:
            place = place[int(part)] if isinstance(place, list) else place[part]
        if step["op"] == "test":
            assert place[last] == step["value"]
        else:
            assert step["op"] == "add"
            place[last] = step["value"]
    return manifest


def test_learner_gets_the_gpu_and_nobody_else():
    (manifest,) = documents(read("kubernetes/ray-cluster.yaml"))
    (patch,) = documents(read("kubernetes/learner-gpu.yaml"))
    changed = patched(manifest, patch)
    others = [each for each in documents(ALL) if each["kind"] != "RayCluster"]
    assert manifest_faults(changed) == []
    assert reference_faults(Cluster([changed, *others])) == []
    learner, actor = changed["spec"]["workerGroupSpecs"]
    (container,) = learner["template"]["spec"]["containers"]
    assert container["image"] == "metaloop:cuda"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert actor == manifest["spec"]["workerGroupSpecs"][1]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="there is no kubectl")
def test_kubectl_applies_the_patch():
    folder = DEPLOY / "kubernetes"
    command = ["kubectl", "patch", "--local", "-f", folder / "ray-cluster.yaml", "--type", "json"]
    command += ["--patch-file", folder / "learner-gpu.yaml", "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (manifest,) = documents(read("kubernetes/ray-cluster.yaml"))
    (patch,) = documents(read("kubernetes/learner-gpu.yaml"))
    assert json.loads(done.stdout) == patched(manifest, patch)
