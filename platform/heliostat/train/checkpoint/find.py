"""Which checkpoints there are, and which of them to trust."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from heliostat.place import Place
from heliostat.recipe import Recipe, Refused

VERSION = 2
"""Of the manifest. 1 had the sizes of files and no digests."""
FOLDER = "checkpoints"
"""In the run's own folder."""
MANIFEST = "manifest.json"
PREFIX = "step-"


@dataclass(frozen=True)
class Found:
    """A complete checkpoint."""

    place: Place
    manifest: dict[str, Any]

    @property
    def path(self) -> Path:
        return Path(self.place.path)

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def trainer(self) -> dict[str, Any]:
        """What the loop remembers in it."""
        found: dict[str, Any] = self.manifest["trainer"]
        return found


@dataclass(frozen=True)
class Rejected:
    """A checkpoint that was complete once, and why it is not used."""

    step: int
    reason: str


def folder_of(recipe: Recipe, run_dir: Path) -> Place:
    """Where a run's checkpoints lie."""
    storage = recipe.checkpoint.storage
    return Place.at(storage) / run_dir.name if storage else Place.at(run_dir / FOLDER)


def folder_name(step: int) -> str:
    return f"{PREFIX}{step:08d}"


def look(folder: Place | Path | str) -> list[Found | Rejected]:
    """All that were published, oldest first, after a look at their files' sizes."""
    folder = folder if isinstance(folder, Place) else Place.at(folder)
    seen = [
        _look(folder / name, int(name.removeprefix(PREFIX)), sizes)
        for name, sizes in sorted(folder.folders().items())
        if name.startswith(PREFIX)
    ]
    return [each for each in seen if each is not None]


def _look(place: Place, step: int, sizes: dict[str, int]) -> Found | Rejected | None:
    if MANIFEST not in sizes:
        return None
    try:
        manifest = json.loads(place.read(MANIFEST))
        version, files = manifest["version"], manifest["files"]
    except (ValueError, KeyError, TypeError):
        return Rejected(step, "its manifest cannot be read")
    if version > VERSION:
        raise Refused("resume", f"{place} was written by a newer Heliostat", "upgrade this one")
    for file, said in files.items():
        expected = said if version == 1 else said["bytes"]
        if file not in sizes:
            return Rejected(step, f"{file} is missing")
        if sizes[file] != expected:
            return Rejected(step, f"{file} has {sizes[file]} bytes of {expected}")
    return Found(place, manifest)


def complete(folder: Place | Path | str) -> list[Found]:
    """The complete checkpoints in a folder, oldest first. One whose files are missing or cut short is left out."""
    return [each for each in look(folder) if isinstance(each, Found)]


def newest(folder: Place | Path | str) -> Found | None:
    found = complete(folder)
    return found[-1] if found else None


def choose(folder: Place) -> tuple[Found | None, list[Rejected]]:
    """The newest checkpoint whose files are, byte for byte, what was written, and the newer ones that are not.

    Collective: every rank must call it, in the same order."""
    seen: list[Any] = [None]
    if _rank() == 0:
        try:
            seen = [[(each.place.path, each.manifest) if isinstance(each, Found) else each for each in look(folder)]]
        except Refused as error:
            seen = [error]
    if dist.is_initialized():  # one rank's view: peers might see another folder's state
        dist.broadcast_object_list(seen, src=0)
    if isinstance(seen[0], Refused):
        raise seen[0]
    rejected = []
    for each in reversed(seen[0]):
        if isinstance(each, Rejected):
            rejected.append(each)
            continue
        found = Found(Place(folder.filesystem, each[0]), each[1])
        reason = _altered(found)
        if not reason:
            return found, rejected
        rejected.append(Rejected(found.step, reason))
    return None, rejected


def _altered(found: Found) -> str:
    """Which file is not what was written, or an empty string; each rank reads its share of the files."""
    if found.manifest["version"] == 1:
        return ""
    world = dist.get_world_size() if dist.is_initialized() else 1
    reason = ""
    for name, said in sorted(found.manifest["files"].items())[_rank() :: world]:
        try:
            if found.place.digest(name) != said["sha256"]:
                reason = f"{name} is not what was written"
        except OSError as error:
            reason = f"{name} cannot be read: {error}"
    if world == 1:
        return reason
    reasons: list[Any] = [None] * world
    dist.all_gather_object(reasons, reason)
    return next(filter(None, reasons), "")


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
