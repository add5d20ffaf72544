"""Asking a Prometheus that a test has started."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import httpx


class Prometheus:
    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}/api/v1"

    def answers(self) -> bool:
        with suppress(httpx.HTTPError):
            return bool(self.now("vector(1)"))
        return False

    def now(self, query: str) -> list[tuple[dict[str, str], float]]:
        """(labels, value) of each series of an instant query."""
        found = self._ask("query", {"query": query})
        return [(each["metric"], float(each["value"][1])) for each in found]

    def numbers(self, query: str, begun: float, ended: float, step_s: float = 1.0) -> list[float]:
        """All that a query gives between two times (Unix), but what is not a number."""
        found = self._ask("query_range", {"query": query, "start": begun, "end": ended, "step": step_s})
        values = [float(value) for each in found for _, value in each["values"]]
        return [value for value in values if math.isfinite(value)]

    def _ask(self, what: str, form: dict[str, Any]) -> list[dict[str, Any]]:
        answer = httpx.post(f"{self.url}/{what}", data=form, timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]["result"]
