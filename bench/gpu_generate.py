"""Output tokens a second of a Llama of 1.2 B parameters on one GPU, bfloat16, at several requests at once:

    heliostat      the embedded engine, asked in this process
    sampled        the same, each token drawn at temperature 1 instead of the likeliest
    transformers   its continuous batching alone (its manager), with the same cache
    batch          `generate` on all prompts at once, padded to one length: no request joins or leaves

in interleaved rounds (A B C … A B C …). Every request draws as many tokens as the others: the model has no end. Prints
medians, and ratios to `transformers` paired by round.

    python -m bench.gpu_generate [--rounds 3] [--requests 1 16 64 256] [--size tiny]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, closing
from typing import Any

import torch
import transformers
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from bench.gpu_throughput import PRESETS
from bench.serve_llm import CONFIG, NEW_TOKENS, engine_asker, generated, load, prompts, summary
from heliostat.generate.embedded import PAGE_TOKENS, STEP_TOKENS, EmbeddedEngine
from heliostat.models.load import train_tokenizer

CACHE_TOKENS = 65536
SIZES: dict[str, dict[str, Any]] = {
    "1b": PRESETS["llama-1b"].config | {"max_position_embeddings": 8192},  # Llama 3.2 1B
    "tiny": {"vocab_size": 8192, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2},
}


def built(size: str, device: torch.device) -> tuple[Any, Any]:
    """Weights are drawn, not trained: time does not depend on them."""
    tokenizer = train_tokenizer(["the mirrors of the field follow the sun and send its heat to the tower"] * 9, 8192)
    tokenizer.eos_token = None
    config = transformers.AutoConfig.for_model(**CONFIG | SIZES[size])
    torch.manual_seed(0)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    return model, tokenizer


def bare(model: Any) -> AbstractContextManager[Any]:
    config = ContinuousBatchingConfig(
        page_size=PAGE_TOKENS, num_blocks=CACHE_TOKENS // PAGE_TOKENS, max_batch_tokens=STEP_TOKENS[model.device.type]
    )
    generation = transformers.GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=-1)
    return model.continuous_batching_context_manager(generation, continuous_batching_config=config)


def batched(manager: Any, tokenizer: Any, texts: list[str]) -> dict[str, float]:
    ids = [tokenizer(text)["input_ids"] for text in texts]
    started, left, tokens = time.perf_counter(), len(ids), 0
    manager.add_requests(ids, max_new_tokens=NEW_TOKENS)
    while left:
        output = manager.get_result(timeout=1)
        if output is not None and output.is_finished():
            left, tokens = left - 1, tokens + len(output.generated_tokens)
    assert tokens == len(ids) * NEW_TOKENS
    return {"tokens_per_s": tokens / (time.perf_counter() - started)}


async def measure(size: str, device: torch.device, rounds: int, requests: list[int]) -> AsyncIterator[dict[str, Any]]:
    (model, tokenizer), (plain, _), (other, _) = (built(size, device) for _ in range(3))
    engine = EmbeddedEngine(model, tokenizer, cache_tokens=CACHE_TOKENS)
    with closing(engine), bare(other) as manager:
        for at_once in requests:
            found: dict[str, list[dict[str, float]]] = {}
            for round_ in range(rounds + 1):
                texts = prompts(at_once)
                measured = {
                    "heliostat": await load(engine_asker(engine), at_once, 1),
                    "sampled": await load(engine_asker(engine, temperature=1), at_once, 1),
                    "transformers": await asyncio.to_thread(batched, manager, tokenizer, texts),
                    "batch": await asyncio.to_thread(generated, plain, tokenizer, texts),
                }
                if round_:  # the first warms up
                    for name, figures in measured.items():
                        found.setdefault(name, []).append(figures)
            yield summary(at_once, found, names=("heliostat", "sampled", "batch"))


async def print_all(arguments: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(torch.cuda.get_device_name() if device.type == "cuda" else "cpu", flush=True)
    async for line in measure(arguments.size, device, arguments.rounds, arguments.requests):
        print(json.dumps(line), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--size", choices=SIZES, default="1b")
    arguments = parser.parse_args()
    asyncio.run(print_all(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
