"""What tests of several folders share."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where HELIOSTAT_NO_SKIP is set, as CI does, a test that skips has failed."""
    report = yield
    if os.environ.get("HELIOSTAT_NO_SKIP") and report.skipped and isinstance(report.longrepr, tuple):
        report.outcome, report.longrepr = "failed", f"{report.nodeid} may not skip here. {report.longrepr[-1]}"
    return report


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray cluster of one node, started for the first test that asks. Its CPUs are slots, not processors."""
    import ray

    environment = {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'platform'}", "OMP_NUM_THREADS": "1"}
    ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": environment})
    yield
    ray.shutdown()
