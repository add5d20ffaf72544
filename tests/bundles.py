"""Bundles that tests serve."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from heliostat.models import bundle as bundles
from heliostat.models.load import build_model, processor_facts, train_tokenizer
from heliostat.recipe import Recipe, build, override
from heliostat.tasks import get_task
from heliostat.train.loop import train
from tests.recipes import TINY_RESNET, TINY_TABULAR, WORDS, prepared, text_file, tiny_bert, tiny_llama

TEMPLATE = (
    "{% if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}Call: <tool_call>{}</tool_call>"
    "<|end|>{% endif %}{% for message in messages %}{% if message.role == 'tool' and not tools %}"
    "{{ raise_exception('no tools') }}{% endif %}<|{{ message.role }}|>{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT_ROWS = 200
FILL_IN = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]


def chat_bundle(folder: Path, seed: int = 0, **more: Any) -> Path:
    """A Llama that was never trained, whose tokenizer chats, calls tools and fills in. `more`: of its configuration."""
    texts = [" ".join(WORDS), json.dumps({"name": "heat", "arguments": {"sizes": [1, 20]}})]
    tokenizer = train_tokenizer(texts * 5, 320)
    tokenizer.add_special_tokens({"additional_special_tokens": FILL_IN, "eos_token": "<|end|>"})
    tokenizer.chat_template = TEMPLATE
    recipe = tiny_llama(folder)
    # So that the likeliest token is so by far.
    config = {**recipe.model.config, "max_position_embeddings": 1024, "initializer_range": 0.3, **more}
    recipe = override(recipe, {"model.config": config, "deploy.cache_tokens": 8192, "seed": seed})
    return write(folder / f"bundle-{seed}", recipe, tokenizer, processor_facts(tokenizer))


def image_bundle(folder: Path) -> Path:
    """A classifier of images that was never trained."""
    recipe = build(
        {
            "name": "tiny-images",
            "task": "image_classification",
            "data": {"train": "packaged:digits/all"},
            "model": {"config": TINY_RESNET},
        }
    )
    facts = {"labels": ["dark", "bright"], "image_shape": [1, 8, 8], "mean": [0.5], "std": [0.25]}
    return write(folder / "images", recipe, None, facts)


def reweighted(bundle: bundles.Bundle, path: Path, state: dict[str, torch.Tensor]) -> bundles.Bundle:
    """The same bundle with other weights."""
    kept = {name: bundle.card[name] for name in ("data", "metrics", "lineage")}
    return bundles.write(path, bundle.task(), state, bundle.processor(), **kept)


def tabular_bundle(folder: Path) -> Path:
    """A classifier of rows of numbers that was never trained."""
    recipe = build(
        {
            "name": "tiny-rows",
            "task": "tabular_classification",
            "data": {"train": "packaged:breast_cancer/all"},
            "model": {"config": TINY_TABULAR},
        }
    )
    facts = {"labels": ["dark", "bright"], "columns": ["height", "width"], "mean": [0.5, 3.0], "std": [0.25, 2.0],
             "may_be_missing": [1]}  # fmt: skip
    return write(folder / "rows", recipe, None, facts)


def text_bundle(folder: Path) -> bundles.Bundle:
    """A classifier of texts that knows what it was taught, with `TEXT_ROWS` validation rows."""
    splits = enumerate(("train", "validation", "test"))
    rows = {f"data.{split}": str(text_file(folder / "source", TEXT_ROWS, seed)) for seed, split in splits}
    recipe = tiny_bert(folder, **rows, **{"optimizer.lr": 5e-3, "schedule.max_steps": 60})
    return bundles.read(Path(train(recipe, prepared(recipe).folder, folder / "run")["bundle"]))


def write(path: Path, recipe: Recipe, processor: Any, facts: dict[str, Any]) -> Path:
    task = get_task(recipe, facts)
    state = build_model(task).state_dict()
    return bundles.write(path, task, state, processor, data={}, metrics={}, lineage={}).path


@dataclass
class Reference:
    """What transformers makes of a bundle in this process."""

    path: Path

    def __post_init__(self) -> None:
        self.bundle = bundles.read(self.path)
        self.model: Any = self.bundle.model()
        self.tokenizer = self.bundle.processor()

    @torch.no_grad()
    def generated(self, prompt: list[int], max_tokens: int) -> list[int]:
        ids = torch.tensor([prompt])
        end = self.tokenizer.eos_token_id
        options = {"do_sample": False, "max_new_tokens": max_tokens, "eos_token_id": end, "pad_token_id": end}
        return self.model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()

    def text(self, prompt: str | list[int], max_tokens: int) -> str:
        ids = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        return self.tokenizer.decode(self.generated(ids, max_tokens), skip_special_tokens=True)

    def chat(self, messages: list[Any], **options: Any) -> list[int]:
        found = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, **options)
        return found["input_ids"]

    @torch.no_grad()
    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """(T, V)"""
        return self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
