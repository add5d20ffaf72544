"""The versions on both sides of a cluster file: what is installed here, and what the nodes would get."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from packaging.utils import InvalidWheelFilename, parse_wheel_filename

from heliostat import installed
from heliostat.doctor.document import Document, Problem, Where
from heliostat.doctor.nodes import NodeType

COMPARED = ("ray", "torch", "transformers")
"""What must be the same on both sides: the first talks, and the others' objects travel."""
PYTHON = installed.python_version()
IMAGE = re.compile(
    r"(?:.*/)?rayproject/ray(?:-ml|-llm)?(?::(?P<version>\d+\.\d+\.\d+)?(?P<moving>latest|nightly)?"
    r"(?:-py(?P<major>\d)(?P<minor>\d+))?(?:-(?P<kind>gpu|cpu|cu\d+\S*))?(?P<rest>\S*))?$"
)
ARM_FAMILIES = re.compile(r"^(?:[a-z]+\d+g[a-z]*|g5g|t4g|a1)\.|^(?:t2a|c4a|a4x)-")
"""Instance types of AWS and Google Cloud with ARM processors."""
CUDA_TAG = re.compile(r"cu(?:da)?(\d{2})\d")


@dataclass(frozen=True)
class Wanted:
    """A package that a command installs."""

    where: Where
    name: str
    version: str
    """With its local part, `2.13.0+cu130`; empty: any."""


def check_software(document: Document, types: list[NodeType]) -> Iterator[Problem]:
    pythons: dict[str, Where] = {}
    cuda: tuple[str, str] | None = None
    for where, image in _images(document):
        found = IMAGE.match(image)
        if not found:
            continue  # somebody's own: what is in it cannot be told
        yield from _check_image(document, where, image, found, types)
        if found["minor"]:
            pythons[f"{found['major']}.{found['minor']}"] = where
        if tag := CUDA_TAG.match(found["kind"] or ""):
            cuda = tag[1], image
    for where, version in _interpreters(document):
        pythons[version] = where
    for version, where in pythons.items():
        if version != PYTHON:
            yield document.problem(
                where, f"Python {version} there, {PYTHON} here: neither can read what the other pickles",
                f"use Python {PYTHON} there",
            )  # fmt: skip
    for wanted in _wanted(document):
        yield from _check_version(document, wanted)
        yield from _check_cuda(document, wanted, any(each.gpus for each in _run_by(wanted.where, types)), cuda)
    yield from _check_wheels(document, next(iter(pythons), PYTHON), types)
    yield from _check_files(document)


def _images(document: Document) -> Iterator[tuple[Where, str]]:
    for field in ("image", "head_image", "worker_image"):
        if image := document.get("docker", field):
            yield ("docker", field), str(image)
    for name in document.get("available_node_types") or {}:
        if image := document.get("available_node_types", name, "docker", "worker_image"):
            yield ("available_node_types", name, "docker", "worker_image"), str(image)


def _check_image(
    document: Document, where: Where, image: str, found: re.Match[str], types: list[NodeType]
) -> Iterator[Problem]:
    here = installed.version("ray")
    if not found["version"]:
        yield document.problem(
            where, f"{image} is another Ray tomorrow", f"name a version: {image.partition(':')[0]}:{here}"
        )
    elif here and found["version"] != here:
        yield document.problem(where, f"Ray {found['version']} there, {here} here", f"take the image of {here}")
    if found["kind"] in (None, "cpu") and found["version"]:
        on_it = [each for each in types if each.gpus and (len(where) == 2 or where[1] == each.name)]
        if on_it and where[-1] != "head_image":
            yield document.problem(
                where, f"{image} has no CUDA, and {on_it[0].name} has GPUs", "take the image's -gpu tag"
            )


def _commands(document: Document) -> Iterator[tuple[Where, list[str]]]:
    """What is run on nodes, simple command by simple command, as words."""
    fields = ["initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"]
    places: list[Where] = [(field,) for field in fields]
    for name in document.get("available_node_types") or {}:
        places.append(("available_node_types", name, "worker_setup_commands"))
    for place in places:
        for index, command in enumerate(document.get(*place) or ()):
            for part in re.split(r"&&|\|\||;|\n", str(command)):
                try:
                    yield (*place, index), shlex.split(part)
                except ValueError:
                    continue


def _run_by(where: Where, types: list[NodeType]) -> list[NodeType]:
    """The types of nodes that run a command."""
    if where[0] == "available_node_types":
        return [each for each in types if each.name == where[1]]
    return [each for each in types if each.is_head] if where[0] == "head_setup_commands" else types


def _interpreters(document: Document) -> Iterator[tuple[Where, str]]:
    for where, words in _commands(document):
        line = " ".join(words)
        if found := re.search(r"python(\d\.\d+) -m venv|conda create .*python=(\d\.\d+)|--python[= ](\d\.\d+)", line):
            yield where, next(filter(None, found.groups()))


