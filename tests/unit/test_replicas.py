"""What replicas are started with."""

from __future__ import annotations

from pathlib import Path

import pytest

from heliostat.recipe import Deploy
from serve.application import SPINNING, scaled


class Nothing:
    pass


@pytest.mark.parametrize(
    ("cpus", "threads", "spins"),
    [(0.1, 1, False), (4.0, 1, False), (1.0, 2, False), (2.0, 2, True), (4.0, 2, True)],
)
def test_threads_spin_where_each_has_a_processor(cpus: float, threads: int, spins: bool) -> None:
    settings = Deploy(cpus_per_replica=cpus, threads_per_replica=threads)
    app = scaled(Nothing, "nothing", Path("bundle"), "1", settings)
    options = app._bound_deployment.ray_actor_options
    assert options["num_cpus"] == cpus
    assert options["runtime_env"]["env_vars"] == (SPINNING if spins else {})
