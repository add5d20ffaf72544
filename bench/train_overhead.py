"""What the training loop costs over a bare PyTorch loop, and beside Hugging Face's Trainer: CPU seconds a step at one
thread, on the same model and batches, in interleaved blocks (A B C A B C …). Prints medians and paired ratios.

    python -m bench.train_overhead [--pairs 5] [--steps 20]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers

from heliostat.data.loader import Coordinate, Cursor, Loader, open_split
from heliostat.data.prepare import Prepared, prepare
from heliostat.models.load import build_model
from heliostat.recipe import Recipe, override
from heliostat.train.loop import Run, train
from heliostat.train.optim import lr_factor
from pipelines.recipes.language import tiny_lm

SIZES = {
    # 17 M parameters: compute rules. 0.2 M: what each step costs beside it.
    "17M": {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
    },
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    },
}


def recipe_for(size: str, storage: Path, steps: int) -> Recipe:
    base = tiny_lm()
    return override(
        base,
        {
            "name": f"bench-{size}",
            "storage": str(storage),
            "model.config": base.model.config | SIZES[size],
            "data.sequence_length": 128 if size == "17M" else 16,
            "data.validation_fraction": 0.002,
            "training.precision": "float32",
            "training.global_batch_size": 4,
            "training.micro_batch_size": 4,
            "parallelism.workers": 1,
            "schedule.max_steps": steps,
            "training.keep_best": False,
            "training.evaluate_every_steps": 1 << 30,
            "checkpoint.every_steps": 1 << 30,
        },
    )


def per_step(stamps: list[float]) -> float:
    """Median CPU seconds between step starts, the first three left out as warm-up."""
    return statistics.median(b - a for a, b in itertools.pairwise(stamps[3:]))


def ours(recipe: Recipe, data: Prepared, run_dir: Path, **options: Any) -> float:
    stamps: list[float] = []

    def at_each_step() -> bool:
        stamps.append(time.process_time())
        return False

    train(recipe, data.folder, run_dir, should_stop=at_each_step, write_bundle=False, **options)
    return per_step(stamps)


def unrecorded(recipe: Recipe, data: Prepared, run_dir: Path) -> float:
    """Ours, but no step's figures are read or written."""
    with mock.patch.object(Run, "_record", return_value=None):
        return ours(recipe, data, run_dir)


def batches(recipe: Recipe, data: Prepared) -> list[dict[str, torch.Tensor]]:
    """The batches our loop takes, as a bare loop would hold them."""
    loader = Loader(open_split(data.folder, "train"), recipe.seed, recipe.training.global_batch_size)
    task = data.task(recipe)
    found = []
    for step in range(recipe.schedule.max_steps or 0):
        rows = loader.read(loader.advance(Cursor(), step), Coordinate(), recipe.training.micro_batch_size)[0]
        batch = task.collate(rows, train=True)
        found.append({"input_ids": batch.inputs["input_ids"], "labels": batch.targets["labels"]})
    return found


def bare(recipe: Recipe, data: Prepared, run_dir: Path) -> float:
    """The least that trains: forward, loss, backward, clip, AdamW, schedule."""
    held = batches(recipe, data)
    model = build_model(data.task(recipe)).train()
    options = recipe.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=options.lr,
        betas=(options.beta1, options.beta2),
        weight_decay=options.weight_decay,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(recipe.schedule, step, len(held)))
    stamps = []
    for batch in held:
        stamps.append(time.process_time())
        logits = model(input_ids=batch["input_ids"]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm or 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return per_step(stamps)


class Stamps(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.stamps: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.stamps.append(time.process_time())


def trainer(recipe: Recipe, data: Prepared, run_dir: Path) -> float:
    """Hugging Face's Trainer on the same rows (it shifts the labels itself)."""
    held = [row for batch in batches(recipe, data) for row in batch["input_ids"]]
    rows = [{"input_ids": row, "labels": row} for row in held]
    stamps = Stamps()
    arguments = transformers.TrainingArguments(
        output_dir=str(run_dir),
        per_device_train_batch_size=recipe.training.micro_batch_size,
        max_steps=recipe.schedule.max_steps or 0,
        learning_rate=recipe.optimizer.lr,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        max_grad_norm=recipe.optimizer.clip_norm or 1.0,
        optim="adamw_torch_fused",
        report_to=[],
        save_strategy="no",
        logging_strategy="steps",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
    )
    run = transformers.Trainer(
        model=build_model(data.task(recipe)),
        args=arguments,
        train_dataset=rows,
        callbacks=[stamps],
        data_collator=lambda items: {key: torch.stack([item[key] for item in items]) for key in items[0]},
    )
    run.remove_callback(transformers.PrinterCallback)
    run.train()
    return per_step(stamps.stamps)


def measure(size: str, pairs: int, steps: int, folder: Path) -> dict[str, Any]:
    recipe = recipe_for(size, folder / "storage", steps)
    data, _ = prepare(recipe)
    ways: dict[str, Callable[[Recipe, Prepared, Path], float]] = {
        "heliostat": ours,
        "bare": bare,
        "trainer": trainer,
        "unrecorded": unrecorded,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for pair in range(pairs):
        for name, way in ways.items():
            seconds[name].append(way(recipe, data, folder / f"{size}-{name}-{pair}"))
    ratios = {
        other: [a / b for a, b in zip(seconds["heliostat"], seconds[other], strict=True)]
        for other in ("bare", "trainer", "unrecorded")
    }
    return {
        "model": size,
        "pairs": pairs,
        "steps": steps,
        "cpu_ms_per_step": {name: round(1000 * statistics.median(values), 3) for name, values in seconds.items()},
        "over_bare": spread(ratios["bare"]),
        "over_trainer": spread(ratios["trainer"]),
        "recording_over_none": spread(ratios["unrecorded"]),
        "added_ms_over_bare": round(
            1000 * (statistics.median(seconds["heliostat"]) - statistics.median(seconds["bare"])), 3
        ),
        "trainer_adds_ms_over_bare": round(
            1000 * (statistics.median(seconds["trainer"]) - statistics.median(seconds["bare"])), 3
        ),
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"min": round(min(values), 3), "median": round(statistics.median(values), 3), "max": round(max(values), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        for size, steps in (("17M", options.steps), ("tiny", 10 * options.steps)):
            print(json.dumps(measure(size, options.pairs, steps, Path(folder))), file=sys.stdout, flush=True)


if __name__ == "__main__":
    main()
