"""Output tokens a second, time to the first token and between tokens of a 33 M Llama on the CPU, at several requests at
once, in float32 for the embedded engine and vLLM, and as `--gguf-dtype` says for llama.cpp:

    heliostat      the engine behind serve/language_model.py, one replica of Ray Serve
    engine         the same engine asked from this process, without our HTTP (not of vLLM: it has its own anyway)
    transformers   `transformers serve --continuous-batching`, its own server: the embedded engine's peer
    llama_cpp      llama.cpp's own HTTP server with the same file: that engine's peer
    vllm           `vllm serve`, its own server with the same options: that engine's peer
    batch          `generate` on all prompts at once, padded to one length: no request joins or leaves
    generate       `generate`, one request after the other (at one request only)

in interleaved rounds (A B C … A B C …), each side with both processors and alone with them while it is measured, and
with prompts that no side has seen: servers remember them. Every request draws greedily as many tokens as the others:
the model has no end. Prints medians, and ratios to the peer paired by round.

    python -m bench.serve_llm [--engine llama_cpp|vllm] [--rounds 3] [--requests 1 4 16]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch

import heliostat.launch.cluster as cluster
from heliostat import installed
from heliostat.generate import Engine, Sampling, vllm
from heliostat.generate.embedded import EmbeddedEngine
from heliostat.generate.llama_cpp import LlamaCppEngine, converted
from heliostat.models import bundle as bundles
from heliostat.models.load import build_model, processor_facts, train_tokenizer
from heliostat.recipe import Deploy, build
from heliostat.tasks import get_task

HOST, NAME = "127.0.0.1", "bench-llm"
PORTS = {"heliostat": 8731, "transformers": 8732, "llama_cpp": 8733, "vllm": 8734}
PEERS = {"embedded": "transformers", "llama_cpp": "llama_cpp", "vllm": "vllm"}
PROMPT_WORDS, NEW_TOKENS, THREADS = 32, 48, 2
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 1024,
    "eos_token_id": None,
}


LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=0)
"""llama.cpp's server closes connections that it kept, at times under a request that has just been sent."""


@dataclass
class Answer:
    """When a request's tokens came, from its beginning."""

    seconds: list[float] = field(default_factory=list)
    tokens: int = 0


Ask = Callable[[str], Awaitable[Answer]]


def model_bundle(folder: Path) -> Path:
    random_ = random.Random(0)
    # So many words that all tokens of the model are tokens of the tokenizer: what has no text is not streamed.
    words = ["".join(random_.choices(string.ascii_lowercase, k=random_.randint(3, 9))) for _ in range(20_000)]
    sentence = "the mirrors of the field follow the sun and send its heat to the tower"
    tokenizer = train_tokenizer([sentence] * 99 + [" ".join(words)], 8192)
    tokenizer.eos_token = None
    config = {**CONFIG, "vocab_size": 8192}
    recipe = build({"name": NAME, "task": "language_model", "model": {"tokenizer": "train:8192", "config": config}})
    task = get_task(recipe, {**processor_facts(tokenizer), "vocab_size": 8192, "padding_id": 0})
    state = build_model(task).state_dict()
    return bundles.write(folder / "bundle", task, state, tokenizer, data={}, metrics={}, lineage={}).path


