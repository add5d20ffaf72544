"""Keys, tokens and passwords do not go into a record."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

HIDDEN = "•••"
NAMES = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)
"""Of environment variables whose values are hidden wherever they turn up."""
SHORTEST = 8
"""Shorter values are words that stand everywhere."""
PATTERNS = [
    re.compile(r"(?<=://)(?P<kept>[^\s:/@\"']*:)[^\s/@\"']+(?=@)"),
    re.compile(r"(?P<kept>\bBearer\s+)[\w.~+/=-]{8,}", re.IGNORECASE),
    re.compile(
        r"(?P<kept>(?<![a-z])(?:password|passwd|secret|api[_-]?key|access[_-]?key|auth[_-]?token)[\"']?\s*[=:]\s*[\"']?)"
        r"[^\s\"',;&]{4,}",
        re.IGNORECASE,
    ),
    re.compile(r"(?P<kept>)\b(?:hf_|sk-|gh[pousr]_|github_pat_|glpat-|AKIA|ASIA)[\w-]{16,}"),
]
"""What is a secret by its form; `kept` stays."""


def hider(environment: Mapping[str, str] | None = None, home: Path | None = None) -> Callable[[str], str]:
    """A function that hides secrets in a text: the environment's, Ray's token, and what looks like one."""
    variables = os.environ if environment is None else environment
    values = {value for name, value in variables.items() if NAMES.search(name) and not os.path.exists(value)}
    with suppress(OSError, UnicodeDecodeError):
        values.add(((home or Path.home()) / ".ray" / "auth_token").read_text(encoding="utf-8").strip())
    # The longest first: one may hold another.
    longest = sorted((re.escape(value) for value in values if len(value) >= SHORTEST), key=len, reverse=True)
    known = re.compile("|".join(longest)) if longest else None

    def hide(text: str) -> str:
        if known is not None:
            text = known.sub(HIDDEN, text)
        for pattern in PATTERNS:
            text = pattern.sub(rf"\g<kept>{HIDDEN}", text)
        return text

    return hide
