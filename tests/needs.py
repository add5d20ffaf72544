"""Tests that need a system package skip without it, and say which command installs it."""

from __future__ import annotations

import shutil

import pytest

from heliostat.data.packaged import FASHION
from tests.cluster.hosts import can_make_hosts
from tests.postgres import POSTGRES


def _needs(package: str, there: bool) -> pytest.MarkDecorator:
    command = f"sudo apt-get install {package}"
    return pytest.mark.skipif(not there, reason=f"{package} is not installed: {command}, or run `make test` as root")


chromium = _needs("chromium", shutil.which("chromium") is not None)
postgres = _needs("postgresql", any(POSTGRES.glob("*/bin/initdb")))
ps = _needs("procps", shutil.which("ps") is not None)
hosts = pytest.mark.skipif(
    not can_make_hosts(),
    reason="hosts are made of namespaces: root (CAP_SYS_ADMIN, CAP_NET_ADMIN), and sudo apt-get install iproute2 "
    "openssh-client openssh-server procps rsync util-linux, or run `make test-slow` as root",
)
fashion = _needs("dataset-fashion-mnist", FASHION.exists())
promtool = _needs("prometheus", shutil.which("promtool") is not None)
