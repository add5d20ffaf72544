"""What every job with a recipe does: read it and its overrides, refuse early, and answer."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import getpass
import json
import os
import platform as python_platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import ValidationError

import heliostat
from heliostat.hardware import this_machine
from heliostat.installed import version
from heliostat.launch.tune import STUDY_FILE
from heliostat.place import Place
from heliostat.recipe import Recipe, Refused, build, field_paths, load, nearest, refusal, sections
from heliostat.record import Recording
from pipelines.answer import answer
from pipelines.recipes import BUILT_IN, find_recipe

RECORDED = ("ray", "torch", "transformers")
"""Packages whose versions a job's record has."""


@dataclass(frozen=True)
class Options:
    run_name: str = ""
    """Folder of this run below STORAGE/runs. Empty: made from the recipe, the job and the time."""
    resume: str = ""
    """`last` (the newest run of this recipe) or the path of a run to go on with."""
    address: str = ""
    """A Ray cluster to run on. Empty: the one this job was submitted to, else one started on this machine."""
    bundle: str = ""
    """evaluate, register, deploy, predict, drift: a bundle's folder. Empty: the recipe's champion, else its newest
    run's."""
    input: str = ""
    """predict: a Parquet, CSV or JSONL source of rows."""
    keep: bool = False
    """lifecycle, deploy, rollout: leave the endpoint up on a cluster that outlives the job (`make stop` ends it).
    drift: run on that cluster."""
    fresh: bool = False
    """lifecycle: do stages again though their inputs have not changed."""
    layouts: str = ""
    """prove: `fsdp=2,tensor=2;pipeline=2,schedule=gpipe` …"""
    workers: int = 2
    """prove, drill: processes of each layout (or run); what a layout does not take is filled up by replication."""
    faults: str = ""
    """drill: any of `kill,hang,nan,disk_full,truncate`. Empty: all of them."""
    to: str = ""
    """rollout: the new version, a bundle's folder."""
    strategy: str = "canary"
    """rollout: `shadow` (it gets copies, and answers nobody), `canary` (a growing share of the requests), or
    `blue_green` (all of them at once)."""
    auto: bool = False
    """tune: search a ready-made space for the recipe's task, beside what `tune.space` says, and try its baseline."""
    full: bool = False
    """lifecycle: without regard to time: a longer search, no frozen layers, twice the epochs."""
    since: str = ""
    """drift: from when on served rows are compared, `24h` or `7d` ago or a date. Empty: all that are kept."""
    every_s: float = 0.0
    """drift: look again so often, and tell Prometheus, until Ctrl-C. 0: look once."""
    on_drift: Literal["report", "retrain"] = "report"
    """drift: what to do about it, beside saying so. `retrain`: the lifecycle again, where there are new rows."""


