"""What a prediction takes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from heliostat.data.loader import open_split
from heliostat.models import bundle as bundles
from heliostat.predictor import Predictor
from heliostat.train.loop import train
from tests.recipes import prepared, tiny_bert


def test_latency_is_that_of_one_row(tmp_path: Path) -> None:
    """A model that sleeps for 30 ms a call, and now and then for much longer."""
    recipe = tiny_bert(tmp_path, **{"schedule.max_steps": 1})
    data = prepared(recipe)
    predictor = Predictor(bundles.read(Path(train(recipe, data.folder, tmp_path / "run")["bundle"])))
    rows: list[int] = []

    def sleep(_model: object, _inputs: object, kwargs: dict[str, object]) -> None:
        rows.append(len(kwargs["input_ids"]))  # type: ignore[arg-type]
        time.sleep(0.3 if len(rows) % 10 == 1 else 0.03)

    predictor.model.register_forward_pre_hook(sleep, with_kwargs=True)
    assert predictor.latency_s(open_split(data.folder, "validation")) == pytest.approx(0.04, abs=0.01)
    assert set(rows) == {1}
