"""What adapters cost SmolLM2-135M on the CPU, in float32, by the embedded engine: output tokens a second at several
requests at once, of rank 8 on all linear modules,

    none           an engine without adapters
    base           one that has four: all requests ask the model itself
    one            all requests ask the same adapter
    each           requests ask the four adapters and the model in turn
    generate       `generate` on all prompts at once, without adapters, padded to one length: no request joins or leaves
    peft           the same by peft's `generate(adapter_names=...)`, its way to mix adapters in a batch, as `each` asks

in interleaved rounds (A B C … A B C …), each with both processors and alone with them while it is measured. Every
request draws greedily as many tokens as the others. Prints medians, and how many times as long a token takes as without
adapters, paired by round: `base`, `one` and `each` to `none`, `peft` to `generate`.

    python -m bench.serve_adapters [--rounds 5] [--requests 1 4 16]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import sys
from collections.abc import AsyncIterator
from typing import Any

import peft
import torch
import transformers

from bench.serve_llm import THREADS, Ask, engine_asker, generated, load, prompts
from heliostat.generate.embedded import EmbeddedEngine
from heliostat.models.adapters import Adapter
from heliostat.models.lora import target_modules
from heliostat.models.packaged import packaged_model

RANK, NAMES = 8, ["first", "second", "third", "fourth"]
OVER = {"base": "none", "one": "none", "each": "none", "peft": "generate"}


def adapter(model: Any) -> Adapter:
    """Of any numbers: what they are changes nothing in what they cost."""
    factors = {}
    for name in target_modules(model, []):
        weight_NK = model.get_submodule(name).weight
        n, k = weight_NK.shape
        factors[name] = (0.01 * torch.randn(RANK, k), 0.01 * torch.randn(n, RANK))
    return Adapter(factors, 2.0, transposed=False)


def with_peft(model: Any) -> Any:
    config = peft.LoraConfig(r=RANK, target_modules=target_modules(model, []))
    found = peft.get_peft_model(model, config, NAMES[0])
    for name in NAMES[1:]:
        found.add_adapter(name, config)
    return found.eval()


def in_turn(engines: list[EmbeddedEngine]) -> Ask:
    asks = itertools.cycle([engine_asker(each) for each in engines])
    return lambda prompt: next(asks)(prompt)


async def measure(rounds: int, requests: list[int], each: int) -> AsyncIterator[dict[str, Any]]:
    torch.set_num_threads(THREADS)
    folder = packaged_model("smollm2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    plain, adapted, own, other = (transformers.AutoModelForCausalLM.from_pretrained(folder).eval() for _ in range(4))
    mixed = with_peft(other)
    adapters = {name: adapter(adapted) for name in NAMES}
    none = EmbeddedEngine(plain, tokenizer, cache_tokens=8192, threads=THREADS)
    engine = EmbeddedEngine(adapted, tokenizer, cache_tokens=8192, threads=THREADS, adapters=adapters)
    asks: dict[str, Ask] = {
        "none": engine_asker(none),
        "base": engine_asker(engine),
        "one": engine_asker(engine.adapted(NAMES[0])),
        "each": in_turn([*(engine.adapted(name) for name in NAMES), engine]),
    }
    try:
        for at_once in requests:
            names = list(itertools.islice(itertools.cycle([*NAMES, "__base__"]), at_once))
            batches: dict[str, tuple[Any, dict[str, Any]]] = {
                "generate": (own, {}),
                "peft": (mixed, {"adapter_names": names}),
            }
            found: dict[str, list[float]] = {name: [] for name in [*asks, *batches]}
            for round_ in range(rounds + 1):
                seed = 1000 * at_once + round_
                measured = {name: await load(ask, at_once, each, seed) for name, ask in asks.items()}
                for name, (model, options) in batches.items():
                    texts = prompts(at_once, seed)
                    measured[name] = await asyncio.to_thread(generated, model, tokenizer, texts, **options)
                if round_:  # the first warms up
                    for name, figures in measured.items():
                        found[name].append(figures["tokens_per_s"])
            yield summary(at_once, found)
    finally:
        none.close()
        engine.close()


def summary(at_once: int, found: dict[str, list[float]]) -> dict[str, Any]:
    times = {}
    for name, over in OVER.items():
        ratios = sorted(plain / adapted for adapted, plain in zip(found[name], found[over], strict=True))
        times[f"{name}_over_{over}"] = [round(each, 3) for each in (statistics.median(ratios), ratios[0], ratios[-1])]
    medians = {name: round(statistics.median(figures), 1) for name, figures in found.items()}
    return {"requests": at_once, "tokens_per_s": medians, "time_of_a_token": times}


async def print_all(arguments: argparse.Namespace) -> None:
    async for line in measure(arguments.rounds, arguments.requests, arguments.each):
        print(json.dumps(line), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--each", type=int, default=2, help="requests that each client sends, one after the other")
    asyncio.run(print_all(parser.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
