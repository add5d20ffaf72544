"""A causal language model as a GGUF file, which llama.cpp reads.

The file is for token ids in and token ids out: the text is the tokenizer's matter on this side. Of a token the file has
the bytes that it spells, since llama.cpp wants some. A token that spells part of a character spells nothing there:
llama.cpp's own server, beside which the engine is measured, keeps back the ids of tokens until their text is whole
characters, and loses them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, TokenType
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from heliostat.recipe import GgufDtype, Refused

VERSION = 1
"""Of what is written: another one where files written before are no longer right."""
INSTEAD = "use deploy.engine=embedded"
TYPES: dict[GgufDtype, tuple[GGMLQuantizationType, gguf.LlamaFileType]] = {
    "f32": (GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
FAMILIES = {
    "llama": (gguf.MODEL_ARCH.LLAMA, True),
    "mistral": (gguf.MODEL_ARCH.LLAMA, True),
    "qwen2": (gguf.MODEL_ARCH.QWEN2, False),
    "qwen3": (gguf.MODEL_ARCH.QWEN3, False),
}
"""Of transformers' model types: llama.cpp's architecture, and whether it rotates neighbouring elements of a head, where
transformers rotates those half a head apart."""


def write(
    path: Path, model: Any, dtype: GgufDtype, spelled: Callable[[int], bytes], end: int | None, special: set[int]
) -> None:
    """`spelled`: the bytes of a token. `end`: the token at which an answer that follows a grammar ends. `special`:
    tokens that are no text. Raises Refused for a model that llama.cpp, or this file, does not know."""
    config = model.config
    check(config)
    architecture, neighbours = FAMILIES[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    _describe(writer, config, dtype)
    _add_tokens(writer, config.vocab_size, spelled, end, special)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        part = name.split(".")[-2]
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(part)
        if neighbours and heads:
            tensor = _neighbouring(tensor, heads)
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise Refused("deploy.engine", f"llama.cpp has no place for the parameter {name}", INSTEAD)
        _add_tensor(writer, found, tensor, dtype)
    if (factors := _rope_factors(config)) is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check(config: Any) -> None:
    """Raises Refused for a model that this file cannot convert."""
    reason = None
    if config.model_type not in FAMILIES:
        reason = f"models of the family {config.model_type} are not converted for llama.cpp, but {', '.join(FAMILIES)}"
    elif getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True):
        reason = "attention through a sliding window is not converted for llama.cpp"
    elif config.hidden_act != "silu":
        reason = f"llama.cpp has no {config.hidden_act} for {config.model_type}"
    elif _rope(config).get("rope_type", "default") not in ("default", "linear", "llama3"):
        reason = f"positions scaled by {_rope(config)['rope_type']} are not converted for llama.cpp"
    if reason:
        raise Refused("deploy.engine", reason, INSTEAD)


def _describe(writer: gguf.GGUFWriter, config: Any, dtype: GgufDtype) -> None:
    head = _head_dim(config)
    writer.add_file_type(TYPES[dtype][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(_rope(config)["rope_theta"])


def _add_tokens(
    writer: gguf.GGUFWriter, count: int, spelled: Callable[[int], bytes], end: int | None, special: set[int]
) -> None:
    letters = _letters()
    texts, types, taken = [], [], set()
    for token in range(count):
        written, kind = "".join(letters[byte] for byte in spelled(token)), TokenType.NORMAL
        if token in special or written in taken or not text(spelled(token)):
            written, kind = f"<|token {token}|>", TokenType.CONTROL
        taken.add(written)
        texts.append(written)
        types.append(kind)
    writer.add_tokenizer_model("gpt2")  # by which a token's letters are bytes
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(texts)
    writer.add_token_types(types)
    writer.add_token_merges([f"{letters[0]} {letters[0]}"])  # none are needed, but it reads no file without
    if end is not None:
        writer.add_eos_token_id(end)
    writer.add_add_bos_token(False)


def text(spelled: bytes) -> str | None:
    """What a token spells in whole characters; None for parts of some."""
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return None


def _letters() -> list[str]:
    """GPT-2's letter for each byte: itself where it is printable, else one behind Latin-1."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _add_tensor(writer: gguf.GGUFWriter, name: str, tensor: Tensor, dtype: GgufDtype) -> None:
    values = tensor.detach().float().cpu().numpy()
    kind = TYPES[dtype][0] if values.ndim > 1 else GGMLQuantizationType.F32  # as llama.cpp's own converter does
    if kind is GGMLQuantizationType.Q8_0 and values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = GGMLQuantizationType.F16
    writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)


def _neighbouring(tensor: Tensor, heads: int) -> Tensor:
    """Elements of each head that are rotated together, half a head apart, put side by side."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _rope(config: Any) -> dict[str, Any]:
    return config.rope_parameters or {}


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rope_factors(config: Any) -> np.ndarray | None:
    """By how much slower than unscaled each pair turns. None: no scaling."""
    kind = _rope(config).get("rope_type", "default")
    if kind == "default":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    head = _head_dim(config)
    plain = _rope(config)["rope_theta"] ** -(torch.arange(0, head, 2) / head)
    return (plain / scaled).numpy().astype(np.float32)
