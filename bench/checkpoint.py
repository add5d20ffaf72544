"""How long training stands still for a checkpoint, and how much slower it is while one is written: ours against
torch.save, dcp.save and dcp.async_save with and without a stager that keeps its memory. One process trains a Llama of
about 100 M parameters with AdamW's state (1.2 GB together), 8 × 512 tokens a step, float32, all threads; after a quiet
step each way saves in turn (A B C … A B C …), the first round being warm-up, and steps go on until the files are there.
Prints stalls in quiet steps, and the steps beside a write in quiet steps.

    python -m bench.checkpoint [--rounds 3] [--rows 8] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import transformers
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

from bench.train_overhead import spread
from heliostat.train.checkpoint import Place, Writer, newest

CONFIG: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "vocab_size": 16384,
    "tie_word_embeddings": True,
}
SEQUENCE_LENGTH = 512
Way = Callable[[Path, int], Callable[[], bool]]
"""Begins a checkpoint in a folder, of a step; what it returns says whether the files are there."""


class Training:
    def __init__(self, rows: int) -> None:
        torch.manual_seed(0)
        self.model = transformers.LlamaForCausalLM._from_config(
            transformers.LlamaConfig(**CONFIG), attn_implementation="sdpa"
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.ids_BT = torch.randint(0, CONFIG["vocab_size"], (rows, SEQUENCE_LENGTH))

    def step(self) -> float:
        """Returns its seconds."""
        begun = time.perf_counter()
        self.model(input_ids=self.ids_BT, labels=self.ids_BT, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - begun

    def state(self) -> dict[str, Any]:
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        model, optimizer = get_state_dict(self.model, self.optimizer, options=options)
        return {"model": model, "optimizer": optimizer}


def ways(training: Training) -> dict[str, Way]:
    stager = DefaultStager(
        StagingOptions(
            use_pinned_memory=False, use_shared_memory=True, use_async_staging=False, use_non_blocking_copy=False
        )
    )
    writer: list[Writer] = []

    def ours(folder: Path, step: int) -> Callable[[], bool]:
        if not writer:
            writer.append(Writer(Place.at(folder), keep=1))
        writer[0].save(step, {}, training.model, training.optimizer)

        def there() -> bool:
            found = newest(folder)
            return found is not None and found.step == step

        return there

    def torch_save(folder: Path, step: int) -> Callable[[], bool]:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(training.state(), folder / "checkpoint.pt")
        return lambda: True

    def dcp_save(folder: Path, step: int) -> Callable[[], bool]:
        dcp.save(training.state(), checkpoint_id=folder, no_dist=True)
        return lambda: True

    def async_save(**options: Any) -> Way:
        def begin(folder: Path, step: int) -> Callable[[], bool]:
            answer: Any = dcp.async_save(training.state(), checkpoint_id=folder, no_dist=True, **options)
            future: Future[Any] = answer if isinstance(answer, Future) else answer.upload_completion
            return future.done

        return begin

    return {
        "ours": ours,
        "torch.save": torch_save,
        "dcp.save": dcp_save,
        "dcp.async_save": async_save(),
        "dcp.async_save, cached stager": async_save(async_stager=stager),
    }


def measure(rounds: int, rows: int, folder: Path) -> dict[str, Any]:
    training = Training(rows)
    training.step()
    stalls: dict[str, list[float]] = defaultdict(list)
    beside: dict[str, list[float]] = defaultdict(list)
    steps = []
    each_way = ways(training)
    for round_ in range(rounds + 1):
        for number, (name, begin) in enumerate(each_way.items()):
            quiet = training.step()
            started = time.perf_counter()
            there = begin(folder / str(number), round_ + 1)
            stall = time.perf_counter() - started
            slowed = []
            while not there():
                slowed.append(training.step())
            if round_:
                steps.append(quiet)
                stalls[name].append(stall / quiet)
                beside[name].extend(each / quiet for each in slowed)
            print(f"{name}: {stall:.3f} s, {stall / quiet:.3f} of a step, then", [f"{s:.2f}" for s in slowed],
                  file=sys.stderr)  # fmt: skip
    parameters = sum(p.numel() for p in training.model.parameters())
    return {
        "parameters": parameters,
        "step_s": statistics.median(steps),
        "stall_steps": {name: spread(values) for name, values in stalls.items()},
        "steps_beside_a_write": {name: spread(values) for name, values in beside.items() if values},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="on the disk to write to (default: the system's for such files)")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # PyTorch's, about saving in one process
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        print(json.dumps(measure(arguments.rounds, arguments.rows, Path(folder)), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
