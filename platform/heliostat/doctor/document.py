"""Files that people write, with the line of everything in them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from heliostat.recipe import nearest

Where = tuple[str | int, ...]


@dataclass(frozen=True)
class Problem:
    file: str | None
    """As it was named; None: of this machine."""
    line: int | None
    field: str
    """Dotted path of what is wrong."""
    problem: str
    fix: str


@dataclass(frozen=True)
class Document:
    file: str
    data: Any
    lines: dict[Where, int] = field(default_factory=dict)
    """Of keys and of a list's items, from 1."""
    repeated: list[Where] = field(default_factory=list)
    """Keys that a mapping has twice: the last of them counts."""

    def line(self, where: Where) -> int | None:
        """Of what is there, or of the nearest around it that the file has."""
        for end in range(len(where), -1, -1):
            if where[:end] in self.lines:
                return self.lines[where[:end]]
        return None

    def problem(self, where: Where, problem: str, fix: str = "") -> Problem:
        return Problem(self.file, self.line(where), ".".join(map(str, where)), problem, fix)

    def get(self, *where: str | int) -> Any:
        """None where there is nothing."""
        value = self.data
        for part in where:
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                return None
        return value

    def repetitions(self) -> Iterator[Problem]:
        for where in self.repeated:
            yield self.problem(where, f"{where[-1]} stands here a second time, and only this one counts", "keep one")

    def unknown(self, where: Where, names: list[str]) -> Iterator[Problem]:
        """Of the mapping at `where`: keys that are none of `names`."""
        for key in self.get(*where) or {}:
            if key not in names:
                yield self.problem((*where, key), f"there is no field {key!r}", nearest(str(key), names))


def read(path: Path, file: str) -> Document | Problem:
    """YAML, or JSON by the name. `file`: what problems call it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        return Problem(file, None, "", f"cannot be read: {reason}", "check the path")
    if path.suffix == ".json":
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            return Problem(file, error.lineno, "", f"is not JSON: {error.msg}", "")
        # JSON is YAML but for tabs, which in JSON no string can hold.
        text = text.replace("\t", " ")
    else:
        try:
            data = yaml.load(text, yaml.CSafeLoader)
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else None
            return Problem(file, line, "", f"is not YAML: {error.problem}", "")
        except yaml.YAMLError as error:
            return Problem(file, None, "", f"is not YAML: {error}", "")
    lines: dict[Where, int] = {(): 1}
    repeated: list[Where] = []
    try:
        root = yaml.compose(text, yaml.CSafeLoader)
    except yaml.YAMLError:  # of JSON that YAML cannot spell: without lines
        root = None
    if root is not None:
        _walk(root, (), lines, repeated)
    return Document(file, data, lines, repeated)


def _walk(node: yaml.Node, where: Where, lines: dict[Where, int], repeated: list[Where]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*where, key.value)
            if inner in lines:
                repeated.append(inner)
            lines[inner] = key.start_mark.line + 1
            _walk(value, inner, lines, repeated)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[*where, index] = value.start_mark.line + 1
            _walk(value, (*where, index), lines, repeated)


def against_schema(document: Document, schema: dict[str, Any]) -> tuple[list[Problem], bool]:
    """What a JSON schema finds, and whether any of it is worse than a field too many: then nothing in the document can
    be relied on."""
    from jsonschema import Draft7Validator

    problems: list[Problem] = []
    malformed = False
    for error in Draft7Validator(schema).iter_errors(document.data):
        where: Where = tuple(error.absolute_path)
        if error.validator == "additionalProperties":
            problems += document.unknown(where, list(error.schema["properties"]))
            continue
        malformed = True
        if error.validator == "required":
            (missing,) = re.findall(r"^'(\w+)' is a required", error.message)
            problems.append(document.problem((*where, missing), "is missing", "add it"))
        else:
            problems.append(document.problem(where, error.message))
    return problems, malformed
