"""What a prediction takes."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from heliostat.data.loader import open_split
from heliostat.models import bundle as bundles
from heliostat.predictor import TOKENS, Predictor
from heliostat.train.loop import train
from tests.bundles import text_bundle
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


def test_rows_of_like_length_share_a_forward_pass(tmp_path: Path) -> None:
    """On processors few of them; the predictions are those of each row alone, in the rows' order."""
    bundle = text_bundle(tmp_path)
    rows = open_split(Path(bundle.card["data"]["folder"]), "test")
    predictor, shapes = Predictor(bundle, threads=1), list[tuple[int, int]]()

    def note(_model: object, _inputs: object, kwargs: dict[str, object]) -> None:
        mask_BT = kwargs["attention_mask"]
        assert isinstance(mask_BT, torch.Tensor)
        shapes.append((len(mask_BT), int(mask_BT.sum(1).max())))

    with predictor.model.register_forward_pre_hook(note, with_kwargs=True):
        together = predictor.predict_rows(rows)
    assert sum(number for number, _ in shapes) == rows.num_rows
    assert all(number * length <= TOKENS for number, length in shapes)
    assert len(shapes) <= 2 * rows.num_rows * max(length for _, length in shapes) / TOKENS
    padded, at_once = sum(number * length for number, length in shapes), rows.num_rows * max(x for _, x in shapes)
    assert padded < 0.75 * at_once
    alone = [predictor.predict_rows(rows.slice(number, 1))[0] for number in range(rows.num_rows)]
    assert [each["label"] for each in together] == [each["label"] for each in alone]
    np.testing.assert_allclose([each["score"] for each in together], [each["score"] for each in alone], rtol=1e-4)
