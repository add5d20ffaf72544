"""What is wrong with Kubernetes objects, as far as can be said without a cluster: by their schemas, read more strictly
than an API server reads them, and by the rules of deploy/kubernetes."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

Object = dict[str, Any]
KUBERNETES = "1.37"
DATA = Path(__file__).parent / "data"
CLUSTER_SPEC = {"RayCluster": "", "RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
NAMED = ("properties", "$defs")
"""Keywords of a schema whose values are schemas by name."""
GPU = "nvidia.com/gpu"
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
"""What pods of the restricted policy may mount."""


def problems(each: Object) -> Iterator[str]:
    """What is wrong with an object, as `path: reason`; by its schema alone, where that is something."""
    if found := list(schema_problems(each)):
        yield from found
        return
    for where, pod in pods(each):
        for reason in (*not_restricted(pod), *gpus_unlimited(pod), *secrets_in_the_open(pod)):
            yield f"{where}: {reason}"
    if (spec := cluster_spec(each)) is not None:
        yield from cluster_problems(spec)


# -- schemas


def schema_problems(each: Object) -> Iterator[str]:
    if each["apiVersion"] == "monitoring.coreos.com/v1":
        yield from _invalid(_monitoring(each["kind"]), each)
    elif each["apiVersion"] == "ray.io/v1":
        found = list(_invalid(_crd(each["kind"]), each))
        yield from found
        for where, pod in () if found else pods(each):  # KubeRay's copy of the pod's schema lags behind
            yield from (f"{where}.{reason}" for reason in _core({"apiVersion": "v1", "kind": "Pod", "spec": pod}))
    else:
        yield from _core(each)


def _core(each: Object) -> tuple[str, ...]:
    return _core_text(json.dumps(each, sort_keys=True))


@cache
def _core_text(text: str) -> tuple[str, ...]:
    """Kept, since its schemas are read anew each time."""
    try:
        kubernetes_validate.validate(json.loads(text), KUBERNETES, strict=True)
    except jsonschema.ValidationError as error:
        return (_words(error),)
    return ()


def _invalid(schema: Object, each: Object) -> Iterator[str]:
    error = jsonschema.exceptions.best_match(_Validator(schema).iter_errors(each))
    if error is not None:
        yield _words(error)


def _words(error: jsonschema.ValidationError) -> str:
    return f"{'.'.join(str(part) for part in error.absolute_path)}: {error.message}"


def _unique_keys(validator: Any, keys: list[str], items: Any, schema: Object) -> Iterator[jsonschema.ValidationError]:
    """An API server refuses a list with two items of one key."""
    if isinstance(items, list):
        seen = [tuple(item.get(key) for key in keys) for item in items if isinstance(item, dict)]
        for key in {each for each in seen if seen.count(each) > 1}:
            yield jsonschema.ValidationError(f"{key} is there twice")


_Validator = jsonschema.validators.extend(jsonschema.Draft202012Validator, {"x-kubernetes-list-map-keys": _unique_keys})


@cache
def _crd(kind: str) -> Object:
    text = gzip.decompress((DATA / "kuberay-crds" / f"ray.io_{kind.lower()}s.yaml.gz").read_bytes())
    (version,) = [each for each in yaml.load(text, yaml.CSafeLoader)["spec"]["versions"] if each["name"] == "v1"]
    schema = _strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["status"] = False  # the operator's to write
    return schema


@cache
def _monitoring(kind: str) -> Object:
    return _strict(json.loads((DATA / "prometheus-operator" / f"{kind.lower()}.json").read_text()))


def _strict(schema: Any) -> Any:
    """An API server drops fields that a schema does not name, in silence; here they are mistakes."""
    if not isinstance(schema, dict):
        return schema
    strict = {
        name: {key: _strict(value) for key, value in part.items()} if name in NAMED else _strict(part)
        for name, part in schema.items()
    }
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        strict.setdefault("additionalProperties", False)
    return strict


# -- pods


def pods(each: Object) -> Iterator[tuple[str, Object]]:
    """(path, specification) of every pod that an object makes; of a head's, with the autoscaler's container."""
    spec = cluster_spec(each)
    if spec is None:
        if each["kind"] in ("StatefulSet", "Deployment", "Job"):
            yield "spec.template.spec", each["spec"]["template"]["spec"]
        return
    yield "headGroupSpec", spec["headGroupSpec"]["template"]["spec"]
    for group in spec["workerGroupSpecs"]:
        yield group["groupName"], group["template"]["spec"]


def cluster_spec(each: Object) -> Object | None:
    """A Ray cluster's specification, where an object has one."""
    if each["kind"] not in CLUSTER_SPEC:
        return None
    field = CLUSTER_SPEC[each["kind"]]
    return each["spec"][field] if field else each["spec"]


