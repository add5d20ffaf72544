"""deploy/kubernetes against the schemas of KubeRay and Kubernetes, Ray's own reading of it, and the rest of the
project."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.serve.schema import ServeDeploySchema

from heliostat.launch.train import STOP_SIGNALS
from heliostat.train.interval import MARGIN_S
from pipelines.job import parse
from tests.kustomize import Object, render
from tests.manifests import GPU, cluster_spec, pods, problems
from tests.network import Peer, may_talk

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
OVERLAYS = sorted((KUBERNETES / "overlays").iterdir())
KINDS = {"cluster": "RayCluster", "job": "RayJob", "service": "RayService"}
DASHBOARD, SERVE, METRICS, REDIS = 8265, 8000, 8080, 6379


@cache
def rendered(name: str) -> str:
    return json.dumps(render(KUBERNETES / "overlays" / name))


def overlay(name: str) -> list[Object]:
    return json.loads(rendered(name))


def ray_object(name: str) -> Object:
    (found,) = [each for each in overlay(name) if each["kind"] == KINDS[name]]
    return found


def groups(spec: Object) -> dict[str, Object]:
    return {group["groupName"]: group for group in spec["workerGroupSpecs"]}


def cluster_file() -> Object:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


# -- schemas and rules


def test_overlays() -> None:
    assert {folder.name for folder in OVERLAYS} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_objects_are_valid(name: str) -> None:
    objects = overlay(name)
    assert [problem for each in objects for problem in problems(each)] == []
    assert "Secret" not in {each["kind"] for each in objects}  # people make them, and no file has one
    assert len({(each["kind"], each["metadata"]["name"]) for each in objects}) == len(objects)


@pytest.mark.parametrize("name", KINDS)
def test_kustomize_is_read_rightly(name: str) -> None:
    """Where there is a kubectl, it prints the same."""
    own = overlay(name)
    assert KINDS[name] in {each["kind"] for each in own}
    if shutil.which("kubectl"):
        printed = subprocess.check_output(["kubectl", "kustomize", str(KUBERNETES / "overlays" / name)], text=True)
        assert sorted(own, key=str_of) == sorted(yaml.safe_load_all(printed), key=str_of)


def str_of(each: Object) -> str:
    return json.dumps(each, sort_keys=True)


def cpu_pod(spec: Object) -> Object:
    return groups(spec)["cpu"]["template"]["spec"]


def gpu_container(spec: Object) -> Object:
    return groups(spec)["gpu"]["template"]["spec"]["containers"][0]


MISTAKES: dict[str, tuple[Callable[[Object], Any], str]] = {
    "unknown field": (lambda spec: spec.update(rayVersoin="2.60.0"), "'rayVersoin' was unexpected"),
    "unknown field deep in a pod": (
        lambda spec: cpu_pod(spec)["containers"][0].update(imagePulPolicy="Always"),
        "'imagePulPolicy' was unexpected",
    ),
    "unknown option of the autoscaler": (
        lambda spec: spec["autoscalerOptions"].update(version="v3"),
        r"'v3' is not one of \['v1', 'v2'\]",
    ),
    "wrong type": (lambda spec: groups(spec)["gpu"].update(maxReplicas="4"), "'4' is not of type 'integer'"),
    "number where text is wanted": (
        lambda spec: spec["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        "0 is not of type 'string'",
    ),
    "no template": (lambda spec: groups(spec)["gpu"].pop("template"), "'template' is a required property"),
    "one port twice": (
        lambda spec: (
            gpu_container(spec)["ports"].append({"name": "more", "containerPort": 8000, "protocol": "TCP"})
            or gpu_container(spec)["ports"][0].update(protocol="TCP")
        ),
        "is there twice",
    ),
    "a GPU without a limit": (
        lambda spec: gpu_container(spec)["resources"]["limits"].pop(GPU),
        "4 GPUs are requested, and the limit is None",
    ),
    "more GPUs for Ray than for the pod": (
        lambda spec: groups(spec)["gpu"]["rayStartParams"].update({"num-gpus": "8"}),
        "num-gpus is 8, the limit 4",
    ),
    "no limit of memory": (
        lambda spec: gpu_container(spec)["resources"]["limits"].pop("memory"),
        "no limit of memory",
    ),
    "work on the head": (lambda spec: spec["headGroupSpec"]["rayStartParams"].clear(), "num-cpus is not 0"),
    "no token": (lambda spec: spec.pop("authOptions"), "authOptions: no token"),
    "a token that KubeRay makes anew for each cluster": (
        lambda spec: spec["authOptions"].pop("secretName"),
        "authOptions: no token, or not from a Secret",
    ),
    "a password in the file": (
        lambda spec: spec["gcsFaultToleranceOptions"].update(redisPassword={"value": "12345"}),
        "redisPassword does not come from a Secret",
    ),
    "no reference to Redis' Secret": (
        lambda spec: spec["gcsFaultToleranceOptions"].pop("redisPassword"),
        "redisPassword does not come from a Secret",
    ),
    "a token in the environment": (
        lambda spec: cpu_pod(spec)["containers"][0].update(env=[{"name": "HF_TOKEN", "value": "hf_1"}]),
        "HF_TOKEN does not come from a Secret",
    ),
    "root": (lambda spec: cpu_pod(spec)["securityContext"].update(runAsUser=0), "it runs as root"),
    "perhaps root": (
        lambda spec: cpu_pod(spec)["securityContext"].pop("runAsNonRoot"),
        "runAsNonRoot is not set",
    ),
    "no seccomp": (lambda spec: cpu_pod(spec)["securityContext"].pop("seccompProfile"), "no seccompProfile"),
    "capabilities": (
        lambda spec: cpu_pod(spec)["containers"][0]["securityContext"].pop("capabilities"),
        "does not drop all capabilities",
    ),
    "an autoscaler with privileges": (
        lambda spec: spec["autoscalerOptions"].pop("securityContext"),
        "autoscalerOptions: allowPrivilegeEscalation is not false",
    ),
    "a folder of the host": (
        lambda spec: cpu_pod(spec)["volumes"].append({"name": "host", "hostPath": {"path": "/"}}),
        "volume host is of {'hostPath'}",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_caught(mistake: str) -> None:
    make, reason = MISTAKES[mistake]
    service = ray_object("service")
    spec = cluster_spec(service)
    assert spec is not None
    make(spec)
    assert re.search(reason, "\n".join(problems(service)))


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("ResourceQuota", {"spec": {"hard": ["pods"]}}, "is not of type"),
        ("NetworkPolicy", {"spec": {"podSelektor": {}}}, "'podSelektor' was unexpected"),
        ("StatefulSet", {"spec": {}}, "is a required property"),
        (
            "PodMonitor",
            {"spec": {"selector": {}, "podMetricsEndpoints": [{"prot": "metrics"}]}},
            "'prot' was unexpected",
        ),
        (
            "PrometheusRule",
            {"spec": {"groups": [{"name": "a", "rules": [{"expr": 1, "fro": "5m"}]}]}},
            "'fro' was unexpected",
        ),
    ],
)
def test_a_mistake_in_kubernetes_own_objects_is_caught(kind: str, change: Object, reason: str) -> None:
    each = next(each for each in overlay("service") if each["kind"] == kind)
    assert any(reason in problem for problem in problems(each | change))


# -- Ray's reading, and the rest of the project


def test_ray_and_python_are_the_pinned_ones() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (pin,) = [each for each in project["project"]["dependencies"] if each.startswith("ray[")]
    version = pin.partition("==")[2]
    for name in KINDS:
        spec = cluster_spec(ray_object(name))
        assert spec is not None
        assert spec["rayVersion"] == version
        images = {c["image"] for _, pod in pods(ray_object(name)) for c in pod["containers"]}
        assert len(images) == 1
        assert images.pop().endswith(f":{project['project']['version']}-ray{version}")
    python = project["tool"]["mypy"]["python_version"]
    assert f"FROM python:{python}-" in (KUBERNETES / "Dockerfile").read_text()


def test_the_image_has_the_environment_of_jobs() -> None:
    dockerfile = (KUBERNETES / "Dockerfile").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^ENV (.*)", dockerfile, re.MULTILINE)
    variables = dict(word.split("=") for word in line.split())
    submitted = yaml.safe_load((ROOT / "runtime_env.yaml").read_text())["env_vars"]
    (folder,) = re.findall(r"^WORKDIR (.*)", dockerfile, re.MULTILINE)
    paths = [str(Path(folder) / path) for path in submitted["PYTHONPATH"].split(":")]
    assert variables.pop("NVIDIA_DRIVER_CAPABILITIES")
    assert variables == submitted | {"PYTHONPATH": ":".join(paths)}
    # What `ray up` does on its nodes.
    for lock in re.findall(r"\S+\.lock", " ".join(cluster_file()["setup_commands"])):
        assert f"-r {Path(lock).name}" in dockerfile
    (user,) = re.findall(r"^USER (\d+)", dockerfile, re.MULTILINE)
    for _, pod in pods(ray_object("cluster")):
        assert pod["securityContext"]["runAsUser"] == int(user)


@pytest.mark.parametrize("name", KINDS)
def test_ray_takes_nodes_for_what_their_pods_are(name: str) -> None:
    """The autoscaler's own reading of the cluster."""
    spec = cluster_spec(ray_object(name))
    config = _derive_autoscaling_config_from_ray_cr({"metadata": {"name": name, "namespace": "n"}, "spec": spec})
    kinds = config["available_node_types"]
    assert kinds["headgroup"]["resources"]["CPU"] == 0
    for group, each in groups(spec).items():
        limits = each["template"]["spec"]["containers"][0]["resources"]["limits"]
        expected = {"CPU": int(limits["cpu"]), "memory": int(limits["memory"].removesuffix("Gi")) << 30}
        if GPU in limits:
            expected["GPU"] = int(limits[GPU])
        assert kinds[group]["resources"] == expected
        assert kinds[group]["max_workers"] == each["maxReplicas"]
    assert kinds["gpu-spot"]["priority"] > kinds["gpu"].get("priority", 0)
    assert kinds["gpu-spot"]["labels"] == {"ray.io/market-type": "spot"}


