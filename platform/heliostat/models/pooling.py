"""How the tokens of a text become one vector: what the files of sentence-transformers beside a model say of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.utils import cached_file

from heliostat.models.load import resolve, transformers_config
from heliostat.recipe import Model, Refused

MODULES, POOLING, SETTINGS = "modules.json", "1_Pooling/config.json", "sentence_bert_config.json"
MODES = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens", "lasttoken": "lasttoken"}
"""By what they are called: the end of the field of a pooling's configuration that turns one on."""


def declared(model: Model) -> dict[str, Any]:
    """The model's `pooling`, one of `MODES`, and whether it is to `normalize`. The mean as it is where the model says
    nothing. Raises Refused for what is not done here, and for texts longer than the model's positions."""
    source = resolve(model.name)
    found: dict[str, Any] = {"pooling": "mean", "normalize": False}
    kinds = {each["type"].rpartition(".")[2]: each["path"] for each in _json(source, MODULES) or []}
    if unknown := sorted(kinds.keys() - {"Transformer", "Pooling", "Normalize"}):
        raise Refused("model.name", f"{model.name} declares a module {unknown[0]}, which is not done here")
    if "Pooling" in kinds:
        found["pooling"] = _mode(_json(source, f"{kinds['Pooling']}/config.json") or {}, model.name)
    if (_json(source, SETTINGS) or {}).get("do_lower_case"):
        raise Refused("model.name", f"{model.name} wants texts lower-cased for its tokenizer, which is not done here")
    found["normalize"] = "Normalize" in kinds
    positions = getattr(transformers_config(model).get_text_config(), "max_position_embeddings", None)
    if positions and model.max_length > positions:
        raise Refused("model.max_length", f"{model.name} has {positions} positions", f"use ≤ {positions}")
    return found


def _mode(config: dict[str, Any], name: str) -> str:
    """Newer files have `pooling_mode`, one or a list; older ones a field for each. In both the mean is the default."""
    prefix, known = "pooling_mode_", {field: mode for mode, field in MODES.items()}
    on = [key.removeprefix(prefix) for key, value in config.items() if key.startswith(prefix) and value]
    modes = config.get("pooling_mode") or [known.get(each, each) for each in on] or "mean"
    modes = [modes] if isinstance(modes, str) else modes
    if len(modes) > 1 or modes[0] not in MODES:
        raise Refused("model.name", f"{name} pools by {' and '.join(modes)}, which is not done here")
    return modes[0]


def _json(source: str, file: str) -> Any:
    """What a file of a directory or hub id holds; None where there is none."""
    path = cached_file(source, file, _raise_exceptions_for_missing_entries=False)
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))


def save(folder: Path, facts: dict[str, Any], width: int, max_length: int) -> None:
    """Write the files by which sentence-transformers does with a model what `declared` said. `width`: of a vector."""
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Normalize", "Normalize")] * facts["normalize"])]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    pooling = {f"pooling_mode_{field}": mode == facts["pooling"] for mode, field in MODES.items()}
    files: dict[str, Any] = {
        MODULES: modules,
        POOLING: {"word_embedding_dimension": width, **pooling},
        SETTINGS: {"max_seq_length": max_length, "do_lower_case": False},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def pooled(hidden_BTH: Tensor, mask_BT: Tensor, facts: dict[str, Any]) -> Tensor:
    """(B, H) in float32. `mask_BT`: 1 for tokens, 0 for padding, which is on the right."""
    hidden_BTH, inside_BT1 = hidden_BTH.float(), mask_BT[..., None].bool()
    match facts["pooling"]:
        case "mean":
            found_BH = (hidden_BTH * inside_BT1).sum(1) / inside_BT1.sum(1)
        case "cls":
            found_BH = hidden_BTH[:, 0]
        case "max":
            found_BH = hidden_BTH.masked_fill(~inside_BT1, -float("inf")).amax(1)
        case "lasttoken":
            last_B = mask_BT.sum(1) - 1
            found_BH = hidden_BTH.take_along_dim(last_B[:, None, None], 1)[:, 0]
        case other:
            raise AssertionError(other)
    return found_BH / found_BH.norm(dim=-1, keepdim=True).clamp_min(1e-12) if facts["normalize"] else found_BH
