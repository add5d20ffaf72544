"""What a cluster could grow to, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from heliostat.placement import Node, at_largest

HEAD = {"resources": {"CPU": 0}, "max_workers": 0}
LARGE = {"resources": {"CPU": 48, "GPU": 4}, "max_workers": 2}
SMALL = {"resources": {"CPU": 16}, "max_workers": 8}


@pytest.mark.parametrize(
    ("max_workers", "types", "there", "num_nodes", "most"),
    [
        (3, {"head": HEAD, "large": LARGE, "small": SMALL}, Node(0, 0), 1, Node(2 * 48 + 16, 8)),
        (3, {"head": HEAD, "large": LARGE}, Node(0, 0), 1, Node(96, 8)),
        (3, {"head": HEAD, "large": LARGE, "small": SMALL}, Node(96, 8), 3, Node(96 + 48, 8 + 4)),  # two are there
        (2, {"head": HEAD, "large": LARGE}, Node(96, 8), 3, Node(96, 8)),
        (0, {"head": HEAD, "large": LARGE}, Node(8, 1), 1, Node(8, 1)),
        # Machines that are there already, as long as one of them has not joined.
        (2, {"local": {"resources": {}, "max_workers": 2}}, Node(16, 1), 2, Node(math.inf, math.inf)),
        (2, {"local": {"resources": {}, "max_workers": 2}}, Node(16, 1), 3, Node(16, 1)),
    ],
)
def test_at_largest(max_workers: int, types: dict[str, Any], there: Node, num_nodes: int, most: Node) -> None:
    assert at_largest({"max_workers": max_workers, "available_node_types": types}, there, num_nodes) == most