def test_it_is_the_cluster_of_cluster_yaml() -> None:
    """As many nodes, given back after the same time."""
    spec, other = cluster_spec(ray_object("cluster")), cluster_file()
    assert spec["autoscalerOptions"]["idleTimeoutSeconds"] == 60 * other["idle_timeout_minutes"]
    kinds = other["available_node_types"]
    for group, kind in (("gpu", "gpu_worker"), ("gpu-spot", "gpu_worker_spot")):
        assert groups(spec)[group]["maxReplicas"] == kinds[kind]["max_workers"]
        limits = groups(spec)[group]["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert int(limits[GPU]) == kinds[kind]["resources"]["GPU"]


def amount(quantity: str) -> float:
    """Of CPUs, bytes or pieces."""
    for suffix, factor in (("Ti", 2**40), ("Gi", 2**30), ("Mi", 2**20), ("m", 1e-3)):
        if quantity.endswith(suffix):
            return float(quantity.removesuffix(suffix)) * factor
    return float(quantity)


@pytest.mark.parametrize("name", KINDS)
def test_quotas_leave_room_for_what_is_declared(name: str) -> None:
    """The head and CPU workers at their most (twice, while a service is upgraded), and either group of GPU workers; all
    GPU workers together are as many as `max_workers` of cluster.yaml."""
    objects = overlay(name)
    (quota,) = [each["spec"]["hard"] for each in objects if each["kind"] == "ResourceQuota"]
    (limits,) = [each["spec"]["limits"] for each in objects if each["kind"] == "LimitRange"]
    (most,) = [each["max"] for each in limits if each["type"] == "Container"]
    spec = cluster_spec(ray_object(name))
    clusters = 2 if name == "service" else 1
    for resource in ("cpu", "memory"):
        needed = {}
        for group, pod in pods(ray_object(name)):
            each = amount(pod["containers"][0]["resources"]["limits"][resource])
            assert each <= amount(most[resource])
            needed[group] = each * groups(spec).get(group, {"maxReplicas": 1})["maxReplicas"]
        autoscaler = amount(spec["autoscalerOptions"]["resources"]["limits"][resource])
        always = clusters * (needed["headGroupSpec"] + needed["cpu"] + autoscaler)
        for group in ("gpu", "gpu-spot") if name != "service" else ():
            assert always + needed[group] <= amount(quota[f"limits.{resource}"])
        assert always <= amount(quota[f"limits.{resource}"])
    gpus = {
        int(group["template"]["spec"]["containers"][0]["resources"]["limits"].get(GPU, 0))
        for group in groups(spec).values()
    } - {0}
    assert int(quota[f"requests.{GPU}"]) == cluster_file()["max_workers"] * gpus.pop()
    claims = [each["spec"] for each in objects if each["kind"] == "PersistentVolumeClaim"]
    sets = [each["spec"] for each in objects if each["kind"] == "StatefulSet"]
    claims += [claim["spec"] for each in sets for claim in each["volumeClaimTemplates"]]
    assert sum(amount(claim["resources"]["requests"]["storage"]) for claim in claims) <= amount(
        quota["requests.storage"]
    )


def stop_command(pod: Object) -> str:
    return pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]


