"""A client that takes its time, to hold what it can of a server."""

from __future__ import annotations

import socket
import time
from urllib.parse import urlsplit


def trickle(url: str, path: str, headers: dict[str, str]) -> tuple[bytes, float]:
    """What comes back to a POST whose body comes byte by byte, until the connection is closed or a whole answer is
    there; and the seconds that took."""
    parts = urlsplit(url)
    lines = [f"POST {path} HTTP/1.1", f"host: {parts.netloc}", "content-type: application/json", "content-length: 1000"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    begun, found = time.monotonic(), b""
    with socket.create_connection((parts.hostname, parts.port), timeout=0.2) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        while time.monotonic() - begun < 30 and not found.endswith(b"}"):
            try:
                connection.sendall(b" ")
                received = connection.recv(65536)
            except TimeoutError:
                continue
            except OSError:  # closed
                break
            if not received:
                break
            found += received
    return found, time.monotonic() - begun
