"""deploy/prometheus: each alert by promtool, its runbook, and the metrics that it asks for."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import needs

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests" / "data" / "rules_test.yaml"


def spec() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "deploy" / "prometheus" / "rules.yaml").read_text())["spec"]


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for group in spec()["groups"] for rule in group["rules"] if "alert" in rule}


def promtool(folder: Path, rules: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    (folder / "rules.yaml").write_text(yaml.safe_dump(rules))
    (folder / TESTS.name).write_text(TESTS.read_text())
    return subprocess.run(
        ["promtool", "test", "rules", TESTS.name], cwd=folder, capture_output=True, text=True, check=False
    )


@needs.promtool
def test_alerts_are_raised_by_what_they_are_for(tmp_path: Path) -> None:
    done = promtool(tmp_path, spec())
    assert done.returncode == 0, done.stdout + done.stderr
    lint = ["promtool", "check", "rules", "--lint=all", "--lint-fatal", "rules.yaml"]
    assert subprocess.run(lint, cwd=tmp_path, capture_output=True, check=False).returncode == 0


@needs.promtool
@pytest.mark.parametrize("name", alerts())
def test_no_alert_is_overlooked(name: str, tmp_path: Path) -> None:
    """The tests miss each alert that is not raised."""
    rules = spec()
    for group in rules["groups"]:
        group["rules"] = [
            {**rule, "expr": "vector(0) > 1"} if rule.get("alert") == name else rule for rule in group["rules"]
        ]
    done = promtool(tmp_path, rules)
    assert done.returncode != 0
    assert f"alertname: {name}" in done.stdout + done.stderr


@pytest.mark.parametrize("name", alerts())
def test_alert_has_a_runbook(name: str) -> None:
    page, _, anchor = alerts()[name]["annotations"]["runbook"].partition("#")
    headings = re.findall(r"^#+ (.*)", (ROOT / page).read_text(), re.MULTILINE)
    assert anchor == name.lower()
    assert name in headings
    assert alerts()[name]["labels"]["severity"] in ("page", "ticket")