@dataclass(frozen=True)
class Arguments:
    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    options: Annotated[Options, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class Job:
    name: str
    recipe: Recipe
    options: Options
    run_dir: Path


def _json_field() -> tyro.constructors.ConstructorRegistry:
    """Fields that are dictionaries are given as JSON."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def _(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
        if info.type is not dict and getattr(info.type, "__origin__", None) is not dict:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="JSON",
            instance_from_str=lambda words: json.loads(words[0]),
            is_instance=lambda value: isinstance(value, dict),
            str_from_instance=lambda value: [_dump(value)],
        )

    return registry


def _dump(value: dict[str, Any]) -> str:
    return json.dumps(value, default=lambda item: item.model_dump())


def parse(words: list[str], job: str = "X") -> tuple[Recipe, Options]:
    """The recipe with the command line's overrides. Raises Refused naming field, reason and the nearest right name."""
    recipe, words = _base(words)
    options = dataclasses.fields(Options)
    names = field_paths() + [option.name for option in options]
    others = ["help", *(f"no_{option.name}" for option in options if option.type == "bool")]
    for word in words:
        name = word.removeprefix("--").partition("=")[0].replace("-", "_")
        if word.startswith("--") and name not in (*names, *others):
            raise Refused(name, "no such field in a recipe", nearest(name, names))

    def refuse(event: Any) -> None:
        raise _refusal(event)

    from tyro._errors import on_parse_error

    try:
        with on_parse_error(refuse):
            parsed = tyro.cli(
                Arguments,
                args=words,
                prog=f"python -m pipelines.{job}",
                default=Arguments(recipe, Options()),
                registry=_json_field(),
            )
    except ValidationError as error:
        raise refusal(error) from error
    # tyro builds section by section; this checks the whole.
    return build(parsed.recipe.model_dump(mode="json")), parsed.options


def _base(words: list[str]) -> tuple[Recipe, list[str]]:
    """The recipe that is named, and the other words."""
    words = list(words)
    if words and not words[0].startswith("-"):
        recipe = find_recipe(words.pop(0))
    elif "--recipe" in words[:-1]:
        at = words.index("--recipe")
        recipe = load(Path(words[at + 1]).expanduser())
        del words[at : at + 2]
    elif {"-h", "--help"} & set(words):
        recipe = find_recipe("sentiment")
    else:
        raise Refused(
            "recipe", "no recipe is named", f"there are: {', '.join(BUILT_IN)}; or --recipe FILE, or module:function"
        )
    return recipe, words


def _refusal(event: Any) -> Refused:
    """tyro's parse error as field, reason and suggestion."""
    argument = getattr(event, "argument", None)
    field = argument.lowered.name_or_flags[0].lstrip("-").replace("-", "_") if argument is not None else "arguments"
    choices = getattr(event, "choices", ())
    message = str(
        getattr(event, "message", "") or f"got {getattr(event, 'value', '') or getattr(event, 'tokens', '')!r}"
    )
    if found := re.match(r"\d+ validation errors? for (\w+)\n(?:([\w.]+)\n)?\s+(.*?) \[type=", message):
        section, leaf, message = found.groups()
        prefix = next((name for name, kind in sections(Recipe).items() if kind.__name__ == section), "")
        field = ".".join(part for part in (prefix, leaf) if part) or "recipe"
    return Refused(field, message.removeprefix("Value error, "), f"one of {', '.join(choices)}" if choices else "")


def unread(name: str, words: list[str]) -> int | None:
    """None where a job can read its words; else its exit code, once it has said what is wrong. Needs none of a job's
    own imports."""
    with contextlib.suppress(Exception):
        parse(words, name)
        return None
    return answer(name, lambda: {"recipe": parse(words, name)})  # fails again, and is told of


def main(name: str, body: Callable[[Job], dict[str, Any]], words: list[str] | None = None) -> int:
    """Run a job; returns its exit code: 0 done, 1 failure, 2 refused input, 130 interrupted."""
    run_dir: Path | None = None
    record: Recording | None = None

    def run() -> dict[str, Any]:
        nonlocal run_dir, record
        given = sys.argv[1:] if words is None else words
        recipe, options = parse(given, name)
        run_dir = _run_dir(name, recipe, options)
        if recipe.record.max_bytes:
            if recipe.record_storage:
                Place.at(recipe.record_storage, "record.storage")  # refuses
            begun = _facts(name, given, recipe)
            record = Recording(run_dir, recipe.record_storage, recipe.record.max_bytes, begun)
        try:
            return body(Job(name, recipe, options, run_dir))
        except Refused:
            if record is not None:
                record.discard()
            raise

    def ended(answer: dict[str, Any]) -> None:
        if record is not None:
            record.end(status=answer["status"], seconds=answer["seconds"], error=answer.get("error"))

    return answer(name, run, lambda: run_dir, ended)


def _facts(name: str, words: list[str], recipe: Recipe) -> dict[str, Any]:
    """What a record says of a job as it begins: who runs what, on what."""
    base, now = _base(words)[0].model_dump(mode="json"), recipe.model_dump(mode="json")
    versions = {"python": python_platform.python_version()} | {package: version(package) for package in RECORDED}
    return {
        "job": name,
        "words": words,
        "user": _user(),
        "folder": os.getcwd(),
        "versions": versions | {"heliostat": heliostat.__version__},
        "machine": dataclasses.asdict(this_machine()) | {"system": python_platform.platform()},
        "recipe": now,
        "changed": {path: [old, new] for path, old, new in _differences(base, now) if old != new},
    }


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return str(os.getuid())


def _differences(base: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Every field of a recipe, as it was and as it is."""
    for path in field_paths():
        old, new = (functools.reduce(lambda node, part: node[part], path.split("."), tree) for tree in (base, now))
        yield path, old, new


def _run_dir(name: str, recipe: Recipe, options: Options) -> Path:
    """Where the run writes; made by the first who writes there."""
    runs = recipe.storage_path / "runs"
    if options.resume == "last":
        # Runs carry the time in their names' end and their recipe's name in front.
        candidates = sorted(
            (path for path in runs.glob(f"{recipe.name}-*") if _resumable(path)),
            key=lambda p: p.stat().st_mtime,
        )
        if not candidates:
            raise Refused("resume", f"no run of {recipe.name} in {runs} has a checkpoint", "start one without --resume")
        return candidates[-1]
    if options.resume:
        path = Path(options.resume).expanduser().absolute()
        if not _resumable(path):
            raise Refused("resume", f"{path} is not a run's folder with checkpoints", "name a folder in STORAGE/runs")
        return path
    run_name = options.run_name or f"{recipe.name}-{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    if run_name != Path(run_name).name:
        raise Refused("run_name", f"{run_name!r} is not a folder's name")
    return runs / run_name


def _resumable(path: Path) -> bool:
    """Whether a run's folder has checkpoints or a search's study, or says that they are elsewhere."""
    if (path / "checkpoints").is_dir() or (path / STUDY_FILE).is_file():
        return True
    if not (path / "recipe.json").is_file():
        return False
    recipe = load(path / "recipe.json")
    return bool(recipe.checkpoint.storage or recipe.tune.storage)
