"""Hosts on this machine: Linux namespaces with a network, processes, /root, /tmp and an sshd of their own each.

They hang on a bridge in the namespaces of a desk, the host of the person who types. Nothing of it is in the machine's
own network, and all that a host has ends with its first process, which ends with this one: the kernel sees to that."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
NETWORK = "10.77.0"
DESK = f"{NETWORK}.1"
BOOT_S = 30.0
UNSHARE = [
    "setpriv", "--pdeathsig", "KILL",
    "unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc",
]  # fmt: skip
"""What it runs has namespaces of its own, and ends with whoever started it."""


def can_make_hosts() -> bool:
    """Whether the programs are there, and the rights."""
    programs = ("ip", "nsenter", "ps", "rsync", "setpriv", "ssh", "ssh-keygen", "sshd", "unshare")
    if not all(map(shutil.which, programs)):
        return False
    bridge = [*UNSHARE, "ip", "link", "add", "bridge", "type", "bridge"]
    return subprocess.run(bridge, capture_output=True, check=False).returncode == 0


@dataclass
class Host:
    number: int
    folder: Path
    """Its disk: /root and /tmp, and what its console says."""
    first: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    """`unshare`, whose only child is process 1 of the host."""

    @property
    def address(self) -> str:
        return f"{NETWORK}.{self.number}"

    def boot(self, then: str, sees: Sequence[Path]) -> None:
        """Start it: `then` becomes process 1. The root folder stays from boot to boot, /tmp does not. What it `sees` of
        this machine's it does even in folders of its own."""
        shutil.rmtree(self.folder / "tmp", ignore_errors=True)
        name = f"host{self.number}"
        stages = [f"hostname {name}", "mount -t tmpfs none /dev/shm", "mount -t tmpfs none /run", "mkdir /run/sshd"]
        # Where nobody answers, so that an unknown name is so at once; the host's own is as Debian and Ubuntu set it.
        files = {"resolv.conf": "nameserver 127.0.0.1\n", "hosts": f"127.0.0.1 localhost\n127.0.1.1 {name}\n"}
        for file, text in files.items():
            (self.folder / file).write_text(text)
            stages.append(f"mount --bind {self.folder / file} /etc/{file}")
        for name in ("root", "tmp"):
            private = self.folder / name
            private.mkdir(exist_ok=True)
            for path in sees:
                if path.is_relative_to(f"/{name}"):
                    inside = private / path.relative_to(f"/{name}")
                    inside.mkdir(parents=True, exist_ok=True)
                    stages.append(f"mount --bind {shlex.quote(str(path))} {shlex.quote(str(inside))}")
            stages.append(f"mount --rbind {private} /{name}")
        stages += ["ip link set lo up", f"cd && exec {then}"]
        environment = {"PATH": os.environ["PATH"], "HOME": "/root", "LANG": "C.UTF-8"}
        with (self.folder / "console").open("ab") as console:
            self.first = subprocess.Popen(
                [*UNSHARE, "sh", "-ec", "\n".join(stages)],
                env=environment, stdin=subprocess.DEVNULL, stdout=console, stderr=console, start_new_session=True,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        """Of its process 1, as this machine counts."""
        assert self.first is not None
        for _ in range(int(BOOT_S / 0.05)):
            assert self.first.poll() is None, (self.folder / "console").read_text()
            children = psutil.Process(self.first.pid).children()
            if children and children[0].name() not in ("unshare", "sh"):  # it has come to what it is to become
                return children[0].pid
            time.sleep(0.05)
        raise TimeoutError(f"{self.address} did not boot")

    def inside(self, *words: str | Path, folder: Path = Path("/root"), **environment: str) -> list[str]:
        """The command that runs a command on it."""
        variables = [f"{name}={value}" for name, value in (environment | {"HOME": "/root"}).items()]
        enter = ["nsenter", "--target", str(self.pid), "--all", f"--wdns={folder}"]
        return [*enter, "env", *variables, *map(str, words)]

    def run(self, *words: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.inside(*words), text=True, check=True, **options)  # type: ignore[call-overload]

    def ip(self, *words: str) -> None:
        subprocess.run(["nsenter", "--target", str(self.pid), "--net", "ip", *words], check=True)

    def processes(self) -> list[str]:
        """Command lines on it, of whatever it is that runs."""
        return self.run("ps", "-eo", "args=", "-ww", capture_output=True).stdout.splitlines()

    def kill(self) -> None:
        """As when its power fails."""
        if self.first is None:
            return
        # The kernel lets process 1 end when all others on the host have, and unshare ends after it.
        for process in psutil.Process(self.first.pid).children() or [self.first]:
            process.kill()
        self.first.wait()
        self.first = None


@dataclass(frozen=True)
class Room:
    """The desk, and hosts that `ssh` from it reaches as root with `key`."""

    folder: Path
    desk: Host
    hosts: list[Host]

    @property
    def key(self) -> Path:
        return self.folder / "key"

    @property
    def shared(self) -> Path:
        """A folder that all see at the same path, as a network file system."""
        return self.folder / "shared"

    def typed(self, *words: str | Path, **environment: str) -> list[str]:
        """The command that runs a command which a person types at the desk, in the repository, with its environment."""
        path = f"{sys.prefix}/bin:{os.environ['PATH']}"
        return self.desk.inside(*words, folder=ROOT, PATH=path, RAY_AUTH_MODE="token", **environment)

    def boot(self, host: Host) -> None:
        """Power on, and wait until `ssh` gets in."""
        host.boot(f"{shutil.which('sshd')} -D -e -f {self.folder / 'sshd_config'}", _environment())
        self._plug(host)
        options = ["-oStrictHostKeyChecking=no", "-oUserKnownHostsFile=/dev/null", "-oConnectTimeout=1"]
        ssh = self.desk.inside("ssh", "-i", self.key, *options, host.address, "true")
        deadline = time.monotonic() + BOOT_S
        while subprocess.run(ssh, capture_output=True, check=False).returncode:
            assert time.monotonic() < deadline, f"no ssh to {host.address}"
            time.sleep(0.2)

    def cut(self, host: Host) -> None:
        """The power of a host fails: nobody is told, connections just fall silent."""
        self.desk.ip("link", "delete", f"to{host.number}")
        host.kill()

    def _plug(self, host: Host) -> None:
        port = f"to{host.number}"
        veth = ["link", "add", port, "type", "veth", "peer", "name", "eth0"]
        # The same card at every boot: others remember it.
        self.desk.ip(*veth, "address", f"02:00:00:00:00:{host.number:02x}", "netns", str(host.pid))
        self.desk.ip("link", "set", port, "master", "bridge", "up")
        host.ip("address", "add", f"{host.address}/24", "dev", "eth0")
        host.ip("link", "set", "eth0", "up")
        host.ip("route", "add", "default", "via", DESK)  # it leads nowhere: Ray asks the kernel for the way out


def _environment() -> Sequence[Path]:
    """Where this interpreter and its packages are."""
    return list(dict.fromkeys(Path(each) for each in (sys.prefix, sys.base_prefix)))


@contextmanager
def room(count: int) -> Iterator[Room]:
    """So many hosts, on. Its folder is out of /root and /tmp, which hosts have of their own."""
    folder = Path(tempfile.mkdtemp(prefix="hosts-", dir="/var/tmp"))
    machines = [Host(number, folder / str(number)) for number in range(1, count + 2)]
    made = Room(folder, machines[0], machines[1:])
    try:
        made.shared.mkdir()
        for machine in machines:
            machine.folder.mkdir()
        for key in ("key", "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
        (folder / "sshd_config").write_text(
            f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/key.pub\nStrictModes no\nPidFile none\n"
            "PermitRootLogin prohibit-password\nPasswordAuthentication no\n"
        )
        made.desk.boot("bash -c 'sleep infinity & wait'", [ROOT, *_environment()])
        made.desk.ip("link", "add", "bridge", "type", "bridge")
        made.desk.ip("address", "add", f"{DESK}/24", "dev", "bridge")
        made.desk.ip("link", "set", "bridge", "up")
        for host in made.hosts:
            made.boot(host)
        yield made
    finally:
        for machine in machines:
            machine.kill()
        shutil.rmtree(folder)