@pytest.mark.parametrize("name", KINDS)
def test_a_pod_that_is_told_to_go_has_time_for_a_checkpoint(name: str) -> None:
    """Training hears of the end through Ray, as from `ray drain-node`, a job's driver through a signal; both are over
    before the pod is killed."""
    spec = cluster_spec(ray_object(name))
    for group, pod in pods(ray_object(name)):
        if group == "headGroupSpec":
            continue
        (deadline,) = re.findall(
            r"ray drain-node .*--deadline-remaining-seconds (\d+)", stop_command(pod).replace("\\\n", " ")
        )
        assert "DRAIN_NODE_REASON_PREEMPTION" in stop_command(pod)
        assert int(deadline) + MARGIN_S <= pod["terminationGracePeriodSeconds"]
    head = spec["headGroupSpec"]["template"]["spec"]
    patterns = re.findall(r"-f '([^']+)'", stop_command(head))
    assert len(patterns) == 2
    assert all(re.search(pattern, ray_object("job")["spec"]["entrypoint"]) for pattern in patterns)
    assert "pkill -TERM" in stop_command(head)
    assert signal.SIGTERM in STOP_SIGNALS
    wait = {each["name"]: each["value"] for each in head["containers"][0]["env"]}["RAY_JOB_STOP_WAIT_TIME_S"]
    assert int(wait) < head["terminationGracePeriodSeconds"]


