"""How fast training rows are read: tokens a second of the loader on a shuffled, packed mixture of three sources, and of
others on the same rows, in interleaved blocks (A B C A B C …), on one thread. Prints medians and paired ratios.

    python -m bench.input [--rows 500000] [--pairs 5]

`memory_map` is the least there is: rows of a NumPy memory map, by a permutation that is held in memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from bench.train_overhead import spread
from heliostat.data.loader import Coordinate, Cursor, training_loader
from heliostat.data.prepare import Prepared
from heliostat.recipe import Recipe, override
from pipelines.recipes.language import tiny_lm

LENGTH, ROWS_A_BATCH, VOCABULARY = 512, 64, 32_000
SHARES = {"books": (0.6, 0.5), "code": (0.3, 0.3), "web": (0.1, 0.2)}
"""Of each source: its part of the rows, and its weight."""
BATCHES, FEW_BATCHES = 1500, 40
"""In one block, and in one of those that are slow."""
Batches = Generator[dict[str, Any], None, None]
Way = Callable[[Path, Recipe, Prepared], Batches]


def make_data(folder: Path, rows: int) -> tuple[Recipe, Prepared]:
    """Random tokens as prepared rows, in Parquet files of 50,000; and the same as a plain matrix, `rows.bin`."""
    random = np.random.default_rng(0)
    (folder / "train").mkdir(parents=True)
    counts = {name: int(rows * part) for name, (part, _) in SHARES.items()}
    with (folder / "rows.bin").open("wb") as matrix:
        for source, count in enumerate(counts.values()):
            for part, start in enumerate(range(0, count, 50_000)):
                ids = random.integers(0, VOCABULARY, (min(50_000, count - start), LENGTH), np.int32)
                matrix.write(ids.tobytes())
                offsets = pa.array(np.arange(0, ids.size + 1, LENGTH, dtype=np.int32))
                table = pa.table(
                    {
                        "input_ids": pa.ListArray.from_arrays(offsets, pa.array(ids.reshape(-1))),
                        "length": pa.array(np.full(len(ids), LENGTH, dtype=np.int32)),
                        "sample_id": pa.array(np.arange(len(ids)) | (source << 52) | (part << 32)),
                    }
                )
                file = folder / "train" / f"train-{source:03d}-{part:05d}.parquet"
                pq.write_table(table, file, use_dictionary=False, compression="none")
    mixture = {name: {"source": "made here", "weight": weight} for name, (_, weight) in SHARES.items()}
    batch = {"training.global_batch_size": ROWS_A_BATCH, "training.micro_batch_size": ROWS_A_BATCH}
    recipe = override(tiny_lm(), {"data.train": "", "data.mixture": mixture, "data.sequence_length": LENGTH} | batch)
    return recipe, Prepared(folder, {"fingerprint": "", "facts": {"padding_id": 0}, "sources": counts})


def shifted(ids_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inputs and labels, as a language model is trained on them."""
    labels_BT = torch.empty_like(ids_BT)
    labels_BT[:, :-1], labels_BT[:, -1] = ids_BT[:, 1:], -100
    return {"input_ids": ids_BT, "labels": labels_BT}


def matrix(folder: Path) -> np.ndarray:
    return np.memmap(folder / "rows.bin", np.int32, "r").reshape(-1, LENGTH)


def heliostat_rows(folder: Path, recipe: Recipe, data: Prepared) -> Batches:
    """What the loader gives to a task: rows, not yet a batch."""
    loader, cursor = training_loader(recipe, data), Cursor()
    while True:
        (rows,) = loader.read(cursor, Coordinate(), ROWS_A_BATCH)
        column = rows.column("input_ids")
        offsets = column.offsets.to_numpy()
        yield {"input_ids": column.values.to_numpy()[offsets[0] : offsets[-1]].reshape(-1, LENGTH)}  # not a copy
        cursor = loader.next(cursor)


def heliostat(folder: Path, recipe: Recipe, data: Prepared) -> Batches:
    """As the loop reads them."""
    loader, task, cursor = training_loader(recipe, data), data.task(recipe), Cursor()
    while True:
        (rows,) = loader.read(cursor, Coordinate(), ROWS_A_BATCH)
        batch = task.collate(rows, train=True, epoch=cursor.epoch)
        yield batch.inputs | batch.targets
        cursor = loader.next(cursor)


def memory_map_rows(folder: Path, recipe: Recipe, data: Prepared) -> Batches:
    rows = matrix(folder)
    while True:
        order = np.random.default_rng().permutation(len(rows))
        for start in range(0, len(rows) - ROWS_A_BATCH, ROWS_A_BATCH):
            yield {"input_ids": rows[order[start : start + ROWS_A_BATCH]]}


def memory_map(folder: Path, recipe: Recipe, data: Prepared) -> Batches:
    for batch in memory_map_rows(folder, recipe, data):
        yield shifted(torch.from_numpy(batch["input_ids"].astype(np.int64)))


