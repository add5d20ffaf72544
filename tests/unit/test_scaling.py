"""How many replicas a language model wants, by hand."""

from __future__ import annotations

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from serve.scaling import QUEUED_TOKENS, WAITED_S, ByTokens

DEPLOYMENT = DeploymentID("language_model", "tiny")


def context(requests: float, queued: list[float], waited: list[float]) -> AutoscalingContext:
    """Of as many replicas as have reported."""
    replicas = [ReplicaID(str(number), DEPLOYMENT) for number in range(len(queued))]
    return AutoscalingContext(
        deployment_id=DEPLOYMENT,
        deployment_name=DEPLOYMENT.name,
        app_name=DEPLOYMENT.app_name,
        current_num_replicas=len(replicas),
        target_num_replicas=len(replicas),
        running_replicas=replicas,
        total_num_requests=requests,
        total_queued_requests=0.0,
        aggregated_metrics={
            QUEUED_TOKENS: dict(zip(replicas, queued, strict=True)),
            WAITED_S: dict(zip(replicas, waited, strict=True)),
        },
        raw_metrics=None,
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=8,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=None,
        config=AutoscalingConfig(),
    )


@pytest.mark.parametrize(
    ("requests", "queued", "waited", "replicas"),
    [
        (0, [0], [0], 0),
        (4, [0], [0], 1),
        (5, [0], [0], 2),
        (2, [900], [0], 1),
        (2, [1500], [0], 2),
        (2, [1500, 1600], [0, 0], 4),
        (2, [10, 10], [1.9, 0], 1),  # late is later than the target
        (2, [10, 10], [2.5, 0], 3),
        (2, [10, 10], [60, 0], 4),  # twice as many at once
        (20, [10, 10], [2.5, 0], 5),
    ],
)
def test_by_hand(requests: float, queued: list[float], waited: list[float], replicas: int) -> None:
    policy = ByTokens(ongoing_requests=4, queued_tokens=1000, first_token_s=2)
    assert policy(context(requests, queued, waited)) == (replicas, {})


def test_before_anything_was_reported() -> None:
    policy = ByTokens(ongoing_requests=4, queued_tokens=1000, first_token_s=2)
    assert policy(context(1, [], [])) == (1, {})
