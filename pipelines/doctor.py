"""`python -m pipelines.doctor [cluster.yaml|RECIPE|serve.yaml …] [--field value …]`: what is wrong, before it costs
anything. Without a file: this machine, and cluster.yaml where it is one."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from heliostat.doctor import Findings, Problem, examine, examine_machine
from heliostat.models.describe import configuration
from heliostat.recipe import Recipe, Refused
from pipelines.answer import answer
from pipelines.recipes import find_recipe, is_model_config

CLUSTER_FILE = "cluster.yaml"


def parse(words: list[str]) -> tuple[dict[str, Recipe | None], dict[str, Any]]:
    """What is to be examined by name (None: a file that is read), and overrides of recipes. Raises Refused."""
    subjects: dict[str, Recipe | None] = {}
    overrides: dict[str, Any] = {}
    rest = iter(words)
    for word in rest:
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            given = value if equals else next(rest, None)
            if given is None:
                raise Refused(name, "no value is given", f"--{name} VALUE")
            overrides[name.replace("-", "_")] = _value(given)
        else:
            path = Path(word).expanduser()
            read = path.suffix in (".yaml", ".yml") or (path.suffix == ".json" and not is_model_config(path))
            subjects[word] = None if read else find_recipe(word)
    return subjects, overrides


def _value(text: str) -> Any:
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except ValueError:
        return text


def run(words: list[str]) -> dict[str, Any]:
    subjects, overrides = parse(words)
    problems: list[Problem] = []
    if not subjects:
        problems += examine_machine()
        subjects |= {CLUSTER_FILE: None} if Path(CLUSTER_FILE).is_file() else {}
    found = examine(subjects, configuration, overrides)
    findings = Findings(problems + found.problems, found.usd_per_hour)
    show(findings)
    return {
        "status": "problems" if findings.problems else "done",
        "examined": list(subjects) or ["this machine"],
        "problems": [dataclasses.asdict(each) for each in findings.problems],
        "usd_per_hour": findings.usd_per_hour,
    }


def show(findings: Findings) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True)
    for file, price in findings.usd_per_hour.items():
        console.print(
            f"{file}: ${price['idle']:.2f} an hour idle, ${price['most']:.2f} at its largest (on demand, list price)"
        )
    if not findings.problems:
        console.print("nothing is wrong")
        return
    table = Table()
    for title in ("where", "field", "problem", "what to do"):
        table.add_column(title, overflow="fold")
    for each in findings.problems:
        where = each.file or "this machine"
        table.add_row(f"{where}:{each.line}" if each.line else where, each.field, each.problem, each.fix)
    console.print(table)


def main(words: list[str] | None = None) -> int:
    return answer("doctor", lambda: run(sys.argv[1:] if words is None else words))


if __name__ == "__main__":
    sys.exit(main())
