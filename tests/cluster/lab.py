"""A cluster file for hosts of our own, and what a person types at the desk beside them."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.hosts import ROOT, Room, room

DASHBOARD_PORT = 8265
WAIT_S = 600.0
PORTS = "--dashboard-agent-grpc-port=52366 --runtime-env-agent-port=52367 --metrics-export-port=52368"
"""Ray takes a node for lost whose agents need more than 15 s to say which ports they have; of these it knows."""
SUBMIT = ["ray", "job", "submit", "--runtime-env", "runtime_env.yaml", "--working-dir", "."]


@dataclass(frozen=True)
class Typed:
    """A command, and the file that gets all it says."""

    process: subprocess.Popen[bytes]
    output: Path

    def said(self) -> str:
        return self.output.read_text(errors="replace").replace("\r", "")

    def wait_for(self, condition: Callable[[], object], what: str, within_s: float = WAIT_S) -> None:
        """For what it brings about. Fails with the last that it said where it failed itself, or took too long."""
        deadline = time.monotonic() + within_s
        while not condition():
            assert not self.process.poll(), f"waited for {what}; it ended, and said last:\n{self.said()[-4000:]}"
            assert time.monotonic() < deadline, f"waited in vain for {what}; said last:\n{self.said()[-4000:]}"
            time.sleep(0.5)

    def done(self) -> str:
        self.wait_for(lambda: self.process.poll() == 0, "the end")
        return self.said()


@dataclass(frozen=True)
class Lab:
    room: Room
    file: Path
    """Of the cluster."""

    def start(self, *words: str | Path, **environment: str) -> Typed:
        environment |= {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{DASHBOARD_PORT}"}
        with tempfile.NamedTemporaryFile(dir=self.room.folder, prefix="typed-", delete=False) as output:
            command = self.room.typed(*words, **environment)
            process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
        return Typed(process, Path(output.name))

    def type(self, *words: str | Path) -> str:
        return self.start(*words).done()

    def up(self) -> None:
        """Until the head runs. Ray gives its own processes half a minute to start, and others may have the processors
        meanwhile: then it is typed again, as a person would."""
        deadline = time.monotonic() + WAIT_S
        while (typed := self.start("ray", "up", "--yes", self.file)).process.wait():
            assert time.monotonic() < deadline, typed.said()[-4000:]

    def wait_for_nodes(self) -> None:
        """Until Ray runs on all hosts."""
        deadline, nodes = time.monotonic() + WAIT_S, 0
        while nodes < len(self.room.hosts):
            said = self.type("ray", "exec", self.file, "ray status")
            active = said.partition("Active:\n")[2].partition("Pending:")[0]
            nodes = sum(map(int, re.findall(r"^ (\d+) ", active, re.MULTILINE)))
            assert time.monotonic() < deadline, said

    @contextmanager
    def tunnel(self) -> Iterator[None]:
        """Jobs can be submitted for the time of the block."""
        tunnel = self.start("ray", "dashboard", self.file)
        probe = self.room.typed("bash", "-c", f"exec 3<>/dev/tcp/127.0.0.1/{DASHBOARD_PORT}")
        try:
            tunnel.wait_for(lambda: subprocess.run(probe, capture_output=True, check=False).returncode == 0, "a tunnel")
            yield
        finally:
            tunnel.process.terminate()
            tunnel.process.wait()


def derived(made: Room) -> dict[str, Any]:
    """cluster.local.yaml with these hosts for its machines. They have no network to install from: where the environment
    is installed they take the one that runs this. The head drives, and the other hosts have room for a worker each."""
    config = yaml.safe_load((ROOT / "cluster.local.yaml").read_text())
    head, *workers = (host.address for host in made.hosts)
    config["provider"] |= {"head_ip": head, "worker_ips": workers}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(made.key)}
    *installing, shell = config["setup_commands"]
    assert all("install" in command or "uv venv" in command for command in installing)
    config["setup_commands"] = [f"ln -sfn {sys.prefix} ~/venv", shell]
    for role, cpus in (("head", 0), ("worker", 1)):
        *stop, start = config[f"{role}_start_ray_commands"]
        start = start.replace("ray start", f"ray start --num-cpus={cpus} {PORTS}")
        # One host after the other: Ray gives a node 30 s to start, and all of them share the cores of this machine.
        start = f"flock -o {made.shared / 'starting'} env {start}"
        config[f"{role}_start_ray_commands"] = [*stop, start]
    return config


@contextmanager
def lab(count: int = 3) -> Iterator[Lab]:
    """So many hosts, on, and a file that says so; nobody has typed `ray up` yet."""
    with room(count) as made:
        file = made.folder / "cluster.yaml"
        file.write_text(yaml.safe_dump(derived(made)))
        lab = Lab(made, file)
        lab.type("ray", "get-auth-token", "--generate")
        yield lab
