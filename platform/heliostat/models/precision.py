"""In what precision a device computes."""

from __future__ import annotations

import torch

from heliostat.hardware import this_machine


def computes_in_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether matrix products are made in bfloat16. `precision`: a recipe's; `auto` takes bfloat16 where the device
    has instructions for it. (Without them, a processor takes up to fifty times as long as in float32.)"""
    if precision != "auto":
        return precision == "bfloat16"
    return torch.cuda.is_bf16_supported() if device.type == "cuda" else this_machine().bfloat16
