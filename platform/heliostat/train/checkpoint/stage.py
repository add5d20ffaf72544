"""A copy of a run's state on the CPU, which training does not touch while it is written out."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._pytree import KeyPath, tree_map_with_path


class Stage:
    """Memory for one copy, taken at the first and kept: new pages cost more than the copying."""

    def __init__(self) -> None:
        self._buffers: dict[KeyPath, torch.Tensor] = {}

    def copy(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state with its tensors' values in this memory; the last copy's are overwritten."""
        devices = set()

        def keep(path: KeyPath, value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return copy.deepcopy(value)
            own = value.to_local() if isinstance(value, DTensor) else value
            buffer = self._buffers.get(path)
            if buffer is None or buffer.shape != own.shape or buffer.dtype != own.dtype:
                # From pinned memory and into it a GPU copies by itself.
                buffer = torch.empty(own.shape, dtype=own.dtype, pin_memory=own.is_cuda)
                self._buffers[path] = buffer
            buffer.copy_(own.detach(), non_blocking=True)
            devices.add(own.device)
            return DTensor(buffer, value._spec, requires_grad=False) if isinstance(value, DTensor) else buffer

        staged: dict[str, Any] = tree_map_with_path(keep, state)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return staged
