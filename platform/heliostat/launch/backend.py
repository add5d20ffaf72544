"""How the processes of a run find each other."""

from __future__ import annotations

import os
from typing import Any

import psutil
import ray.util
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

INTERFACE = "GLOO_SOCKET_IFNAME"


def torch_config(use_gpu: bool) -> TorchConfig:
    return Reachable(backend="nccl" if use_gpu else "gloo")


class Reachable(TorchConfig):
    """Gloo listens where other machines reach this one. By itself it asks for the host's name, which Debian and Ubuntu
    give the address 127.0.1.1; checkpoints need it beside NCCL, too."""

    @property
    def backend_cls(self) -> type:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_choose_interface)
        super().on_start(worker_group, backend_config)


def _choose_interface() -> None:
    """On each worker: the interface that Ray itself is reached by."""
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            os.environ.setdefault(INTERFACE, name)
