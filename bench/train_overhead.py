"""What the training loop costs over a bare PyTorch loop, and beside Hugging Face's Trainer: CPU seconds a step at one
thread, on the same model and batches, in turn: step by step, or twenty at once of the tiny model. Prints medians, and
quartiles of ratios paired by turn.

    python -m bench.train_overhead [--turns 60]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers

from bench.turns import compared, cpu_ms, in_turn
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


def ours(begin: Callable[[], None], recipe: Recipe, data: Prepared, run_dir: Path, **options: Any) -> None:
    def at_each_step() -> bool:
        begin()
        return False

    train(recipe, data.folder, run_dir, should_stop=at_each_step, write_bundle=False, **options)


_here = threading.local()
_record = Run._record


def _record_elsewhere(self: Run, *args: Any) -> None:
    if not getattr(_here, "unrecorded", False):
        _record(self, *args)


def unrecorded(begin: Callable[[], None], recipe: Recipe, data: Prepared, run_dir: Path) -> None:
    """Ours, but no step's figures are read or written."""
    _here.unrecorded = True
    with mock.patch.object(Run, "_record", _record_elsewhere):
        ours(begin, recipe, data, run_dir)


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


def bare(begin: Callable[[], None], recipe: Recipe, data: Prepared) -> None:
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
    for batch in held:
        begin()
        logits = model(input_ids=batch["input_ids"]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm or 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


class Begins(transformers.TrainerCallback):
    def __init__(self, begin: Callable[[], None]) -> None:
        self.begin = begin

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begin()


def trainer(begin: Callable[[], None], recipe: Recipe, data: Prepared, run_dir: Path) -> None:
    """Hugging Face's Trainer on the same rows (it shifts the labels itself)."""
    held = [row for batch in batches(recipe, data) for row in batch["input_ids"]]
    rows = [{"input_ids": row, "labels": row} for row in held]
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
        callbacks=[Begins(begin)],
        data_collator=lambda items: {key: torch.stack([item[key] for item in items]) for key in items[0]},
    )
    run.remove_callback(transformers.PrinterCallback)
    run.train()


def measure(size: str, turns: int, steps: int, folder: Path) -> dict[str, Any]:
    recipe = recipe_for(size, folder / "storage", turns * steps)
    data, _ = prepare(recipe)
    seconds = in_turn(
        {
            "heliostat": lambda begin: ours(begin, recipe, data, folder / f"{size}-ours"),
            "bare": lambda begin: bare(begin, recipe, data),
            "trainer": lambda begin: trainer(begin, recipe, data, folder / f"{size}-trainer"),
            "unrecorded": lambda begin: unrecorded(begin, recipe, data, folder / f"{size}-unrecorded"),
        },
        steps,
    )
    return {
        "model": size,
        "turns": len(seconds["bare"]),
        "steps_a_turn": steps,
        "cpu_ms_per_step": cpu_ms(seconds),
        "over_bare": compared(seconds, "heliostat", "bare"),
        "over_trainer": compared(seconds, "heliostat", "trainer"),
        "recording_over_none": compared(seconds, "heliostat", "unrecorded"),
        "trainer_over_bare": compared(seconds, "trainer", "bare"),
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"min": round(min(values), 3), "median": round(statistics.median(values), 3), "max": round(max(values), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        for size, steps in (("17M", 1), ("tiny", 20)):
            print(json.dumps(measure(size, options.turns, steps, Path(folder))), flush=True)


if __name__ == "__main__":
    main()
