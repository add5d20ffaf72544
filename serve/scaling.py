"""How many replicas a language model wants. Requests alone do not tell: one with a long prompt is the work of a hundred
with short ones."""

# The controller of Ray Serve gets this module by value and asks the class: it imports nothing of ours.
from __future__ import annotations

import math
from typing import Any

QUEUED_TOKENS = "queued_tokens"
"""What a replica reports: tokens of the prompts whose answers have not begun."""
WAITED_S = "waited_s"
"""And how long the oldest of these requests has waited."""


class ByTokens:
    """The most that ongoing requests, queued tokens, and the time to the first token ask for, each by its target for a
    replica. Waiting asks for more replicas in proportion, at most twice as many at once, and never for fewer."""

    def __init__(self, ongoing_requests: float, queued_tokens: float, first_token_s: float) -> None:
        self.ongoing_requests, self.queued_tokens, self.first_token_s = ongoing_requests, queued_tokens, first_token_s

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """For Ray Serve, with what it knows of the deployment (`ray.serve.config.AutoscalingContext`): the number of
        replicas, which it bounds and delays, and no state to keep."""
        reported = context.aggregated_metrics or {}
        queued, waited = (list(reported.get(name, {}).values()) for name in (QUEUED_TOKENS, WAITED_S))
        wanted = max(context.total_num_requests / self.ongoing_requests, sum(queued) / self.queued_tokens)
        late = max(waited, default=0.0) / self.first_token_s
        if late > 1:
            wanted = max(wanted, context.current_num_replicas * min(late, 2.0))
        return math.ceil(wanted), {}
