"""Mapping functions over parts of data on the cluster, with Ray Data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from heliostat.data.sources import open_source
from heliostat.models import bundle as bundles
from heliostat.predictor import Predictor


def run_on_ray(function: Callable[[Any], Any], items: list[Any]) -> list[Any]:
    """`[function(item) for item in items]`, spread over the cluster. A handful of items is not worth the start."""
    if len(items) <= 4:
        return [function(item) for item in items]
    import ray

    ray.data.DataContext.get_current().enable_progress_bars = False
    numbered = ray.data.from_items(
        [{"number": i, "item": item} for i, item in enumerate(items)], override_num_blocks=min(len(items), 256)
    )
    done = numbered.map(lambda row: {"number": row["number"], "value": function(row["item"])}).take_all()
    return [row["value"] for row in sorted(done, key=lambda row: row["number"])]


class _Predict:
    def __init__(self, bundle: str, folder: str) -> None:
        self.bundle, self.folder = bundle, folder

    def __call__(self, item: tuple[int, Any]) -> int:
        index, part = item
        bundle = bundles.read(Path(self.bundle))
        table = part.read()
        predictor = Predictor(bundle)
        columns = [name for name in predictor.task.example() if name in table.column_names]
        predictions = predictor.predict(table.select(columns).to_pylist())
        for name in predictions[0]:
            if name != "scores":
                table = table.append_column(f"predicted_{name}", pa.array([row[name] for row in predictions]))
        target = Path(self.folder) / f"part-{index:05d}.parquet"
        beside = target.with_name(f".{target.name}")
        pq.write_table(table, beside)
        beside.rename(target)
        return table.num_rows


def predict(bundle: Path, source: str, folder: Path) -> int:
    """Predictions for every row of a source, as Parquet in `folder`; returns the number of rows."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = list(enumerate(open_source(source, "input")))
    return sum(run_on_ray(_Predict(str(bundle), str(folder)), parts))
