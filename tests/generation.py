"""Small language models that were never trained, and what tests ask engines that generate."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch
import transformers

from heliostat.generate import Engine, Sampling, Token
from heliostat.generate.embedded import EmbeddedEngine
from heliostat.models.load import train_tokenizer
from tests.recipes import WORDS

GREEDY = Sampling(max_tokens=24, temperature=0)
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "initializer_range": 0.3,  # so that the likeliest token is so by far
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "gemma": {"num_key_value_heads": 1, "head_dim": 16},
    "olmo": {},
    "phi": {},
    "gpt2": {},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
        "kind": {"enum": ["sun", "salt"]},
    },
    "required": ["name", "sizes", "kind"],
    "additionalProperties": False,
}


def tiny_tokenizer() -> Any:
    return train_tokenizer([" ".join(WORDS), json.dumps({"name": "heat", "sizes": [1, 20]})] * 5, 320)


def model_of(family: str, tokenizer: Any, **fields: Any) -> Any:
    torch.manual_seed(0)
    end = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": tokenizer.eos_token_id}
    sizes = SIZES | FAMILIES.get(family, {}) | end | fields
    config = transformers.AutoConfig.for_model(family, vocab_size=len(tokenizer), **sizes)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


async def answer(engine: Engine, prompt: list[int], sampling: Sampling) -> list[Token]:
    return [token async for tokens in engine.generate(prompt, sampling) for token in tokens]


def check_logprobs(
    drawn: list[Token], scored: list[Token], prompt: list[int], whole: list[int], logprobs_TV: torch.Tensor, abs: float
) -> None:
    """`drawn` after the prompt, and the whole text as the engine scored it, three of the likeliest reported each time,
    are as the model has them. `logprobs_TV`: the model's, behind each token of the text."""
    assert scored[0] == Token(prompt[0])
    assert [token.id for token in scored] == whole
    for position, token in enumerate(scored[1:]):
        values, others = logprobs_TV[position].topk(3)
        assert token.logprob == pytest.approx(float(logprobs_TV[position, token.id]), abs=abs)
        assert [other for other, _ in token.top] == others.tolist()
        assert [value for _, value in token.top] == pytest.approx(values.tolist(), abs=abs)
    for one, other in zip(drawn, scored[len(prompt) : len(prompt) + len(drawn)], strict=True):
        assert (one.id, [i for i, _ in one.top]) == (other.id, [i for i, _ in other.top])
        assert one.logprob == pytest.approx(other.logprob, abs=abs)


def prompts(count: int, longest: int, vocabulary: int) -> list[list[int]]:
    random_ = random.Random(0)
    return [random_.choices(range(1, vocabulary), k=random_.randint(1, longest)) for _ in range(count)]


@torch.no_grad()
def generated(model: Any, prompt: list[int], max_tokens: int, **options: Any) -> list[int]:
    """Greedily. `options`: of transformers' `generate`."""
    ids = torch.tensor([prompt], device=model.device)
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": max_tokens} | options
    whole = model.generate(ids, **options)
    return whole[0, len(prompt) :].tolist()


@asynccontextmanager
async def running(model: Any, tokenizer: Any, cache_tokens: int = 8192) -> AsyncIterator[EmbeddedEngine]:
    engine = EmbeddedEngine(model, tokenizer, cache_tokens=cache_tokens, threads=1)
    try:
        yield engine
    finally:
        await asyncio.to_thread(engine.close)