def not_restricted(pod: Object) -> Iterator[str]:
    """Where a pod breaks Kubernetes' Pod Security Standard `restricted`."""
    context = pod.get("securityContext", {})
    if context.get("runAsUser") == 0:
        yield "it runs as root"
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(field):
            yield f"{field} is set"
    for volume in pod.get("volumes", []):
        if kinds := volume.keys() - {"name"} - VOLUMES:
            yield f"volume {volume['name']} is of {kinds}"
    for container in pod.get("initContainers", []) + pod["containers"]:
        yield from (f"{container['name']}: {reason}" for reason in _container(container, context))


def _container(container: Object, pod_context: Object) -> Iterator[str]:
    own = container.get("securityContext", {})
    context = pod_context | own
    if context.get("runAsNonRoot") is not True:
        yield "runAsNonRoot is not set"
    if context.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        yield "it has no seccompProfile"
    if own.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation is not false"
    if own.get("capabilities") != {"drop": ["ALL"]}:
        yield "it does not drop all capabilities"
    if own.get("privileged") or any("hostPort" in port for port in container.get("ports", [])):
        yield "it is privileged, or has a port of the host"


def gpus_unlimited(pod: Object) -> Iterator[str]:
    """Kubernetes counts GPUs by limits, and refuses a request that differs; KubeRay reads limits alone."""
    for container in pod["containers"]:
        resources = container.get("resources", {})
        asked, limit = (resources.get(part, {}).get(GPU) for part in ("requests", "limits"))
        if asked is not None and asked != limit:
            yield f"{container['name']}: {asked} GPUs are requested, and the limit is {limit}"
        for name in ("cpu", "memory"):
            if name not in resources.get("limits", {}):
                yield f"{container['name']}: no limit of {name}, which Ray takes for the node's"


def secrets_in_the_open(pod: Object) -> Iterator[str]:
    for container in pod["containers"]:
        for variable in container.get("env", []):
            if re.search("PASSWORD|TOKEN|SECRET|KEY", variable["name"]) and "secretKeyRef" not in variable.get(
                "valueFrom", {}
            ):
                yield f"{container['name']}: {variable['name']} does not come from a Secret"


# -- Ray clusters


def cluster_problems(spec: Object) -> Iterator[str]:
    auth = spec.get("authOptions", {})
    if auth.get("mode") != "token" or not auth.get("secretName"):
        yield "authOptions: no token, or not from a Secret"
    fault_tolerance = spec.get("gcsFaultToleranceOptions")
    if fault_tolerance is not None:
        reference = fault_tolerance.get("redisPassword", {}).get("valueFrom", {}).get("secretKeyRef", {})
        if not (reference.get("name") and reference.get("key")):
            yield "gcsFaultToleranceOptions: redisPassword does not come from a Secret"
    if spec.get("enableInTreeAutoscaling"):
        context = spec.get("autoscalerOptions", {}).get("securityContext", {})
        pod = spec["headGroupSpec"]["template"]["spec"].get("securityContext", {})
        yield from (f"autoscalerOptions: {reason}" for reason in _container({"securityContext": context}, pod))
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        yield from _ray_start_problems(group)


def _ray_start_problems(group: Object) -> Iterator[str]:
    """What `ray start` is told of a node is what its pod has; a head offers no CPUs."""
    name = group.get("groupName", "head")
    limits = group["template"]["spec"]["containers"][0].get("resources", {}).get("limits", {})
    told = group.get("rayStartParams", {})
    if name == "head" and told.get("num-cpus") != "0":
        yield "head: num-cpus is not 0, so that work is placed on it"
    for parameter, resource in (("num-cpus", "cpu"), ("num-gpus", GPU), ("memory", "memory")):
        if name != "head" and parameter in told and told[parameter] != limits.get(resource):
            yield f"{name}: {parameter} is {told[parameter]}, the limit {limits.get(resource)}"
