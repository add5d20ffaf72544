"""Weights straight into a model that may already be laid out over ranks: each rank reads its own shards of its own
modules from safetensors files, or draws one block after the other and keeps its shards, so none ever holds the whole
model."""

from __future__ import annotations

import copy
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model, set_param_for_module
from transformers.distributed.sharding_utils import DtensorShardOperation
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils.loading_report import LoadStateDictInfo

from heliostat.card import INDEX
from heliostat.models.blocks import blocks
from heliostat.recipe import Refused

FILE = "model.safetensors"


class Weights:
    """The weights of a model, not read and not drawn yet."""

    def __init__(self, source: str, model: Any, seed: int) -> None:
        """`source`: a directory or hub id; empty: no files, all is drawn. `model`: on meta, not laid out. `seed` draws
        what the files lack. Raises Refused where there are no files."""
        self.source, self.seed = source, seed
        self.files = weight_files(source) if source else []
        # Both depend on classes and shapes that laying out changes.
        self.conversions: list[Any] = get_model_conversion_mapping(model)
        self.whole = copy.deepcopy(model)
        self.holders = block_holders(model)

    def lacking(self) -> set[str]:
        """The names of the model's parameters that no file holds, or holds in another shape. Reads no weights."""
        model = copy.deepcopy(self.whole)
        expected = model.state_dict()
        slices: dict[str, torch.Tensor] = {}
        for file in self.files:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    shape = opened.get_slice(name).get_shape()
                    if name not in expected or list(expected[name].shape) == shape:
                        slices[name] = torch.empty(shape, device="meta")
        found, _ = convert_and_load_state_dict_in_model(model, slices, self._config(torch.device("meta")))
        missing: set[str] = found.missing_keys - model.all_tied_weights_keys.keys()
        return missing & {name for name, _ in model.named_parameters()}

    def load_into(self, model: Any, device: torch.device) -> set[str]:
        """Give the parameters and buffers of `model`, which are on meta, storage on `device`, in float32. Parameters
        that no file holds are drawn from the seed alike on every rank and layout; returns their names where there are
        files. Raises Refused for files that do not fit."""
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        config = self._config(device)
        found = self._read(model, config) if self.files else nothing_loaded(set(model.state_dict()))
        missing = found.missing_keys - model.all_tied_weights_keys.keys()
        self._draw(model, missing, found, device)
        model._move_missing_keys_from_meta_to_device(set(), config.device_map, None, None)  # buffers that no file holds
        model._initialize_missing_keys(False)
        model.tie_weights(missing_keys=found.missing_keys, recompute_mapping=False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        return missing & {name for name, _ in model.named_parameters()} if self.files else set()

    def _read(self, model: Any, config: LoadStateDictConfig) -> LoadStateDictInfo:
        expected = model.state_dict()
        with ExitStack() as stack:
            opened = [stack.enter_context(safe_open(file, framework="pt")) for file in self.files]
            slices = {name: file.get_slice(name) for file in opened for name in file.keys()}  # noqa: SIM118
            misfits = {
                name
                for name, part in slices.items()
                if name in expected and list(expected[name].shape) != part.get_shape()
            }
            for name in sorted(misfits):
                if name.startswith(f"{model.base_model_prefix}."):
                    shapes = f"{tuple(slices[name].get_shape())} there, {tuple(expected[name].shape)} here"
                    raise Refused("model.config", f"{name} of {self.source} does not fit: {shapes}", "leave its sizes")
            # A head for other classes is drawn anew.
            fitting = {name: part for name, part in slices.items() if name not in misfits}
            found, _ = convert_and_load_state_dict_in_model(model, fitting, config)
        if wrong := [*found.error_msgs, *found.conversion_errors.values(), *map(str, found.mismatched_keys)]:
            raise Refused("model.name", f"{self.source} does not fit {type(self.whole).__name__}: {wrong[0]}")
        return found

    def _config(self, device: torch.device) -> LoadStateDictConfig:
        return LoadStateDictConfig(
            device_map={"": device}, dtype=torch.float32, weight_mapping=self.conversions, ignore_mismatched_sizes=True
        )

    def _draw(self, model: Any, names: set[str], found: Any, device: torch.device) -> None:
        """Part by part, each from a seed of its own: what one rank skips changes nothing of the rest. A part is whole,
        since some families draw a module anew once they have drawn what is in it."""
        by_part: dict[str, list[str]] = defaultdict(list)
        for name in names:
            by_part[self._part(name)].append(name)
        parts = {path: self.whole.get_submodule(path) for path in by_part}
        modules = {path: [part] if path in self.holders else [*part.modules()] for path, part in parts.items()}
        # One place for all, in turn: given back piece by piece between the shards that stay, it would lie in splinters.
        space = torch.empty(max((sum(map(_numel, each)) for each in modules.values()), default=0))
        for path, inside in by_part.items():
            _store(modules[path], space)
            with drawn_from(self.seed, path):
                for module in reversed(modules[path]):  # what is in a module before the module
                    self.whole._init_weights(module)
            for name in inside:
                place(model, name, self.whole.get_parameter_or_buffer(name).detach(), device, found)
            parts[path].to_empty(device="meta", recurse=path not in self.holders)

    def _part(self, name: str) -> str:
        """The path of what a parameter is drawn with: its block, or else the largest module that has no blocks. One
        that has, and parameters of its own, is drawn without what is in it."""
        path, *inside = name.split(".")[:-1] or [""]
        for each in inside:
            if path not in self.holders:
                break
            path = f"{path}.{each}"
        return path


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters(recurse=False))


