"""Low-rank adapters side by side on one model: each token of a forward pass goes through the one that it belongs to.

Shapes: T tokens of a pass, K inputs and N outputs of a module, R rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import one_hot

from heliostat.models.weights import weight_files
from heliostat.recipe import Refused

FOLDER = "adapter"
"""Where a bundle holds the adapter by itself."""
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
"""How near a sum of weights must come to the merged ones: they may have been merged on another processor."""
MAX_MIXES = 8
"""Sets of adapters that shared a pass, of which copies side by side are kept."""
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

    @property
    def device(self) -> torch.device:
        return next(iter(self.factors.values()))[0].device

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


@dataclass(frozen=True)
class _Pass:
    length: int
    """Its tokens."""
    adapters: tuple[Adapter, ...]
    """That have any of them."""
    member_TA: Tensor | None
    """Whose each token is, of them; None where all are the only one's."""
    masks: dict[tuple[int, ...], Tensor]

    def mask_TR(self, owners: tuple[int, ...], like: Tensor) -> Tensor:
        """1 where a token goes through a rank, by the adapters that own the ranks."""
        assert self.member_TA is not None
        if owners not in self.masks:
            self.masks[owners] = self.member_TA[:, owners].to(like)
        return self.masks[owners]


_pass: ContextVar[_Pass | None] = ContextVar("pass", default=None)
"""The forward pass that this thread is about to make, where it has tokens of adapters."""


def attach(model: Any, adapters: Sequence[Adapter]) -> None:
    """Have a model's passes go through adapters where `begin` says so; all else is as it was."""
    for module in sorted({module for adapter in adapters for module in adapter.factors}):
        model.get_submodule(module).register_forward_hook(_Hook(module))


def begin(spans: Sequence[tuple[Adapter | None, int]]) -> None:
    """This thread's next passes have the tokens of these requests, one behind the other: each one's adapter, if it has
    one, and how many tokens."""
    adapters = tuple(sorted({adapter for adapter, _ in spans if adapter is not None}, key=id))
    if not adapters:
        _pass.set(None)
        return
    member_TA = None
    if len(adapters) > 1 or any(adapter is None for adapter, _ in spans):
        device = next(iter(adapters[0].factors.values()))[0].device
        places = [
            len(adapters) if adapter is None else adapters.index(adapter) for adapter, n in spans for _ in range(n)
        ]
        member_TA = one_hot(torch.tensor(places, device=device), len(adapters) + 1)[:, :-1]
    _pass.set(_Pass(sum(length for _, length in spans), adapters, member_TA, {}))


@contextmanager
def through(adapter: Adapter | None, length: int) -> Iterator[None]:
    """The passes of this block have `length` tokens of one request."""
    before = _pass.get()
    begin([(adapter, length)])
    try:
        yield
    finally:
        _pass.set(before)


class _Hook:
    """Adds to a module's output what adapters make of its input. Those of a pass are side by side in one pair of
    factors, so that they take two products together: for a token, launching one is most of what it costs."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.beside: dict[tuple[Adapter, ...], tuple[Tensor, Tensor, tuple[int, ...]] | None] = {}

    def __call__(self, _: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """In place."""
        if (found := _pass.get()) is None:
            return
        x_TK, y_TN = inputs[0].flatten(0, -2), output.view(-1, output.shape[-1])
        assert len(x_TK) == found.length, f"{self.module} was given {len(x_TK)} tokens of {found.length}"
        if found.adapters not in self.beside:
            if len(self.beside) == MAX_MIXES:
                del self.beside[next(iter(self.beside))]
            self.beside[found.adapters] = self._side_by_side(found.adapters)
        factors = self.beside[found.adapters]
        if factors is None:
            return
        a_KR, b_RN, owners = factors
        inner_TR = x_TK @ a_KR
        if found.member_TA is not None:
            inner_TR *= found.mask_TR(owners, inner_TR)
        y_TN.addmm_(inner_TR, b_RN)

    def _side_by_side(self, adapters: tuple[Adapter, ...]) -> tuple[Tensor, Tensor, tuple[int, ...]] | None:
        """A (K, R) and scaled B (R, N), and whose each of the R is. None where no adapter has the module."""
        pairs = {
            i: adapter.factors[self.module] for i, adapter in enumerate(adapters) if self.module in adapter.factors
        }
        if not pairs:
            return None
        a_RK = torch.cat([a for a, _ in pairs.values()])
        b_NR = torch.cat([b * adapters[i].scale for i, (_, b) in pairs.items()], dim=1)
        return a_RK.T, b_NR.T.contiguous(), tuple(i for i, (a, _) in pairs.items() for _ in range(len(a)))
