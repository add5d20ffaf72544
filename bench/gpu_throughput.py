"""Tokens a second, model FLOP/s utilisation (MFU) and peak memory of our training step on one GPU: a Llama of published
shape, with as many of its layers as fit, bfloat16, compiled blocks, selective recompute, random tokens. Prints one JSON
line, with published figures of other systems beside ours. Since layers differ, compare MFU; `tokens_per_s_here` is what
the published MFU would give for the model that ran.

    python -m bench.gpu_throughput [--preset llama3-8b] [--layers N] [--rows N] [--recompute selective] [--steps 10]
        [--no-compile]

FLOPs a token: 6 for each weight of a matrix product (blocks and head, not the embedding) + 12·L·H·Q·T for attention
(L layers, H heads of size Q, T tokens of a sequence): PaLM's appendix B, as torchtitan and llm-foundry count. Recompute
does not count, and attention counts as if it were not causal; `mfu_causal` counts half of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers

from heliostat.models.flops import published_peak_flops
from heliostat.models.load import build_model
from heliostat.parallel.mesh import make_layout
from heliostat.parallel.parallelize import parallelize
from heliostat.recipe import Recipe, Refused, build
from heliostat.tasks import Batch, get_task
from heliostat.train.optim import build_optimizer
from heliostat.train.step import TrainStep

WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Published:
    system: str
    tokens_per_s: float
    """A GPU."""
    mfu: float


@dataclass(frozen=True)
class Preset:
    config: dict[str, Any]
    sequence_length: int
    rows: int
    """Sequences of a step."""
    published: tuple[Published, ...] = ()


PRESETS = {
    "llama3-8b": Preset(
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
        sequence_length=8192,
        rows=1,
        published=(
            Published("torchtitan (December 2024), Llama 3.1 8B, 8 × H100 at 500 W, FSDP", 5762, 0.33),
            Published("the same, compiled", 6667, 0.39),
        ),
    ),
    "llama-1b": Preset(  # Llama 3.2 1B
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "tie_word_embeddings": True,
        },
        sequence_length=2048,
        rows=4,
        published=(Published("llm-foundry, MPT 1B at 2048 tokens, 8 × H100, FSDP", 45455, 0.4182),),
    ),
    "tiny": Preset(  # a smoke test: it runs without a GPU
        {
            "vocab_size": 256,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
        },
        sequence_length=32,
        rows=2,
    ),
}


def block_weights(config: Any) -> int:
    """Weights of a block's matrix products."""
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return config.hidden_size * (2 * queries + 2 * keys + 3 * config.intermediate_size)


def flops_per_token(config: Any, length: int, attention: float = 1.0) -> float:
    """Of the forward and the backward pass. `attention`: the part of it that counts."""
    head = config.hidden_size * config.vocab_size
    layers, queries = config.num_hidden_layers, config.num_attention_heads * config.head_dim
    return 6 * (layers * block_weights(config) + head) + attention * 12 * layers * queries * length


def layers_that_fit(preset: Preset, free_bytes: int) -> int:
    """At most the model's own. An estimate in bytes, of which a tenth is left for what it does not know."""
    config: Any = transformers.LlamaConfig(**preset.config)
    tokens = preset.rows * preset.sequence_length
    # Parameter, gradient and two moments in float32, and the copy that autocast makes.
    weight = 4 * 4 + 2
    # Logits, their log-probabilities and the gradients of both.
    head = (1 if config.tie_word_embeddings else 2) * weight * config.hidden_size + 16 * tokens
    # The input in float32; attention and every second product in bfloat16.
    keys = config.num_key_value_heads * config.head_dim
    kept = 4 * config.hidden_size + 2 * (2 * config.hidden_size + keys + config.intermediate_size)
    layer = weight * block_weights(config) + kept * tokens
    layers = int((0.9 * free_bytes - head * config.vocab_size) / layer)
    if layers < 1:
        raise Refused("preset", f"one layer does not fit {free_bytes / 2**30:.1f} GiB of GPU memory", "use llama-1b")
    return min(layers, config.num_hidden_layers)