class MatrixRows(torch.utils.data.Dataset[torch.Tensor]):
    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.rows[index].astype(np.int64))


def torchdata(folder: Path, recipe: Recipe, data: Prepared, workers: int = 0) -> Batches:
    """StatefulDataLoader over a dataset of single rows, with weights by PyTorch's sampler."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    weights = [weight / data.meta["sources"][name] for name, (_, weight) in SHARES.items()]
    by_row = np.repeat(weights, list(data.meta["sources"].values()))
    while True:
        row_weights: Any = torch.from_numpy(by_row)  # declared as a sequence
        sampler = torch.utils.data.WeightedRandomSampler(row_weights, BATCHES * ROWS_A_BATCH)
        rows = MatrixRows(matrix(folder))
        for ids_BT in StatefulDataLoader(rows, ROWS_A_BATCH, sampler=sampler, num_workers=workers):
            yield shifted(ids_BT)


def torchdata_two_workers(folder: Path, recipe: Recipe, data: Prepared) -> Batches:
    return torchdata(folder, recipe, data, workers=2)


def datasets(folder: Path, recipe: Recipe, data: Prepared) -> Batches:
    """Hugging Face datasets, interleaved by probability, behind PyTorch's DataLoader."""
    from datasets import interleave_datasets, load_dataset

    sources = [
        load_dataset(
            "parquet",
            data_files=[str(folder / "train" / f"train-{source:03d}-00000.parquet")],  # copies them once
            split="train",
            columns=["input_ids"],
            cache_dir=str(folder / "cache"),
        )
        for source in range(len(SHARES))
    ]
    mixed = interleave_datasets(sources, [weight for _, weight in SHARES.values()], seed=0).with_format("torch")
    while True:
        for batch in torch.utils.data.DataLoader(mixed, ROWS_A_BATCH, shuffle=True):
            yield shifted(batch["input_ids"])


def ray_data(folder: Path, recipe: Recipe, data: Prepared) -> Batches:
    """`iter_torch_batches` with a shuffle buffer; without weights, which Ray Data does not have."""
    import ray

    if not ray.is_initialized():
        ray.init("local", num_cpus=2, object_store_memory=1 << 30, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    read = ray.data.read_parquet(str(folder / "train"), shuffle="files").select_columns(["input_ids"])
    while True:
        for batch in read.iter_torch_batches(
            batch_size=ROWS_A_BATCH, local_shuffle_buffer_size=32 * ROWS_A_BATCH, drop_last=True
        ):
            yield shifted(batch["input_ids"].long())


FAST: dict[str, Way] = {
    "heliostat": heliostat,
    "memory_map": memory_map,
    "heliostat_rows": heliostat_rows,
    "memory_map_rows": memory_map_rows,
}
SLOW: dict[str, tuple[Way, str]] = {
    "torchdata": (torchdata, "torchdata"),
    "torchdata_two_workers": (torchdata_two_workers, "torchdata"),
    "datasets": (datasets, "datasets"),
    "ray_data": (ray_data, "ray"),
}
"""With the package each needs."""


def tokens_per_s(batches: Batches, count: int) -> float:
    started = time.perf_counter()
    tokens = sum(math.prod(next(batches)["input_ids"].shape) for _ in range(count))
    return tokens / (time.perf_counter() - started)


def block(way: Way, count: int, *given: Any) -> float:
    """By itself: what a way has running beside it, such as workers that read ahead, starts and ends here."""
    batches = way(*given)
    try:
        tokens_per_s(batches, 4)
        return tokens_per_s(batches, count)
    finally:
        batches.close()


def measure(rows: int, pairs: int, folder: Path) -> dict[str, Any]:
    given = (folder, *make_data(folder, rows))
    missing = sorted({package for _, package in SLOW.values() if not importlib.util.find_spec(package)})
    ways = {name: (way, BATCHES) for name, way in FAST.items()}
    ways |= {name: (way, FEW_BATCHES) for name, (way, package) in SLOW.items() if package not in missing}
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for pair in range(-1, pairs):  # the first warms up
        for name, (way, count) in ways.items():
            speed = block(way, count, *given)
            if pair >= 0:
                speeds[name].append(speed)

    def over(one: str, other: str) -> dict[str, float]:
        return spread([a / b for a, b in zip(speeds[one], speeds[other], strict=True)])

    return {
        "tokens": rows * LENGTH,
        "pairs": pairs,
        "million_tokens_per_s": {name: round(statistics.median(values) / 1e6, 3) for name, values in speeds.items()},
        "over": {name: over("heliostat", name) for name in ways if name not in ("heliostat", "heliostat_rows")},
        "rows_over_memory_map_rows": over("heliostat_rows", "memory_map_rows"),
        "not_installed": missing,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(options.rows, options.pairs, Path(folder))), file=sys.stdout, flush=True)


if __name__ == "__main__":
    main()
