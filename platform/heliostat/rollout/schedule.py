"""How much of the traffic a candidate gets, step by step, until it is decided about."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal, get_args

from heliostat.recipe import Refused, Rollout, nearest
from heliostat.rollout.compare import Answers, Comparison, Lots, Pairs

Strategy = Literal["shadow", "canary", "blue_green"]
Decision = Literal["promoted", "rolled_back", "undecided"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)
LOTS: dict[Strategy, Lots] = {"shadow": "pairs", "canary": "drawn", "blue_green": "in_turn"}


@dataclass(frozen=True)
class Traffic:
    share: float
    """Of the requests, what the candidate answers."""
    copied: bool = False
    """Whether the candidate gets a copy of every other request; its answer is only compared."""


def parse_strategy(text: str) -> Strategy:
    for strategy in get_args(Strategy):
        if strategy == text:
            return strategy
    raise Refused("strategy", f"no strategy {text!r}", nearest(text, list(STRATEGIES)) or ", ".join(STRATEGIES))


def lot(salt: str, key: str) -> float:
    """A number in [0, 1) that is the same for the same key: below the candidate's share, the request is the
    candidate's. As the share grows, those who had the candidate keep it."""
    return int.from_bytes(hashlib.blake2b(f"{salt}\0{key}".encode(), digest_size=7).digest()) / 2**56


class Schedule:
    """The steps of one rollout: the traffic to send, and in the end the decision."""

    def __init__(self, settings: Rollout, strategy: Strategy, judged: bool = False) -> None:
        self.settings = settings
        self.comparison = Comparison(settings, LOTS[strategy], judged)
        self.steps = {
            "shadow": [Traffic(0.0, copied=True)],
            "canary": [Traffic(share) for share in settings.steps],
            "blue_green": [Traffic(0.0), Traffic(1.0)],
        }[strategy]
        self.step, self.requests_of_step, self.requests = 0, 0, 0
        self.decision: Decision | None = None

    @property
    def traffic(self) -> Traffic:
        """To send now: the steps' while there are any, then the winner's."""
        if self.decision is None:
            return self.steps[self.step]
        return Traffic(1.0 if self.decision == "promoted" else 0.0)

    def add(self, answers: Answers | Pairs) -> None:
        """Take in what was answered, and go on to the next step or to the decision where that is due."""
        paired = self.comparison.lots == "pairs"
        if self.decision is not None or isinstance(answers, Pairs) != paired:  # as before the first copy was made
            return
        self.comparison.add(answers)
        self.requests += len(answers.failed)
        self.requests_of_step += len(answers.failed)
        last = self.step + 1 == len(self.steps)
        if self.comparison.harmful():
            self.decision = "rolled_back"
        elif self.requests_of_step >= self.settings.requests_per_step and not last and self._may_go_on():
            self.step, self.requests_of_step = self.step + 1, 0
            if self.comparison.lots == "drawn":
                self.comparison.start()
        elif self.requests_of_step >= self.settings.requests_per_step and last and self.comparison.harmless():
            self.decision = "promoted"
        elif self.requests >= self.settings.max_requests:
            self.decision = "undecided"

    def _may_go_on(self) -> bool:
        """What answers in turn is compared with how it was before, which must be known well."""
        known = self.requests >= self.settings.max_requests / 3 or self.comparison.baseline_known()
        return self.comparison.lots != "in_turn" or known

    def give_up(self) -> None:
        """The time is over."""
        self.decision = self.decision or "undecided"

    def evidence(self) -> dict[str, Any]:
        """What the decision rests on."""
        traffic = self.steps[self.step]
        reached = {"step": self.step + 1, "steps": len(self.steps), "share": traffic.share}
        return {"requests": self.requests} | reached | self.comparison.evidence()