def recipe_for(name: str, preset: Preset, layers: int, compile_blocks: bool, recompute: str) -> Recipe:
    sizes = {key: value for key, value in preset.config.items() if key != "vocab_size"}
    own = {"model_type": "llama", "num_hidden_layers": layers, "max_position_embeddings": preset.sequence_length}
    return build(
        {
            "name": f"bench-{name}",
            "task": "language_model",
            "model": {"config": sizes | own},
            "data": {"sequence_length": preset.sequence_length},
            "training": {
                "global_batch_size": preset.rows,
                "micro_batch_size": preset.rows,
                "precision": "bfloat16",
                "compile": compile_blocks,
                "recompute": recompute,
            },
        }
    )


def random_batch(preset: Preset, device: torch.device) -> Batch:
    shape = preset.rows, preset.sequence_length
    ids_BT = torch.randint(preset.config["vocab_size"], shape, device=device)
    return Batch({"input_ids": ids_BT}, {"labels": ids_BT.roll(-1, 1)}, torch.ones(preset.rows, device=device))


def measure(
    name: str, layers: int | None, rows: int | None, steps: int, compile_blocks: bool, recompute: str
) -> dict[str, Any]:
    preset = PRESETS[name]
    preset = replace(preset, rows=rows or preset.rows)
    on_gpu = torch.cuda.is_available()
    if not on_gpu and name != "tiny":
        raise Refused("preset", f"{name} needs a GPU, and this machine shows none", "--preset tiny runs without one")
    if layers is None:
        layers = layers_that_fit(preset, torch.cuda.mem_get_info()[0]) if on_gpu else preset.config["num_hidden_layers"]
    recipe = recipe_for(name, preset, layers, compile_blocks, recompute)
    layout = make_layout(recipe.parallelism)
    vocab_size = preset.config["vocab_size"]
    task = get_task(recipe, {"padding_id": 0, "vocab_size": vocab_size, "bos_token_id": 1, "eos_token_id": 2})
    with layout.device:
        model = build_model(task).train()
    parallel = parallelize(model, layout, recipe)
    step = TrainStep(parallel, task, build_optimizer(model, recipe, set()), recipe)
    batches = [random_batch(preset, layout.device) for _ in range(WARM_UP_STEPS + steps)]
    for batch in batches[:WARM_UP_STEPS]:
        step([batch]).figures()  # which waits for the device
    started = time.perf_counter()
    for batch in batches[WARM_UP_STEPS:]:
        result = step([batch])
    loss = result.figures()["loss"]
    seconds = time.perf_counter() - started
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    peak = published_peak_flops(device)
    tokens_per_s = steps * preset.rows * preset.sequence_length / seconds
    flops, causal = (flops_per_token(model.config, preset.sequence_length, part) for part in (1.0, 0.5))
    return {
        "preset": name,
        "device": device,
        "layers": layers,
        "parameters": sum(p.numel() for p in model.parameters()),
        "sequence_length": preset.sequence_length,
        "rows": preset.rows,
        "steps": steps,
        "compile": compile_blocks,
        "recompute": recompute,
        "loss": round(loss, 4),
        "tokens_per_s": round(tokens_per_s, 1),
        "flops_per_token": flops,
        "peak_flops": peak,
        "mfu": round(tokens_per_s * flops / peak, 4) if peak else None,
        "mfu_causal": round(tokens_per_s * causal / peak, 4) if peak else None,
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None,
        "published": [
            vars(other) | {"tokens_per_s_here": round(other.mfu * peak / flops, 1) if peak else None}
            for other in preset.published
        ],
    }


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="llama3-8b")
    parser.add_argument("--layers", type=int, help="default: as many as fit the GPU's free memory")
    parser.add_argument("--rows", type=int, help="sequences of a step; default: the preset's")
    parser.add_argument("--recompute", choices=["none", "full", "selective"], default="selective")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args(words)
    try:
        answer = measure(
            options.preset, options.layers, options.rows, options.steps, options.compile, options.recompute
        )
    except Refused as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
