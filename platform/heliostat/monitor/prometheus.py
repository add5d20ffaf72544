"""Prometheus on this machine, which reads the metrics of a Ray cluster's nodes."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import yaml

from heliostat.hardware import cannot_listen
from heliostat.recipe import Refused, write_atomically

HOST = "127.0.0.1"
KEPT = "15d"
"""How long samples are kept."""
STARTS_S = 30.0
ENDS_S = 20.0


def check(port: int) -> None:
    """Raises Refused where Prometheus could not start."""
    if shutil.which("prometheus") is None:
        raise Refused("prometheus", "it is not installed", "sudo apt-get install prometheus")
    if reason := cannot_listen(HOST, port):
        raise Refused(
            "port", f"{HOST}:{port} cannot be used: {reason}", "stop what listens there, or choose another by --port"
        )


def configure(folder: Path, nodes: Path, rules: Path, every_s: float) -> Path:
    """Write Prometheus' configuration to a folder. `nodes`: the file in which Ray lists them; `rules`: in the form of
    the Prometheus operator; `every_s`: between two readings."""
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / "rules.yaml"
    write_atomically(written, yaml.safe_dump(yaml.safe_load(rules.read_text())["spec"]))
    every = f"{round(1000 * every_s)}ms"
    configuration = {
        "global": {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every},
        "rule_files": [str(written.absolute())],
        "scrape_configs": [
            {"job_name": "ray", "file_sd_configs": [{"files": [str(nodes)], "refresh_interval": "10s"}]}
        ],
    }
    file = folder / "prometheus.yaml"
    write_atomically(file, yaml.safe_dump(configuration))
    return file


@contextmanager
def prometheus(folder: Path, configuration: Path, port: int) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Prometheus for the time of the block: its URL, once it answers, and its process. It listens on this machine
    alone, and keeps its samples in the folder. Raises RuntimeError with what it said where it does not start."""
    log = folder / "prometheus.log"
    command = [
        "prometheus",
        f"--config.file={configuration}",
        f"--storage.tsdb.path={folder / 'samples'}",
        f"--storage.tsdb.retention.time={KEPT}",
        f"--web.listen-address={HOST}:{port}",
        "--log.level=warn",
    ]
    with log.open("wb") as said:
        # Not of the terminal's group, so that Ctrl-C reaches it through this process alone.
        process = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
    try:
        url = f"http://{HOST}:{port}"
        _wait_until_ready(url, process, log)
        yield url, process
    finally:
        process.terminate()
        try:
            process.wait(ENDS_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + STARTS_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/-/ready", timeout=1).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    last = (log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
    raise RuntimeError(f"Prometheus does not start: {last}")
