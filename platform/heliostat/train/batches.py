"""What a rank is fed: its rows of each global batch, collated."""

from __future__ import annotations

import numpy as np

from heliostat.data.loader import Cursor, Loader, open_split
from heliostat.data.order import Order, Source
from heliostat.data.prepare import Prepared
from heliostat.parallel.context import padded_length, split_batch
from heliostat.parallel.mesh import Layout
from heliostat.recipe import Recipe
from heliostat.tasks import Batch, Rows, Task


class Batches:
    """This rank's micro-batches of a split, on the CPU."""

    def __init__(self, recipe: Recipe, task: Task, layout: Layout, loader: Loader, train: bool) -> None:
        self.recipe, self.task, self.layout, self.loader, self.train = recipe, task, layout, loader, train

    def __call__(self, cursor: Cursor) -> list[Batch]:
        parallelism = self.recipe.parallelism
        rows = self.loader.read(
            cursor, self.layout.coordinate, self.recipe.training.micro_batch_size, fill=parallelism.pipeline > 1
        )
        collated = [self.task.collate(item, self.train, cursor.epoch, self._padded_length(item)) for item in rows]
        if parallelism.context > 1:
            collated = [split_batch(batch, parallelism.context, self.layout.context_rank) for batch in collated]
        return collated

    def _padded_length(self, rows: Rows) -> int | None:
        """Pipelines send activations of one shape, context peers and, under sequence parallelism, tensor peers hold
        equal shares of a sequence; others leave the length to the task."""
        parallelism, length = self.recipe.parallelism, self.recipe.data.sequence_length
        if parallelism.context > 1 or parallelism.sequence_parallel:
            longest = length if parallelism.pipeline > 1 else int(np.max(rows.column("length").to_numpy(), initial=0))
            return padded_length(
                longest, parallelism.context, parallelism.tensor if parallelism.sequence_parallel else 1
            )
        return length if parallelism.pipeline > 1 else None


def validation_loader(recipe: Recipe, prepared: Prepared, layout: Layout) -> Loader:
    """Sorted by length, and in batches that every rank has a share of."""
    table, limit = open_split(prepared.folder, "validation"), recipe.data.validation_limit
    if limit is not None and limit < table.num_rows:
        table = table.take(Order([Source(table.num_rows)], 0, limit).rows(0, 0, limit))
    table = table.sort_by("length")
    at_once = 4 if recipe.parallelism.pipeline == 1 else recipe.parallelism.pipeline
    return Loader(table, 0, recipe.training.micro_batch_size * layout.replicas * at_once, shuffle=False)
