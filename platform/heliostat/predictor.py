"""A bundle that answers: requests in, predictions out. Serving and explaining ask models only so."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from heliostat import evaluate, installed
from heliostat.models.bundle import Bundle, verify
from heliostat.recipe import Deploy, Refused, override
from heliostat.tasks import Batch, get_task

CPU = torch.device("cpu")
TOKENS = 512
"""Of a forward pass on processors, at most, if it is not one row: more are not computed faster, and are padded more."""
TIMED, WARM_UP = 32, 4
"""Predictions whose time is taken, and those before them whose is not."""


def loading(settings: Deploy) -> Callable[[Bundle], Any]:
    """What makes the model that a replica computes with. Raises Refused where a package is missing."""
    if settings.precision != "int8":
        return Bundle.model
    installed.check_precision(settings)
    from heliostat import int8  # whose packages are an extra

    return partial(int8.model, settings=settings)


class Predictor:
    """A bundle's model, task and processor. Not for use by several threads at once."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        bfloat16: bool = False,
        device: torch.device = CPU,
        load: Callable[[Bundle], Any] = Bundle.model,
    ) -> None:
        """`threads`: processors of one prediction (None: as torch is set). `load` makes what computes. Raises Refused
        for a bundle whose files are not those of its card."""
        verify(bundle)
        self.bundle, self.threads, self.bfloat16, self.device = bundle, threads, bfloat16, device
        # Packing would join the inputs of a language model into rows that belong to none of them.
        self.task = get_task(override(bundle.recipe, {"data.pack": False}), bundle.card["facts"])
        self.processor = bundle.processor()
        self.model: Any = load(bundle).to(device)

    def predict(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """One prediction for each input, in their order. Raises Refused, naming an input that is wrong."""
        return self.predict_rows(self.rows(inputs)) if inputs else []

    def rows(self, inputs: list[dict[str, Any]]) -> pa.Table:
        """The inputs as prepared rows, one each. Raises Refused, naming an input that is wrong."""
        try:
            table = self._prepare(inputs)
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair; UTF-8 cannot
            raise Refused("inputs", f"a text is not valid Unicode: {error.reason}") from error
        if table.num_rows != len(inputs):  # a task may drop rows that hold nothing to predict
            empty = next((i for i, item in enumerate(inputs) if self._prepare([item]).num_rows != 1), 0)
            raise Refused(f"inputs.{empty}", "nothing is left of it once it is tokens")
        return table

    def _prepare(self, inputs: list[dict[str, Any]]) -> pa.Table:
        return self.task.prepare(self.task.parse(inputs), self.processor, "the request")

    @torch.inference_mode()
    def predict_rows(self, table: pa.Table) -> list[dict[str, Any]]:
        """One prediction for each prepared row, in their order; rows of like length share a forward pass."""
        if self.threads and torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)  # here, since the count belongs to the thread that computes
        predictions: list[dict[str, Any]] = [{}] * table.num_rows
        for numbers, batch in self._batches(table):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
                outputs = self.task.outputs(self.model, batch)
            found = self.task.predictions(outputs, batch)
            for number, prediction in zip(numbers.tolist(), found, strict=True):
                predictions[number] = prediction
        return predictions

    @torch.inference_mode()
    def embeddings(self, table: pa.Table) -> np.ndarray | None:
        """(N, H) of prepared rows, in their order; None where the task has none."""
        found: np.ndarray | None = None
        for numbers, batch in self._batches(table):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
                embedded = self.task.embeddings(self.model, batch)
            if embedded is None:
                return None
            if found is None:
                found = np.empty((table.num_rows, embedded.shape[1]), np.float32)
            found[numbers] = embedded.float().cpu().numpy()
        return found

    def _batches(self, table: pa.Table) -> Iterator[tuple[np.ndarray, Batch]]:
        """The rows that share a forward pass, with their numbers."""
        tokens = TOKENS if self.device.type == "cpu" else None
        for numbers, batch in evaluate.batches(self.task, table, tokens=tokens):
            yield numbers, batch.to(self.device)

    def latency_s(self, table: pa.Table) -> float:
        """Median seconds from one prepared row to its prediction, over the first rows of the table in turn."""
        taken = []
        for number in range(WARM_UP + TIMED):
            row = table.slice(number % table.num_rows, 1)
            begun = time.perf_counter()
            self.predict_rows(row)
            taken.append(time.perf_counter() - begun)
        return statistics.median(taken[WARM_UP:])
