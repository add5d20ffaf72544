"""Tests that need a system package skip without it, and say which command installs it."""

from __future__ import annotations

import shutil

import pytest

from heliostat.data.packaged import FASHION
from tests.postgres import POSTGRES


def _needs(package: str, there: bool) -> pytest.MarkDecorator:
    command = f"sudo apt-get install {package}"
    return pytest.mark.skipif(not there, reason=f"{package} is not installed: {command}, or run `make test` as root")


chromium = _needs("chromium", shutil.which("chromium") is not None)
postgres = _needs("postgresql", any(POSTGRES.glob("*/bin/initdb")))
ps = _needs("procps", shutil.which("ps") is not None)
fashion = _needs("dataset-fashion-mnist", FASHION.exists())
promtool = _needs("prometheus", shutil.which("promtool") is not None)