def _store(modules: list[nn.Module], space: torch.Tensor) -> None:
    """Give the modules' own parameters room in `space`, and their buffers, which are small, room of their own."""
    begin = 0
    for module in modules:
        for name, parameter in module.named_parameters(recurse=False):
            end = begin + parameter.numel()
            module.register_parameter(name, nn.Parameter(space[begin:end].view(parameter.shape), requires_grad=False))
            begin = end
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty_like(buffer, device="cpu")


def nothing_loaded(missing: set[str]) -> LoadStateDictInfo:
    """transformers' record of what was loaded, where none of the `missing` was."""
    return LoadStateDictInfo(missing, set(), set(), [], {}, set())


def block_holders(model: Any) -> set[str]:
    """The paths of the modules that the model's blocks are in."""
    try:
        path, _ = blocks(model)
    except Refused:
        return {""}
    parts = path.split(".")
    return {".".join(parts[:depth]) for depth in range(len(parts) + 1)}


@contextmanager
def drawn_from(seed: int, path: str) -> Iterator[None]:
    """Random numbers that depend on the seed and a module's name alone."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {path}".encode()).digest()[:8]))
        yield


def place(model: Any, name: str, whole: Any, device: torch.device, found: Any) -> None:
    """Give a parameter or buffer this rank's part of its values. `found`: transformers' record of what was loaded."""
    no_quantizer: Any = None
    own = model.get_parameter_or_buffer(name)
    part: Any = DtensorShardOperation(own).shard_tensor(whole) if isinstance(own, DTensor) else whole
    # A copy: a view would keep the whole in memory.
    set_param_for_module(model, name, part.to(device, copy=True), found, hf_quantizer=no_quantizer)


def weight_files(source: str) -> list[Path]:
    """The safetensors files of a directory or hub id, which are fetched where they are not there."""
    folder = Path(source)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(source, allow_patterns=[FILE, INDEX, "model-*.safetensors"]))
        except (OSError, ValueError) as error:
            raise Refused("model.name", f"{source} cannot be fetched: {str(error).splitlines()[0]}") from error
    if (folder / INDEX).is_file():
        names = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
        return [folder / name for name in sorted(names)]
    if not (folder / FILE).is_file():
        raise Refused("model.name", f"{source} has no {FILE}", "save it with save_pretrained")
    return [folder / FILE]
