"""What became of the requests that a router sent to two versions, and what there is to compare in it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from heliostat.rollout.compare import Answers, Pairs

Judge = Callable[[Any, Any], float | None]
"""Of a request's and its answer's JSON: how good the answer is, from 0 to 1, or None."""


@dataclass
class Outcome:
    failed: bool = False
    refused: bool = False
    """The answer was that the client is mistaken."""
    latency_s: float = math.nan
    """Until the answer began. NaN where there was none, or a refusal, which takes no time."""
    body: bytes = b""
    """Of the answer, where it was not a stream."""

    def beside(self, stable: Outcome | None) -> Outcome:
        """A refusal is the client's mistake where the old version refuses, too, and else a failure."""
        answered = stable is not None and not math.isnan(stable.latency_s)
        return replace(self, failed=self.failed or (self.refused and answered))


@dataclass
class Seen:
    """One request: what the version answered whose turn it was, or both of them where one got a copy."""

    share: float
    key: int = 0
    stable: Outcome | None = None
    candidate: Outcome | None = None
    body: bytes = b""
    """Of the request, where answers are to be judged."""


def compared(seen: list[Seen], judge: Judge | None) -> Iterator[Answers | Pairs]:
    """What was seen, as arrays."""
    pairs = [(each, [each.stable, each.candidate]) for each in seen if each.stable and each.candidate]
    single = [(each, each.candidate or each.stable) for each in seen if not (each.stable and each.candidate)]
    if pairs:
        yield Pairs(
            np.array([[one.failed for one in both if one] for _, both in pairs]),
            np.array([[one.latency_s for one in both if one] for _, both in pairs]),
            np.array([[_score(each, one, judge) for one in both if one] for each, both in pairs]),
        )
    if single:
        yield Answers(
            candidate=np.array([each.candidate is not None for each, _ in single]),
            share=np.array([each.share for each, _ in single]),
            failed=np.array([one.failed for _, one in single if one]),
            latency_s=np.array([one.latency_s for _, one in single if one]),
            score=np.array([_score(each, one, judge) for each, one in single if one]),
            key=np.array([each.key for each, _ in single], np.uint64),
        )


def _score(seen: Seen, outcome: Outcome, judge: Judge | None) -> float:
    if judge is None or outcome.failed or not (seen.body and outcome.body):
        return math.nan
    try:
        request, answer = json.loads(seen.body), json.loads(outcome.body)
    except ValueError:
        return math.nan
    found = judge(request, answer)
    return math.nan if found is None else min(max(float(found), 0.0), 1.0)
