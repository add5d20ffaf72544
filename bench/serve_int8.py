"""What `deploy.precision=int8` gains: tokens a second of a classifier in float32, bfloat16 and int8, as a replica
computes batches of 16 texts, with one thread and with two.

The model is all-MiniLM-L6-v2's encoder (22.7 M parameters) with a head that was never trained; its texts are reviews,
cut to `--tokens`. Rounds are interleaved (A B C A B C …). Prints a line of JSON for each number of threads: medians of
tokens a second, padding left out, and quartiles of the ratios to float32 of the same round.

    python -m bench.serve_int8 [--rounds 15] [--tokens 128]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pyarrow as pa
import torch

from bench.turns import ratios
from heliostat import int8
from heliostat.data.packaged import packaged_table
from heliostat.models import bundle as bundles
from heliostat.models.bundle import Bundle
from heliostat.models.load import build_model, processor_facts
from heliostat.predictor import Predictor
from heliostat.recipe import build
from heliostat.tasks import get_task

BATCH = 16
THREADS = (1, 2)
WARM_UP = 2
"""Rounds that are not counted."""


def encoder(folder: Path, max_length: int) -> Bundle:
    recipe = build(
        {
            "name": "bench-int8",
            "task": "text_classification",
            "model": {"name": "packaged:minilm", "max_length": max_length},
        }
    )
    processor = get_task(recipe).processor()
    task = get_task(recipe, {"labels": ["negative", "positive"]} | processor_facts(processor))
    path, state = folder / "bundle", build_model(task).state_dict()
    return bundles.write(path, task, state, processor, data={}, metrics={}, lineage={})


def ways(bundle: Bundle, file: Path, threads: int) -> dict[str, Predictor]:
    def loaded(each: Bundle) -> int8.Int8Model:
        return int8.Int8Model(each, file, threads)

    return {
        "float32": Predictor(bundle, threads=threads),
        "bfloat16": Predictor(bundle, threads=threads, bfloat16=True),
        "int8": Predictor(bundle, threads=threads, load=loaded),
    }


def measure(predictors: dict[str, Predictor], batches: list[pa.Table], rounds: int) -> dict[str, list[float]]:
    """Tokens a second, by way and round. A round is one batch, the same one for all."""
    found: dict[str, list[float]] = {name: [] for name in predictors}
    for number in range(WARM_UP + rounds):
        rows = batches[number % len(batches)]
        tokens = sum(rows.column("length").to_pylist())
        for name, predictor in predictors.items():
            begun = time.perf_counter()
            predictor.predict_rows(rows)
            found[name].append(tokens / (time.perf_counter() - begun))
    return {name: values[WARM_UP:] for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=128, help="of a text, at most")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle, file = encoder(Path(folder), options.tokens), Path(folder) / "int8.onnx"
        texts = packaged_table("reviews/test", "data.test").column("text").to_pylist()[: 12 * BATCH]
        rows = Predictor(bundle).rows([{"text": text} for text in texts])
        onnx.save(int8.converted(bundle, rows.slice(8 * BATCH)), file)
        rows = rows.slice(0, 8 * BATCH)
        batches = [rows.slice(first, BATCH) for first in range(0, rows.num_rows, BATCH)]
        for threads in THREADS:
            speeds = measure(ways(bundle, file, threads), batches, options.rounds)
            line: dict[str, Any] = {
                "threads": threads,
                "batch": BATCH,
                "tokens_per_row": round(sum(rows.column("length").to_pylist()) / rows.num_rows, 1),
                "rounds": options.rounds,
                "torch": torch.__version__,
                "onnxruntime": onnxruntime.__version__,
                "tokens_per_s": {name: round(statistics.median(values)) for name, values in speeds.items()},
            }
            line |= {f"{name}_over_float32": ratios(speeds[name], speeds["float32"]) for name in ("int8", "bfloat16")}
            print(json.dumps(line), file=sys.stdout, flush=True)


if __name__ == "__main__":
    main()
