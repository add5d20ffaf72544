"""Small recipes and data that many tests share."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers

from heliostat.data.prepare import Prepared, prepare
from heliostat.recipe import Recipe, build, override

WORDS = [
    "sun",
    "salt",
    "mirror",
    "tower",
    "heat",
    "field",
    "ray",
    "angle",
    "track",
    "storage",
    "turbine",
    "steam",
    "cloud",
    "noon",
    "shade",
]


TINY_RESNET = {
    "model_type": "resnet",
    "layer_type": "basic",
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
}


def text_file(folder: Path, rows: int = 33, seed: int = 0) -> Path:
    """Texts of very different lengths, with a label that the words decide."""
    random_ = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"texts-{rows}-{seed}.jsonl"
    with path.open("w") as stream:
        for i in range(rows):
            label = i % 2
            words = random_.choices(WORDS[7 * label : 7 * label + 8], k=random_.choice([2, 3, 7, 12, 25]))
            stream.write(json.dumps({"text": f"{i} " + " ".join(words), "label": ["dark", "bright"][label]}) + "\n")
    return path


def tiny_llama(folder: Path, **overrides: Any) -> Recipe:
    """A Llama of two blocks, trained from scratch on documents of uneven length."""
    recipe = build(
        {
            "name": "tiny",
            "task": "language_model",
            "storage": str(folder / "storage"),
            "model": {
                "tokenizer": "train:300",
                "config": {
                    "model_type": "llama",
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    "max_position_embeddings": 64,
                    "tie_word_embeddings": False,
                },
            },
            "data": {
                "train": str(text_file(folder / "source")),
                "validation": str(text_file(folder / "source", 8, 1)),
                "test": str(text_file(folder / "source", 8, 2)),
                "pack": False,
                "sequence_length": 48,
            },
            "optimizer": {"lr": 1e-3, "weight_decay": 0.1, "clip_norm": 1.0},
            "schedule": {"max_steps": 10},
            "training": {"global_batch_size": 8, "micro_batch_size": 2},
        }
    )
    return override(recipe, overrides)


def tiny_bert(folder: Path, **overrides: Any) -> Recipe:
    """A BERT of two blocks that classifies texts, from scratch."""
    recipe = build(
        {
            "name": "tiny-texts",
            "task": "text_classification",
            "storage": str(folder / "storage"),
            "model": {
                "tokenizer": "train:300",
                "dropout": 0.0,
                "config": {
                    "model_type": "bert",
                    "vocab_size": 300,
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "max_position_embeddings": 64,
                },
                "max_length": 48,
            },
            "data": {
                "train": str(text_file(folder / "source", 96)),
                "validation": str(text_file(folder / "source", 32, 1)),
                "test": str(text_file(folder / "source", 32, 2)),
                "bucket_batches": 2,
            },
            "optimizer": {"lr": 1e-3},
            "schedule": {"max_steps": 20},
            "training": {"global_batch_size": 16, "micro_batch_size": 8},
        }
    )
    return override(recipe, overrides)


def mixed(folder: Path, recipe: Recipe, **overrides: Any) -> Recipe:
    """The recipe on three sources of uneven size and weight in place of one."""
    weights = {"long": 0.5, "middle": 0.3, "short": 0.2}
    rows = {"long": 60, "middle": 41, "short": 17}
    mixture = {
        name: {"source": str(text_file(folder / "source" / name, rows[name], 10 + i)), "weight": weight}
        for i, (name, weight) in enumerate(weights.items())
    }
    return override(recipe, {"data.train": "", "data.mixture": mixture} | overrides)


def lora_head(folder: Path, **overrides: Any) -> Recipe:
    """`tiny_bert` with adapters and a new head over an encoder that is read from a folder."""
    recipe = tiny_bert(folder)
    config = recipe.model.config | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**config)).save_pretrained(folder / "base")
    named = {"model.name": str(folder / "base"), "model.config": {}, "model.lora.rank": 4}
    return override(recipe, named | overrides)


def prepared(recipe: Recipe) -> Prepared:
    return prepare(recipe)[0]
