"""Lists of what happened in a run, one JSON object a line, that outlive the process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def note(file: Path, record: dict[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")


def read_notes(file: Path) -> list[dict[str, Any]]:
    """Empty where nothing was noted."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
