"""A PostgreSQL server of its own for a test: Debian's package, on the loopback interface."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from heliostat.hardware import free_port

POSTGRES = Path("/usr/lib/postgresql")
PASSWORD = "a-password-of-the-test"


@contextmanager
def server() -> Iterator[str]:
    """Its address, with a user, who has PASSWORD. It does not run as root: then it is Debian's user `postgres`."""
    (*_, binaries) = sorted(POSTGRES.glob("*/bin"))
    user = "postgres" if os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    try:
        (folder / "password").write_text(PASSWORD)
        if user:
            shutil.chown(folder, user)
            shutil.chown(folder / "password", user)
        words = [
            "--pgdata",
            folder / "data",
            "--username",
            "me",
            "--pwfile",
            folder / "password",
            "--auth",
            "scram-sha-256",
        ]
        subprocess.run(
            [binaries / "initdb", *words, "--no-sync"],
            user=user,
            cwd=folder,
            check=True,
            capture_output=True,
            timeout=60,
        )
        port = free_port()
        process = subprocess.Popen(
            [binaries / "postgres", "-D", folder / "data", "-p", str(port), "-k", folder, "-h", "127.0.0.1", "-F"],
            user=user, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            ready = [binaries / "pg_isready", "-h", "127.0.0.1", "-p", str(port), "-d", "postgres"]
            for _ in range(600):
                if subprocess.run([*ready, "-t", "1"], capture_output=True, check=False).returncode == 0:
                    break
                assert process.poll() is None, "the server ended"
            yield f"postgresql://me@127.0.0.1:{port}/postgres"
        finally:
            process.send_signal(signal.SIGINT)  # ends connections, then itself
            process.wait(timeout=60)
    finally:
        shutil.rmtree(folder)
