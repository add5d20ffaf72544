"""Low-rank adapters side by side on one model: each token of a forward pass goes through the one that it belongs to.

Shapes: T tokens of a pass, K inputs and N outputs of a module, R rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear

from heliostat.models.weights import weight_files
from heliostat.recipe import Refused

FOLDER = "adapter"
"""Where a bundle holds the adapter by itself."""
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
"""How near a sum of weights must come to the merged ones: they may have been merged on another processor."""
IDLE = {"_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"}
"""What may differ between the configurations of one model."""


@dataclass(frozen=True, eq=False)
class Adapter:
    factors: dict[str, tuple[Tensor, Tensor]]
    """By module: A (R, K) and B (N, R)."""
    scale: float
    """alpha / rank"""
    transposed: bool
    """Whether the adapted modules hold their matrices as (K, N)."""

    def to(self, like: Tensor) -> Adapter:
        """On its device, in its type."""
        return replace(self, factors={name: (a.to(like), b.to(like)) for name, (a, b) in self.factors.items()})

    def delta(self, module: str) -> Tensor:
        """What it adds to a module's weight."""
        a_RK, b_NR = self.factors[module]
        return (b_NR @ a_RK * self.scale).T if self.transposed else b_NR @ a_RK * self.scale


def read_adapter(bundle: Path, field: str) -> Adapter:
    """The adapter of a bundle that was trained with one. Raises Refused, naming the `field`, for a bundle without, and
    for one that has more than low-rank factors."""
    folder = bundle / FOLDER
    if not folder.is_dir():
        raise Refused(field, f"{bundle} was not trained with an adapter", "name one that was, by model.lora.rank")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    factors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        path = name.removeprefix("base_model.model.").removesuffix(".weight")
        module, _, factor = path.rpartition(".")
        if factor not in ("lora_A", "lora_B"):
            raise Refused(field, f"{bundle} also trained {path}, which an adapter cannot add", "deploy it by itself")
        factors.setdefault(module, {})[factor] = tensor
    pairs = {module: (both["lora_A"], both["lora_B"]) for module, both in factors.items()}
    return Adapter(pairs, config["lora_alpha"] / config["r"], bool(config["fan_in_fan_out"]))


def check_base(base: Path, bundle: Path, field: str) -> None:
    """Raise Refused, naming the `field`, unless the weights of a bundle are those of `base` with the bundle's adapter
    added: then it was trained on them, and changed nothing else."""
    adapter, command = read_adapter(bundle, field), "deploy the bundle that it was trained on"
    if _config(base) != _config(bundle):
        raise Refused(field, f"{bundle} has another configuration than {base}", command)
    with ExitStack() as stack:
        before, after = (dict(_tensors(stack, path)) for path in (base, bundle))
        for name in sorted(before.keys() | after.keys() | {f"{module}.weight" for module in adapter.factors}):
            module = name.removesuffix(".weight")
            fits = name in before and name in after
            if fits and module in adapter.factors:
                expected = before[name].get_tensor(name) + adapter.delta(module)
                fits = torch.allclose(after[name].get_tensor(name), expected, **CLOSE)
            elif fits:
                fits = torch.equal(before[name].get_tensor(name), after[name].get_tensor(name))
            if not fits:
                raise Refused(field, f"{bundle} was trained on other weights than {base}: see {name}", command)


def _config(bundle: Path) -> dict[str, Any]:
    fields = transformers.AutoConfig.from_pretrained(bundle, trust_remote_code=False).to_dict()
    return {name: value for name, value in fields.items() if name not in IDLE and "drop" not in name}


def _tensors(stack: ExitStack, bundle: Path) -> Iterator[tuple[str, Any]]:
    """Each tensor's name, and the open file that has it."""
    for file in weight_files(str(bundle)):
        opened = stack.enter_context(safe_open(file, framework="pt"))
        yield from ((name, opened) for name in opened.keys())  # noqa: SIM118


# -- a pass

_pass: ContextVar[tuple[int, list[tuple[Adapter, Tensor]]] | None] = ContextVar("pass", default=None)
"""Of the forward pass that this thread is about to make: its tokens, and each adapter with the places of its tokens."""


def attach(model: Any, adapters: Sequence[Adapter]) -> None:
    """Have a model's passes go through adapters where `begin` says so; all else is as it was."""
    for module in sorted({module for adapter in adapters for module in adapter.factors}):
        model.get_submodule(module).register_forward_hook(partial(_add, module))


def begin(spans: Sequence[tuple[Adapter | None, int]]) -> None:
    """This thread's next passes have the tokens of these requests, one behind the other: each one's adapter, if it has
    one, and how many tokens."""
    places: dict[Adapter, list[int]] = {}
    first = 0
    for adapter, length in spans:
        if adapter is not None:
            places.setdefault(adapter, []).extend(range(first, first + length))
        first += length
    _pass.set((first, [(adapter, _on_device(adapter, each)) for adapter, each in places.items()]) if places else None)


def _on_device(adapter: Adapter, places: list[int]) -> Tensor:
    return torch.tensor(places, device=next(iter(adapter.factors.values()))[0].device)


@contextmanager
def through(adapter: Adapter | None, length: int) -> Iterator[None]:
    """The passes of this block have `length` tokens of one request."""
    before = _pass.get()
    begin([(adapter, length)])
    try:
        yield
    finally:
        _pass.set(before)


def _add(module: str, _: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """In place."""
    if (found := _pass.get()) is None:
        return
    length, parts = found
    x_TK, y_TN = inputs[0].flatten(0, -2), output.view(-1, output.shape[-1])
    assert len(x_TK) == length, f"{module} was given {len(x_TK)} tokens of {length}"
    for adapter, places in parts:
        if module in adapter.factors:
            a_RK, b_NR = adapter.factors[module]
            y_TN.index_add_(0, places, linear(linear(x_TK[places], a_RK), b_NR) * adapter.scale)
