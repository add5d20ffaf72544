"""What tasks give to be watched: of prepared rows, and of what the model makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from heliostat.models import bundle as bundles
from heliostat.models.load import build_model
from heliostat.predictor import Predictor
from heliostat.recipe import build
from heliostat.tasks import Rows, get_task
from heliostat.train.loop import train
from tests.bundles import image_bundle, tabular_bundle
from tests.recipes import WORDS, prepared, tiny_bert

VIT = {
    "model_type": "vit",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "patch_size": 4,
}
IMAGES = {"labels": ["a", "b"], "image_shape": [3, 8, 8], "mean": [0.5] * 3, "std": [0.25] * 3}


def test_texts(tmp_path: Path) -> None:
    recipe = tiny_bert(tmp_path, **{"schedule.max_steps": 1, "model.max_length": 20})
    bundle = bundles.read(Path(train(recipe, prepared(recipe).folder, tmp_path / "run")["bundle"]))
    predictor = Predictor(bundle)
    texts = ["sun", "the sun", " ".join(WORDS[:8]), "qzxj vwkq", " ".join(WORDS * 3)]
    rows = predictor.rows([{"text": text} for text in texts])
    watched = predictor.task.watched(rows)
    tokens = [len(predictor.processor(text)["input_ids"]) for text in texts]
    assert watched["length"].tolist() == [*tokens[:4], 20.0]
    words = [len(text.split()) for text in texts]
    assert watched["tokens a word"][:4].tolist() == [tokens[row] / words[row] for row in range(4)]
    assert np.isnan(watched["tokens a word"][4]), "it was cut"
    assert watched["tokens a word"][3] > 1.5 * watched["tokens a word"][2], "words that it does not know"

    found = predictor.embeddings(rows)
    assert found is not None
    encoder = predictor.model.bert
    for row, text in enumerate(texts):  # each alone, so that nothing is padded
        ids = predictor.processor(text, truncation=True, max_length=20, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            expected = encoder(input_ids=ids).last_hidden_state[0].mean(0)
        assert torch.allclose(torch.from_numpy(found[row]), expected, atol=1e-5)


def test_tables(tmp_path: Path) -> None:
    predictor = Predictor(bundles.read(tabular_bundle(tmp_path)))
    inputs = [{"height": 0.25, "width": 3.0}, {"height": 1.5, "width": None}]
    rows = predictor.rows(inputs)
    watched = predictor.task.watched(rows.slice(1))
    assert watched["height"].tolist() == [1.5]
    assert np.isnan(watched["width"]).all()
    assert predictor.task.watched(rows)["width"][0] == 3.0
    found = predictor.embeddings(rows)
    assert found is not None
    with torch.inference_mode():  # what its head makes of them are the answers
        scores = predictor.model.classifier(torch.from_numpy(found)).softmax(-1)
    expected = [list(each["scores"].values()) for each in predictor.predict(inputs)]
    assert torch.allclose(scores, torch.tensor(expected), atol=1e-6)


def test_images(tmp_path: Path) -> None:
    predictor = Predictor(bundles.read(image_bundle(tmp_path)))
    pixels = np.random.default_rng(0).integers(0, 256, (5, 64), np.uint8)
    rows = pa.table(
        {
            "pixels": pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), 64),
            "length": pa.array(np.ones(5, np.int32)),
        }
    )
    watched = predictor.task.watched(rows)
    assert set(watched) == {"mean of channel 0", "deviation of channel 0"}
    assert watched["mean of channel 0"] == pytest.approx(pixels.mean(1) / 255)
    assert watched["deviation of channel 0"] == pytest.approx(pixels.std(1) / 255)
    found = predictor.embeddings(rows)
    assert found is not None
    with torch.inference_mode():  # the model pools by itself before its head
        scores = predictor.model.classifier(torch.from_numpy(found)[..., None, None]).softmax(-1)
    expected = [list(each["scores"].values()) for each in predictor.predict_rows(rows)]
    assert torch.allclose(scores, torch.tensor(expected), atol=1e-6)


def test_patches_and_channels() -> None:
    recipe = build({"name": "r", "task": "image_classification", "model": {"config": VIT}})
    task = get_task(recipe, IMAGES)
    pixels = np.zeros((2, 3, 64), np.uint8)
    pixels[1, 2, ::2] = 255
    stored = pa.table(
        {
            "pixels": pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), 192),
            "length": pa.array(np.ones(2, np.int32)),
        }
    )
    watched = task.watched(stored)
    assert [watched[f"mean of channel {channel}"].tolist() for channel in range(3)] == [[0, 0], [0, 0], [0, 0.5]]
    assert watched["deviation of channel 2"].tolist() == [0, 0.5]
    model = build_model(task).eval()
    batch = task.collate(Rows(stored, np.arange(2), np.ones(2, np.float32)), train=False)
    with torch.inference_mode():
        found = task.embeddings(model, batch)
    assert found is not None
    assert found.shape == (2, VIT["hidden_size"])
