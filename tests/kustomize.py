"""What `kubectl kustomize` prints, for as much of kustomize as deploy/kubernetes uses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]
CLUSTER_WIDE = {"Namespace"}
LOCAL = "config.kubernetes.io/local-config"


def render(folder: Path) -> list[Object]:
    """The objects of a folder's kustomization. Raises ValueError for what this does not know."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    known = {"apiVersion", "kind", "namespace", "resources", "images", "patches", "replacements", "configMapGenerator"}
    if unknown := set(kustomization) - known:
        raise ValueError(f"{folder}: {unknown} are not known here")
    objects: list[Object] = []
    for name in kustomization.get("resources", []):
        path = folder / name
        objects += render(path) if path.is_dir() else load(path.read_text())
    objects += [_config_map(folder, each) for each in kustomization.get("configMapGenerator", [])]
    for patch in kustomization.get("patches", []):
        for each in _selected(objects, patch["target"]):
            for operation in yaml.safe_load(patch["patch"]):
                _apply(each, operation)
    for each in objects:
        if each["kind"] not in CLUSTER_WIDE and "namespace" in kustomization:
            each["metadata"]["namespace"] = kustomization["namespace"]
    for image in kustomization.get("images", []):
        _rename(objects, image["name"], f"{image['newName']}:{image['newTag']}")
    for replacement in kustomization.get("replacements", []):
        source = dict(replacement["source"])
        value = _at(_only(_selected(objects, {"kind": source["kind"]})), source["fieldPath"].split("."))
        for target in replacement["targets"]:
            for each in _selected(objects, target["select"]):
                for path in target["fieldPaths"]:
                    *parents, last = path.split(".")
                    _at(each, parents)[last] = json.loads(json.dumps(value))
    return [each for each in objects if each["metadata"].get("annotations", {}).get(LOCAL) != "true"]


def _config_map(folder: Path, generator: Object) -> Object:
    """Of files, under the name that is given and no other."""
    options = generator["options"]
    if set(generator) != {"name", "files", "options"} or not options["disableNameSuffixHash"]:
        raise ValueError(f"{folder}: {generator['name']} is of a kind not known here")
    metadata = {"name": generator["name"], "labels": options["labels"]}
    data = {name: (folder / name).read_text() for name in generator["files"]}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def load(text: str) -> list[Object]:
    """The documents of a YAML file; what aliases repeat in it is copied."""
    return [json.loads(json.dumps(each)) for each in yaml.safe_load_all(text)]


def _selected(objects: list[Object], select: Object) -> list[Object]:
    return [each for each in objects if each["kind"] == select["kind"]]


def _only(objects: list[Object]) -> Object:
    (one,) = objects
    return one


def _at(value: Any, path: list[str]) -> Any:
    for part in path:
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value


def _apply(each: Object, operation: Object) -> None:
    """One operation of a JSON patch (RFC 6902)."""
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
    place = _at(each, parents)
    if operation["op"] not in ("add", "replace") or (operation["op"] == "replace" and last not in place):
        raise ValueError(f"cannot {operation['op']} {operation['path']}")
    place[last] = operation["value"]


def _rename(value: Any, name: str, image: str) -> None:
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _rename(inner, name, image)
    if isinstance(value, dict):
        for container in value.get("containers", []) + value.get("initContainers", []):
            if container.get("image") == name:
                container["image"] = image
