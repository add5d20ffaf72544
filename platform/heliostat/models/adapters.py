"""Low-rank adapters side by side on one model: each token of a forward pass goes through the one that it belongs to.

Shapes: T tokens of a pass, K inputs and N outputs of a module, R rank.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

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

    number: int = field(default_factory=itertools.count().__next__)
    """No other's."""

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


@dataclass
class _Pass:
    adapters: frozenset[Adapter]
    """That have tokens of it."""
    length: int
    """All its tokens."""
    owner_T: Tensor | None
    """The number of each one's adapter, -1 where it has none; None where all are the only one's."""


_pass: ContextVar[_Pass | None] = ContextVar("pass", default=None)
"""The forward pass that this thread is about to make, where it has tokens of adapters."""


def attach(model: Any, adapters: Sequence[Adapter]) -> None:
    """Have a model's passes go through adapters where `begin` says so; all else is as it was."""
    for name in sorted({name for adapter in adapters for name in adapter.factors}):
        module = model.get_submodule(name)
        having = [adapter for adapter in adapters if name in adapter.factors]
        module.register_forward_hook(_SideBySide(name, having, module.weight))


def begin(spans: Sequence[tuple[Adapter | None, int]]) -> None:
    """This thread's next passes have the tokens of these requests, one behind the other: each one's adapter, if it has
    one, and how many tokens."""
    owners = {adapter for adapter, _ in spans}
    adapters = frozenset(adapter for adapter in owners if adapter is not None)
    if not adapters:
        _pass.set(None)
        return
    owner_T = None
    if len(owners) > 1:
        numbers = torch.tensor([-1 if adapter is None else adapter.number for adapter, _ in spans])
        owner_T = numbers.repeat_interleave(torch.tensor([length for _, length in spans]))
    _pass.set(_Pass(adapters, sum(length for _, length in spans), owner_T))


@contextmanager
def through(adapter: Adapter | None, length: int) -> Iterator[None]:
    """The passes of this block have `length` tokens of one request."""
    before = _pass.get()
    begin([(adapter, length)])
    try:
        yield
    finally:
        _pass.set(before)


class _SideBySide:
    """Adds to a module's output what adapters make of its input. Their factors lie one behind the other, so that those
    of a pass take two products together: for a token, launching one is most of what it costs. What lies between two of
    a pass is computed, too, and multiplied by 0."""

    def __init__(self, module: str, adapters: Sequence[Adapter], like: Tensor) -> None:
        """On a tensor's device and in its type."""
        self.module, self.ranges = module, dict[Adapter, tuple[int, int]]()
        numbers, end = list[int](), 0
        for adapter in adapters:
            rank = len(adapter.factors[module][0])
            self.ranges[adapter] = (end, end + rank)
            numbers += [adapter.number] * rank
            end += rank
        self.owner_R = torch.tensor(numbers, device=like.device)
        self.a_RK = torch.cat([each.factors[module][0] for each in adapters]).to(like)
        self.b_RN = torch.cat([each.factors[module][1].T * each.scale for each in adapters]).to(like)

    def __deepcopy__(self, memo: dict[int, Any]) -> _SideBySide:
        """A copy of the model has the same."""
        return self

    def __call__(self, _: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """In place."""
        if (found := _pass.get()) is None:
            return
        x_TK, y_TN = inputs[0].flatten(0, -2), output.view(-1, output.shape[-1])
        assert len(x_TK) == found.length, f"{self.module} was given {len(x_TK)} tokens of {found.length}"
        if not (ranges := [self.ranges[adapter] for adapter in found.adapters if adapter in self.ranges]):
            return
        first, end = min(ranges)[0], max(ranges)[1]
        inner_TR = x_TK @ self.a_RK[first:end].T
        if found.owner_T is not None:
            found.owner_T = found.owner_T.to(inner_TR.device)  # for all modules
            inner_TR *= found.owner_T[:, None] == self.owner_R[first:end]
        y_TN.addmm_(inner_TR, self.b_RN[first:end])