def test_the_job_is_one_that_would_be_accepted() -> None:
    spec = ray_object("job")["spec"]
    words = spec["entrypoint"].split()
    assert words[:3] == ["python", "-m", "pipelines.train"]
    recipe, _ = parse(words[3:])
    workers = groups(spec["rayClusterSpec"])["cpu"]
    cpus = workers["minReplicas"] * int(workers["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert recipe.parallelism.workers * recipe.parallelism.cpus_per_worker <= cpus


def test_every_node_has_the_storage() -> None:
    home = re.findall(r"--create-home (\w+)", (KUBERNETES / "Dockerfile").read_text())
    recipe, _ = parse(["sentiment"])
    for name in KINDS:
        for _, pod in pods(ray_object(name)):
            (mount,) = pod["containers"][0]["volumeMounts"]
            assert mount["mountPath"] == recipe.storage.replace("~", f"/home/{home[0]}")
            (volume,) = pod["volumes"]
            claim = volume["persistentVolumeClaim"]["claimName"]
            assert ("PersistentVolumeClaim", claim) in {(e["kind"], e["metadata"]["name"]) for e in overlay(name)}


def test_the_service_is_serve_s_configuration() -> None:
    config = yaml.safe_load(ray_object("service")["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(config)
    other = yaml.safe_load((ROOT / "serve" / "classifier.yaml").read_text())
    assert config["applications"] == other["applications"]
    assert config["http_options"] == {"host": "0.0.0.0", "port": SERVE}
    spec = ray_object("service")["spec"]
    assert spec["upgradeStrategy"] == {"type": "NewCluster"}
    assert groups(spec["rayClusterConfig"])["cpu"]["minReplicas"] >= 2
    address = spec["rayClusterConfig"]["gcsFaultToleranceOptions"]["redisAddress"]
    redis = [each for each in overlay("service") if each["kind"] == "Service"]
    assert address in {f"{each['metadata']['name']}:{each['spec']['ports'][0]['port']}" for each in redis}


# -- the network

HEAD = Peer("heliostat", {"ray.io/is-ray-node": "yes", "ray.io/node-type": "head"})
WORKER = Peer("heliostat", {"ray.io/is-ray-node": "yes", "ray.io/node-type": "worker"})
CLEANER = Peer("heliostat", {"ray.io/is-ray-node": "yes", "ray.io/node-type": "redis-cleanup"})
STORE = Peer("heliostat", {"app.kubernetes.io/name": "redis"})
OPERATOR = Peer("kuberay", {"app.kubernetes.io/name": "kuberay-operator"})
PROMETHEUS = Peer("monitoring", {"app.kubernetes.io/name": "prometheus"})
INGRESS = Peer("ingress-nginx", {}, {"heliostat/serve-client": "true"})
STRANGER = Peer("default", {"app.kubernetes.io/name": "prometheus"})
NEIGHBOUR = Peer("heliostat", {"app": "other"})
DNS = Peer("kube-system", {"k8s-app": "kube-dns"})
HUB, METADATA = Peer(address="93.184.216.34"), Peer(address="169.254.169.254")


@pytest.mark.parametrize(
    ("source", "target", "port", "where"),
    [
        (WORKER, HEAD, REDIS, "cluster job service"),  # the head's own port 6379, the GCS
        (HEAD, WORKER, 33333, "cluster job service"),
        (WORKER, WORKER, 33333, "cluster job service"),
        (OPERATOR, HEAD, DASHBOARD, "cluster job service"),
        (OPERATOR, HEAD, SERVE, "cluster job service"),
        (OPERATOR, WORKER, DASHBOARD, ""),
        (PROMETHEUS, HEAD, METRICS, "cluster job service"),
        (PROMETHEUS, WORKER, METRICS, "cluster job service"),
        (PROMETHEUS, HEAD, 44217, "cluster job service"),
        (PROMETHEUS, HEAD, DASHBOARD, ""),
        (STRANGER, HEAD, DASHBOARD, ""),
        (STRANGER, WORKER, METRICS, ""),
        (STRANGER, WORKER, SERVE, ""),
        (NEIGHBOUR, HEAD, DASHBOARD, ""),
        (NEIGHBOUR, STORE, REDIS, ""),
        (INGRESS, WORKER, SERVE, "service"),
        (INGRESS, WORKER, METRICS, ""),
        (INGRESS, HEAD, SERVE, ""),
        (HEAD, STORE, REDIS, "service"),
        (CLEANER, STORE, REDIS, "service"),
        (WORKER, STORE, REDIS, ""),
        (WORKER, DNS, 53, "cluster job service"),
        (WORKER, HUB, 443, "cluster job service"),
        (WORKER, HUB, 80, ""),
        (WORKER, METADATA, 443, ""),
        (HEAD, HUB, 6443, "cluster job service"),
        (WORKER, HUB, 6443, ""),
        (STORE, HUB, 443, ""),
    ],
)
def test_who_may_talk_to_whom(source: Peer, target: Peer, port: int, where: str) -> None:
    allowed = {name for name in KINDS if may_talk(overlay(name), source, target, port)}
    assert allowed == set(where.split())


def test_the_namespace_is_restricted() -> None:
    for name in KINDS:
        (namespace,) = [each for each in overlay(name) if each["kind"] == "Namespace"]
        assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize("name", KINDS)
def test_what_is_scraped_has_ports_of_that_name(name: str) -> None:
    spec = cluster_spec(ray_object(name))
    monitors = [each["spec"] for each in overlay(name) if each["kind"] == "PodMonitor"]
    head = [each["name"] for each in spec["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]]
    scraped = {
        next(iter(each["selector"]["matchLabels"])): [end["port"] for end in each["podMetricsEndpoints"]]
        for each in monitors
    }
    assert set(scraped["ray.io/is-ray-node"]) == {"metrics"}
    assert set(scraped["ray.io/node-type"]) <= set(head)
    for _, pod in pods(ray_object(name)):
        assert ("metrics", METRICS) in {(p["name"], p["containerPort"]) for p in pod["containers"][0]["ports"]}


@pytest.mark.parametrize("name", KINDS)
def test_grafana_finds_the_dashboards(name: str) -> None:
    (found,) = [each for each in overlay(name) if each["kind"] == "ConfigMap"]
    assert found["metadata"]["labels"] == {"grafana_dashboard": "1"}
    assert set(found["data"]) == {file.name for file in (ROOT / "deploy" / "grafana").glob("*.json")}
    assert all(json.loads(text)["uid"] for text in found["data"].values())


def test_what_kustomize_might_do_and_this_does_not_is_refused(tmp_path: Path) -> None:
    kustomization = {"resources": [], "commonLabels": {"a": "b"}}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    with pytest.raises(ValueError, match="commonLabels"):
        render(tmp_path)
