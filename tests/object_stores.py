"""Object stores on this machine: servers that speak the protocols of S3 and of Google's."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.fs
import pytest
from moto.server import ThreadedMotoServer

from heliostat.hardware import free_port


def until_it_answers(port: int, within_s: float = 60) -> None:
    end = time.monotonic() + within_s
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < end, f"nothing answers at port {port}"
            time.sleep(0.1)


@contextmanager
def s3(patch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a bucket `reviews`, with a place for the path."""
    patch.setenv("AWS_ACCESS_KEY_ID", "anyone")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
    server = ThreadedMotoServer("127.0.0.1", free_port(), verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {"endpoint_override": f"{host}:{port}", "scheme": "http", "region": "us-east-1"}
    filesystem = pyarrow.fs.S3FileSystem(**options, allow_bucket_creation=True)
    filesystem.create_dir("reviews")
    yield "s3://reviews{}?" + "&".join(f"{key}={value}" for key, value in options.items())
    server.stop()


@contextmanager
def gs(patch: pytest.MonkeyPatch) -> Iterator[str]:
    """As `s3`."""
    port = free_port()
    # A process of its own: pyarrow keeps Python's lock while it waits for the store.
    command = [str(Path(sys.executable).with_name("gcp-storage-emulator")), "start", "--in-memory"]
    server = subprocess.Popen(
        [*command, "--host=127.0.0.1", f"--port={port}", "--default-bucket=reviews"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until_it_answers(port)
        endpoint = f"127.0.0.1:{port}"
        yield f"gs://anonymous@reviews{{}}?endpoint_override={endpoint}&scheme=http&retry_limit_seconds=10"
    finally:
        server.terminate()
        server.wait()
