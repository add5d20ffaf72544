"""What a checkpoint holds of a model and its optimizer, and how it gets back into them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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

from heliostat.train.checkpoint.find import Found
from heliostat.train.checkpoint.streams import Streams
from heliostat.train.optim import MovingAverage


def capture(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, average: MovingAverage | None
) -> dict[str, Any]:
    """Model, optimizer and averaged weights by name; tensors are the live ones where they can be.

    Collective: every rank must call it, in the same order."""
    return _in_one_piece(_state(model, optimizer, average))


@contextmanager
def alone_is_fine() -> Iterator[None]:
    """PyTorch warns whoever saves or loads in a process of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def load(
    found: Found, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, average: MovingAverage | None
) -> None:
    """Read a checkpoint into the model (and optimizer), whatever layout wrote it.

    Collective: every rank must call it, in the same order."""
    own = _state(model, optimizer, average)
    state = _in_one_piece(own)
    reader = dcp.FileSystemReader(found.place.path)
    reader.fs, reader.path = Streams(found.place), found.place.path
    with alone_is_fine():
        dcp.load(state, storage_reader=reader, no_dist=not dist.is_initialized())
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
