"""Bundles on a node's own disk, for replicas that would else read theirs over a network each time that one starts."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path

from heliostat.models import bundle as bundles
from heliostat.recipe import Refused

KEPT = 4
"""Copies in a folder: those that were asked for last."""


def staged(path: Path, folder: Path, anew: bool = False) -> Path:
    """A bundle's copy in a folder of this node, named by its digest, made where it is not there. `anew`: also where it
    is. Raises Refused for a bundle that is not whole, and for a folder that cannot hold it."""
    copy = folder / bundles.read(path, verify_files=False).digest
    if anew:
        shutil.rmtree(copy, ignore_errors=True)
    beside = folder / f".{copy.name}.{os.getpid()}"
    try:
        if not copy.is_dir():
            shutil.copytree(path, beside)
            bundles.read(beside)
            with contextlib.suppress(OSError):  # another process may have been faster
                beside.rename(copy)
        os.utime(copy)
        # Whatever else somebody keeps there is not touched.
        copies = [each for each in folder.iterdir() if re.fullmatch("[0-9a-f]{64}", each.name)]
        copies.sort(key=lambda each: each.stat().st_mtime)
    except OSError as error:
        raise Refused("deploy.stage_folder", f"{path} cannot be copied to {folder}: {error}", "name another") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    for each in copies[:-KEPT]:
        shutil.rmtree(each, ignore_errors=True)
    return copy
