"""How many floating-point operations training takes by the model's own arithmetic, for throughput as a share of what a
machine could do (model FLOPs utilisation: Chowdhery et al. 2022, PaLM, arXiv:2204.02311, appendix B). What is computed
again to save memory does not count."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

PEAK_FLOPS = {"H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12}
"""Dense bfloat16 FLOP/s by what the device's name holds, from NVIDIA's data sheets; the first that fits."""
MATRIX = 1024


def flops_per_token(model: Any, length: float) -> float:
    """Of the forward and the backward pass of a transformer, 2 a weight and token and pass: one forward, one for the
    gradient of what went in, one for that of a weight that is trained. `length`: of a row, in tokens; attention takes
    the whole of it, causal or not."""
    config = model.config.get_text_config()
    weights = 0.0
    for module in model.modules():
        share, matrices = 0.0, list(module.parameters(recurse=False))
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":  # GPT-2's
            share = 1.0
        elif (experts := getattr(module, "num_experts", 0)) and any(each.ndim == 3 for each in matrices):
            share = config.num_experts_per_tok / experts  # those that a token is sent to
        weights += share * sum((6 if each.requires_grad else 4) * each.numel() for each in matrices if each.ndim > 1)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return weights + 12.0 * config.num_hidden_layers * width * length


def published_peak_flops(device_name: str) -> float | None:
    """None for what is not in the table."""
    return next((flops for part, flops in PEAK_FLOPS.items() if part in device_name), None)


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """What a device can do in a second, and how that is known: `published` for GPUs of the table, in bfloat16, else
    `measured`, with all the threads this process has."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        published = published_peak_flops(torch.cuda.get_device_name(device))
        if published is not None:
            return published, "published"
    one = torch.randn(MATRIX, MATRIX, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        _wait(device)
        begun = time.perf_counter()
        one @ one
        _wait(device)
        best = min(best, time.perf_counter() - begun)
    return 2 * MATRIX**3 / best, "measured"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
