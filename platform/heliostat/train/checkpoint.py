"""Sharded checkpoints through torch.distributed.checkpoint, published by a manifest that is written last.

FOLDER/step-00000120/*.distcp  .metadata  manifest.json
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._pytree import tree_map

from heliostat.recipe import Refused, write_atomically
from heliostat.train.optim import MovingAverage

CHECKPOINT_VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Found:
    """A complete checkpoint."""

    path: Path
    manifest: dict[str, Any]

    @property
    def trainer(self) -> dict[str, Any]:
        return self.manifest["trainer"]


def save(
    folder: Path,
    step: int,
    trainer: dict[str, Any],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    average: MovingAverage | None,
    keep: int | None = None,
) -> Path:
    """Write a checkpoint; it exists once its manifest does. On an error nothing of it is left.

    Collective: every rank must call it, in the same order."""
    path = folder / f"step-{step:08d}"
    first = not dist.is_initialized() or dist.get_rank() == 0
    if first:
        shutil.rmtree(path, ignore_errors=True)  # what an earlier attempt left half-written
        path.mkdir(parents=True)
    _barrier()
    try:
        dcp.save(
            _in_one_piece(_state(model, optimizer, average)), checkpoint_id=path, no_dist=not dist.is_initialized()
        )
        if first:
            sizes = {file.name: file.stat().st_size for file in path.iterdir()}
            manifest = {"version": CHECKPOINT_VERSION, "step": step, "trainer": trainer, "files": sizes}
            write_atomically(path / MANIFEST, json.dumps(manifest))
    except BaseException:
        if first:
            shutil.rmtree(path, ignore_errors=True)
        raise
    if first and keep is not None:
        for old in complete(folder)[:-keep]:
            shutil.rmtree(old.path, ignore_errors=True)
    return path


def load(
    found: Found, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, average: MovingAverage | None
) -> None:
    """Read a checkpoint into the model (and optimizer), whatever layout wrote it.

    Collective: every rank must call it, in the same order."""
    own = _state(model, optimizer, average)
    state = _in_one_piece(own)
    dcp.load(state, checkpoint_id=found.path, no_dist=not dist.is_initialized())
    state = tree_map(_as_laid_out, state, own)
    set_state_dict(
        model,
        optimizer if optimizer is not None else [],
        model_state_dict=state["model"],
        optim_state_dict=state.get("optimizer", {}),
        options=OPTIONS,
    )
    for name, tensor in own.get("average", {}).items():
        if state["average"][name] is not tensor:
            tensor.copy_(state["average"][name])


def _in_one_piece(state: dict[str, Any]) -> dict[str, Any]:
    """The state as PyTorch's checkpoints can hold it: they take a local shard for one piece of the whole, and a slice
    of packed matrices (gate and up) is two.

    Collective: every rank must call it, in the same order."""

    def convert(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        dims = [getattr(placement, "dim", None) for placement in value.placements]
        # With another shard of the same dimension it says in which order the two were cut, which they do know.
        placements = [
            Shard(each.dim) if isinstance(each, _StridedShard) and dims.count(each.dim) == 1 else each
            for each in value.placements
        ]
        return value if placements == list(value.placements) else value.redistribute(placements=placements)

    return tree_map(convert, state)


def _as_laid_out(value: Any, own: Any) -> Any:
    """What was loaded, in the placements of what it is for."""
    if value is own or not isinstance(value, DTensor):
        return value
    return value.redistribute(placements=own.placements)


# Flat names, so that ranks with different parameters (pipeline stages) write one state.
OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


def _state(model: Any, optimizer: Any, average: MovingAverage | None) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer if optimizer is not None else [], options=OPTIONS)
    state: dict[str, Any] = {"model": model_state}
    if optimizer is not None:
        state["optimizer"] = optimizer_state
    if average is not None:
        state["average"] = average.state_dict()
    return state


def complete(folder: Path) -> list[Found]:
    """The complete checkpoints in a folder, oldest first. One whose files are missing or cut short is left out."""
    found = []
    for path in sorted(folder.glob("step-*")):
        manifest_path = path / MANIFEST
        if not manifest_path.is_file():
            continue
        manifest = json.loads(manifest_path.read_text())
        if manifest["version"] > CHECKPOINT_VERSION:
            raise Refused("resume", f"{path} was written by a newer Heliostat", "upgrade this one")
        sizes = {name: (path / name).stat().st_size if (path / name).is_file() else -1 for name in manifest["files"]}
        if sizes == manifest["files"]:
            found.append(Found(path, manifest))
    return found


def newest(folder: Path) -> Found | None:
    found = complete(folder)
    return found[-1] if found else None


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
