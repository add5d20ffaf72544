"""What tests of several folders share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray cluster of one node, started for the first test that asks. Its CPUs are slots, not processors."""
    import ray

    environment = {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'platform'}", "OMP_NUM_THREADS": "1"}
    ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": environment})
    yield
    ray.shutdown()