def _installs(document: Document) -> Iterator[tuple[Where, list[str]]]:
    """The arguments of each `pip install`."""
    for where, words in _commands(document):
        if "install" in words and any("pip" in word for word in words[: words.index("install")]):
            yield where, words[words.index("install") + 1 :]


def _wanted(document: Document) -> Iterator[Wanted]:
    for where, words in _installs(document):
        index = " ".join(words)
        for word in words:
            if found := _requirement(word):
                name, version = found
                # An index of one kind of wheels stands for their local part.
                if name == "torch" and (kind := re.search(r"download\.pytorch\.org/whl/(cpu|cu\d+)", index)):
                    version = version.partition("+")[0] + f"+{kind[1]}"
                yield Wanted(where, name, version)
        for file in _requirement_files(document, words):
            if file.is_file():
                for line in file.read_text(encoding="utf-8").splitlines():
                    if found := _requirement(line.strip()):
                        yield Wanted(where, *found)


def _requirement(text: str) -> tuple[str, str] | None:
    found = re.match(r"(ray|torch|transformers)(?:\[[\w,-]*\])?(?:\s*==\s*([\w.+]+)|\s*$|\s*[<>~!;])", text)
    return (found[1], found[2] or "") if found else None


def _requirement_files(document: Document, words: list[str]) -> Iterator[Path]:
    """Files after `-r`, where they lie here."""
    for flag, remote in pairwise(words):
        if flag in ("-r", "--requirement") and (local := _local(document, remote)):
            yield local


def _local(document: Document, remote: str) -> Path | None:
    """Where a file on a node comes from; None for one that is not sent."""
    mounts: dict[str, Any] = document.get("file_mounts") or {}
    for there, here in mounts.items():
        if remote == there or remote.startswith(f"{there.rstrip('/')}/"):
            return Path(str(here)).expanduser() / remote.removeprefix(there).lstrip("/")
    return None


def _check_version(document: Document, wanted: Wanted) -> Iterator[Problem]:
    here = (installed.version(wanted.name) or "").partition("+")[0]
    there = wanted.version.partition("+")[0]
    if not there:
        yield document.problem(
            wanted.where,
            f"{wanted.name} is not pinned: the nodes get the newest",
            f"write {wanted.name}=={here}" if here else "pin it",
        )
    elif here and there != here:
        yield document.problem(
            wanted.where, f"{wanted.name} {there} there, {here} here", f"install {wanted.name}=={here} there"
        )


def _check_cuda(document: Document, wanted: Wanted, has_gpus: bool, cuda: tuple[str, str] | None) -> Iterator[Problem]:
    kind = wanted.version.partition("+")[2]
    if wanted.name != "torch" or not kind:
        return
    if kind == "cpu" and has_gpus:
        yield document.problem(
            wanted.where, "torch's CPU wheel on nodes with GPUs, which it cannot use", "install it from PyPI's index"
        )
    elif cuda and (tag := CUDA_TAG.match(kind)) and tag[1] != cuda[0]:
        yield document.problem(
            wanted.where, f"torch's wheel is for CUDA {tag[1]}, {cuda[1]} has CUDA {cuda[0]}",
            f"take the wheel or the image of CUDA {min(tag[1], cuda[0])}",
        )  # fmt: skip


def _check_wheels(document: Document, python: str, types: list[NodeType]) -> Iterator[Problem]:
    arm = [each for each in types if ARM_FAMILIES.match(each.instance_type)]
    other = [each for each in types if each.instance_type and each not in arm]
    for where, words in _installs(document):
        for word in (word for word in words if word.endswith(".whl")):
            try:
                name, version, _, tags = parse_wheel_filename(word.rpartition("/")[2].replace("%2B", "+"))
            except InvalidWheelFilename as error:
                yield document.problem(where, str(error), "check its name")
                continue
            pythons = {tag.interpreter for tag in tags if tag.interpreter.startswith("cp") and tag.abi != "abi3"}
            if pythons and f"cp{python.replace('.', '')}" not in pythons:
                yield document.problem(
                    where, f"the wheel is for {', '.join(sorted(pythons))}, the nodes have Python {python}",
                    f"take the wheel of cp{python.replace('.', '')}",
                )  # fmt: skip
            platforms = " ".join(tag.platform for tag in tags)
            wrong = other if "aarch64" in platforms else arm if "x86_64" in platforms else []
            if wrong:
                kind = "ARM" if wrong is other else "x86-64"
                yield document.problem(
                    where, f"the wheel is for {kind}, {wrong[0].name} ({wrong[0].instance_type}) is not",
                    "take the wheel of its processor",
                )  # fmt: skip
            if name in COMPARED:
                yield from _check_version(document, Wanted(where, name, str(version)))


def _check_files(document: Document) -> Iterator[Problem]:
    for where, words in _installs(document):
        for file in _requirement_files(document, words):
            if not file.is_file():
                yield document.problem(where, f"{file} does not exist here, so it is not sent", "check the path")