def prompts(count: int, seed: int = 0) -> list[str]:
    random_ = random.Random(seed)
    words = ["the", "mirrors", "of", "field", "follow", "sun", "and", "send", "its", "heat", "to", "tower"]
    return [" ".join(random_.choices(words, k=random_.randint(PROMPT_WORDS // 2, PROMPT_WORDS))) for _ in range(count)]


def http_asker(client: httpx.AsyncClient, port: int, model: str, tokenizer: Any = None) -> Ask:
    """With a `tokenizer`, prompts are sent as its tokens: llama.cpp's file knows none of its own."""

    async def ask(prompt: str) -> Answer:
        body = {"model": model, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "stream": True}
        if tokenizer is not None:
            body |= {"prompt": tokenizer(prompt)["input_ids"], "ignore_eos": True}
        answer, started = Answer(), time.perf_counter()
        async with client.stream("POST", f"http://{HOST}:{port}/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                data = json.loads(line.removeprefix("data: "))
                if "error" in data:
                    raise RuntimeError(data["error"])
                answer.seconds.append(time.perf_counter() - started)
        answer.tokens = NEW_TOKENS
        return answer

    return ask


def engine_asker(engine: Engine, temperature: float = 0) -> Ask:
    async def ask(prompt: str) -> Answer:
        answer, started = Answer(), time.perf_counter()
        ids = engine.tokenizer(prompt)["input_ids"]
        async for tokens in engine.generate(
            ids, Sampling(max_tokens=NEW_TOKENS, temperature=temperature, ignore_end=True)
        ):
            answer.seconds.append(time.perf_counter() - started)
            answer.tokens += len(tokens)
        return answer

    return ask


async def load(ask: Ask, at_once: int, each: int, seed: int = 0) -> dict[str, float]:
    """`at_once` clients, each asking `each` prompts one after the other. Of another `seed` they are others: servers
    remember those they have read."""
    asked = prompts(at_once * each, seed)
    started = time.perf_counter()

    async def client(number: int) -> list[Answer]:
        return [await ask(prompt) for prompt in asked[number::at_once]]

    answers = [answer for some in await asyncio.gather(*map(client, range(at_once))) for answer in some]
    elapsed = time.perf_counter() - started
    gaps = [b - a for answer in answers for a, b in zip(answer.seconds, answer.seconds[1:], strict=False)]
    first = sorted(answer.seconds[0] for answer in answers)
    return {
        "tokens_per_s": sum(answer.tokens for answer in answers) / elapsed,
        "first_token_p50_s": statistics.median(first),
        "first_token_p99_s": first[math.ceil(0.99 * (len(first) - 1))],
        "between_tokens_p50_s": statistics.median(gaps),
        "between_tokens_p99_s": sorted(gaps)[math.ceil(0.99 * (len(gaps) - 1))],
    }


@torch.inference_mode()
def generated(model: Any, tokenizer: Any, texts: list[str], **options: Any) -> dict[str, float]:
    """All at once, padded at the left. `options`: more of `generate`'s."""
    ids = [tokenizer(text)["input_ids"] for text in texts]
    longest = max(map(len, ids))
    started = time.perf_counter()
    input_ids = torch.tensor([[0] * (longest - len(one)) + one for one in ids], device=model.device)
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in ids], device=model.device)
    options |= {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0, "eos_token_id": None}
    out = model.generate(input_ids, attention_mask=mask, **options)
    assert out.shape[1] == longest + NEW_TOKENS
    return {"tokens_per_s": len(texts) * NEW_TOKENS / (time.perf_counter() - started)}


def server(module: str, arguments: list[str], folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", module, *arguments]
    log = (folder / f"{module}.log").open("wb")
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def transformers_server(path: Path, folder: Path) -> subprocess.Popen[bytes]:
    arguments = [
        *("serve", str(path), "--continuous-batching", "--host", HOST, "--port", str(PORTS["transformers"])),
        *("--device", "cpu", "--dtype", "float32", "--cb-num-blocks", "64", "--log-level", "error"),
    ]
    return server("transformers.cli.transformers", arguments, folder)


def llama_cpp_server(file: Path, cache_tokens: int, folder: Path) -> subprocess.Popen[bytes]:
    arguments = [str(file), str(PORTS["llama_cpp"]), "--threads", str(THREADS), "--cache-tokens", str(cache_tokens)]
    return server("bench.bare_llama_cpp", arguments, folder)


def vllm_server(path: Path, settings: Deploy, config: Any, folder: Path) -> subprocess.Popen[bytes]:
    words = vllm.command(installed.llm_environment(settings), path, config, settings.cache_tokens, "float32", False)
    log = (folder / "vllm.log").open("wb")
    words += ["--host", HOST, "--port", str(PORTS["vllm"])]
    return subprocess.Popen(words, stdout=log, stderr=log, env=vllm.variables(THREADS))


async def ready(ask: Ask, seconds: float = 180) -> None:
    limit = time.monotonic() + seconds
    while True:
        try:
            await ask("the sun")
            return
        except (httpx.HTTPError, RuntimeError):
            if time.monotonic() > limit:
                raise
            await asyncio.sleep(1)


async def measure(
    path: Path, folder: Path, settings: Deploy, rounds: int, requests: list[int], each: int
) -> AsyncIterator[dict[str, Any]]:
    from serve.application import deploy  # here, since it needs Ray, which bench.gpu_generate does without

    torch.set_num_threads(THREADS)
    bundle = bundles.read(path)
    plain, shared = bundle.model(), bundle.model()
    tokenizer = bundle.processor()
    with ExitStack() as stack:
        tokens, dtype, beside = settings.cache_tokens, settings.gguf_dtype, PEERS[settings.engine]
        if settings.engine == "embedded":
            peer = transformers_server(path, folder)
            engine: Any = EmbeddedEngine(shared, tokenizer, cache_tokens=tokens, threads=THREADS)
        elif settings.engine == "vllm":
            peer, engine = vllm_server(path, settings, plain.config, folder), None
        else:
            file = await asyncio.to_thread(converted, bundle.digest, shared, tokenizer, dtype, THREADS)
            peer = llama_cpp_server(file, tokens, folder)
            engine = LlamaCppEngine(file, dtype, shared, tokenizer, cache_tokens=tokens, threads=THREADS)
        stack.callback(peer.wait)
        stack.callback(peer.terminate)  # in the background of a shell, SIGINT is ignored
        if engine is not None:
            stack.callback(engine.close)
        deploy(path, "1", settings, NAME)
        async with httpx.AsyncClient(timeout=None, limits=LIMITS) as client:
            asks = {
                "heliostat": http_asker(client, PORTS["heliostat"], NAME),
                **({"engine": engine_asker(engine)} if engine is not None else {}),
                beside: http_asker(client, PORTS[beside], str(path), tokenizer if beside == "llama_cpp" else None),
            }
            for ask in asks.values():
                await ready(ask)
            for at_once in requests:
                found: dict[str, list[dict[str, float]]] = {}
                for round_ in range(rounds + 1):
                    seed = 1000 * at_once + round_
                    measured = {name: await load(ask, at_once, each, seed) for name, ask in asks.items()}
                    one = "batch" if at_once > 1 else "generate"
                    measured[one] = await asyncio.to_thread(generated, plain, tokenizer, prompts(at_once, seed))
                    if round_:  # the first warms up
                        for name, figures in measured.items():
                            found.setdefault(name, []).append(figures)
                yield summary(at_once, found, beside, tuple(name for name in asks if name != beside))


def summary(
    at_once: int,
    found: dict[str, list[dict[str, float]]],
    beside: str = "transformers",
    names: tuple[str, ...] = ("heliostat", "engine"),
) -> dict[str, Any]:
    medians = {
        name: {key: round(statistics.median(one[key] for one in rounds), 4) for key in rounds[0]}
        for name, rounds in found.items()
    }
    peer = [one["tokens_per_s"] for one in found[beside]]
    ratios = {}
    for name in names:
        each = sorted(one["tokens_per_s"] / other for one, other in zip(found[name], peer, strict=True))
        ratios[name] = {"median": statistics.median(each), "range": [each[0], each[-1]]}
    return {"requests": at_once, "medians": medians, f"tokens_per_s_over_{beside}": ratios}


async def print_all(arguments: argparse.Namespace, folder: Path) -> None:
    path = model_bundle(folder)
    settings = Deploy(
        port=PORTS["heliostat"],
        max_replicas=1,
        cpus_per_replica=THREADS,
        threads_per_replica=THREADS,
        engine=arguments.engine,
        gguf_dtype=arguments.gguf_dtype,
        llm_environment=arguments.llm_environment,
    )
    installed.check_engine(settings)
    async for line in measure(path, folder, settings, arguments.rounds, arguments.requests, arguments.each):
        print(json.dumps(line), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=list(PEERS), default="embedded")
    parser.add_argument("--gguf-dtype", choices=["q8_0", "f16", "f32"], default="q8_0")
    parser.add_argument("--llm-environment", default="", help="what `make llm` built, where it is not beside this one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--each", type=int, default=2, help="requests that each client sends, one after the other")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, cluster.connect(build({"name": NAME, "task": "language_model"})):
        asyncio.run(print_all(arguments, Path(folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
