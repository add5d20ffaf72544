"""What the built-in tasks promise: losses as sums, refusals in words, augmentation without history."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from heliostat.models.load import transformers_config
from heliostat.recipe import Model, Recipe, Refused, build
from heliostat.tasks import Batch, Rows, get_task, pad_lists
from heliostat.tasks.image_classification import augment

RESNET = {
    "model_type": "resnet",
    "layer_type": "basic",
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
}
VIT = {
    "model_type": "vit",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
IMAGES = {"labels": ["a", "b", "c"], "image_shape": [1, 8, 8], "mean": [0.5], "std": [0.25]}
TEXTS = {"padding_id": 0, "vocab_size": 7, "eos_token_id": 0, "bos_token_id": 0}


def recipe(task: str, **sections: Any) -> Recipe:
    return build({"name": "r", "task": task} | sections)


@pytest.mark.parametrize(
    ("config", "synchronised", "global_batch", "workers", "fine"),
    [
        (RESNET, True, 32, 2, False),
        (RESNET, True, 32, 4, True),
        (RESNET, True, 8, 1, True),
        (RESNET, False, 32, 2, True),
        (VIT, True, 32, 2, True),
    ],
)
def test_accumulation_and_synchronised_batch_norm_exclude_each_other(
    config: dict[str, Any], synchronised: bool, global_batch: int, workers: int, fine: bool
) -> None:
    task = get_task(
        recipe(
            "image_classification",
            model={"config": config, "sync_batch_norm": synchronised},
            training={"global_batch_size": global_batch, "micro_batch_size": 8},
            parallelism={"workers": workers},
        )
    )
    if fine:
        task.check()
        return
    with pytest.raises(Refused, match="gradient accumulation") as caught:
        task.check()
    assert caught.value.field == "training.micro_batch_size"
    assert "sync_batch_norm false" in caught.value.suggestion


def test_fields_that_are_not_given_follow_from_those_that_are() -> None:
    config = transformers_config(Model(config={"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}))
    assert (config.head_dim, config.num_key_value_heads) == (16, 4)
    with pytest.raises(Refused, match="no such field"):
        transformers_config(Model(config={"model_type": "llama", "hidden": 64}))


def test_unknown_tasks_are_refused() -> None:
    with pytest.raises(Refused) as caught:
        get_task(recipe("text_clasification"))
    assert caught.value.suggestion == "did you mean text_classification?"
    with pytest.raises(Refused, match="cannot import"):
        get_task(recipe("no_such_module:Task"))
    with pytest.raises(Refused, match="has no"):
        get_task(recipe("heliostat.tasks.text_classification:TextClasification"))


pictures = torch.randint(0, 256, (6, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
IDS = np.array([0, 1, 2, 5, (1 << 60) + 1, (2 << 60) + 7])


@given(st.permutations(range(6)), st.integers(1, 5), st.integers(0, 2**31 - 1), st.integers(0, 50))
def test_augmentation_is_a_function_of_seed_epoch_and_sample(order: list[int], cut: int, seed: int, epoch: int) -> None:
    whole = augment(pictures, IDS, (seed, epoch), "crop_flip")
    for part in (order[:cut], order[cut:]):
        assert torch.equal(augment(pictures[part], IDS[part], (seed, epoch), "crop_flip"), whole[part])


def test_augmentation_differs_between_epochs_seeds_and_samples() -> None:
    same = pictures[:1].expand(40, -1, -1, -1)
    ids = np.arange(40)
    drawn = augment(same, ids, (0, 0), "crop_flip")
    assert len({picture.numpy().tobytes() for picture in drawn}) > 15
    assert not torch.equal(drawn, augment(same, ids, (0, 1), "crop_flip"))
    assert not torch.equal(drawn, augment(same, ids, (1, 0), "crop_flip"))


@pytest.mark.parametrize("kind", ["crop", "crop_flip"])
def test_augmentation_shifts_by_at_most_an_eighth_and_flips_half(kind: str) -> None:
    marked = torch.zeros(400, 1, 16, 16, dtype=torch.uint8)
    marked[:, 0, 8, 4] = 255
    drawn = augment(marked, np.arange(400), (0, 0), kind)
    at = [tuple(divmod(int(image.flatten().argmax()), 16)) for image in drawn]
    rows, columns = {row for row, _ in at}, [column for _, column in at]
    assert rows == {6, 7, 8, 9, 10}
    flipped = sum(column > 8 for column in columns)
    assert {column if column < 8 else 15 - column for column in columns} == {2, 3, 4, 5, 6}
    assert flipped == 0 if kind == "crop" else 150 < flipped < 250


def image_rows(weights: list[float]) -> Rows:
    pixels = np.random.default_rng(0).integers(0, 256, (len(weights), 64)).astype(np.uint8)
    table = pa.table(
        {
            "pixels": pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), 64),
            "label": pa.array([i % 3 for i in range(len(weights))], pa.int32()),
        }
    )
    return Rows(table, np.arange(len(weights)), np.array(weights, np.float32))


def test_images_are_normalised_and_only_training_augments() -> None:
    task = get_task(recipe("image_classification", data={"augment": "crop"}), IMAGES)
    rows = image_rows([1.0] * 5)
    plain = task.collate(rows, train=False).inputs["pixel_values"]
    pixels = np.array(rows.table.column("pixels").to_pylist(), np.float32).reshape(5, 1, 8, 8)
    assert plain.numpy() == pytest.approx((pixels / 255 - 0.5) / 0.25, abs=1e-6)
    assert not torch.equal(task.collate(rows, train=True).inputs["pixel_values"], plain)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_classification_loss_sums_rows_by_weight(smoothing: float) -> None:
    task = get_task(recipe("image_classification", training={"label_smoothing": smoothing}), IMAGES)
    batch = task.collate(image_rows([1, 1, 0, 1]), train=True)
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    sums = task.loss(logits, batch)
    kept, labels = logits[[0, 1, 3]], torch.tensor([0, 1, 0])
    mean = torch.nn.functional.cross_entropy(kept, labels, label_smoothing=smoothing)
    assert sums.weight == 3
    assert sums.loss_sum.item() == pytest.approx(3 * mean.item())
    assert sums.metric_sums["accuracy"] == (kept.argmax(-1) == labels).sum()
    evaluated = task.loss(logits, batch, train=False).loss_sum.item()
    assert evaluated == pytest.approx(3 * torch.nn.functional.cross_entropy(kept, labels).item())


def text_rows(ids: list[list[int]], weights: list[float]) -> Rows:
    table = pa.table(
        {"input_ids": pa.array(ids, pa.list_(pa.int32())), "length": pa.array([len(row) for row in ids], pa.int32())}
    )
    return Rows(table, np.arange(len(ids)), np.array(weights, np.float32))


def test_language_model_loss_is_the_next_token_of_real_positions() -> None:
    """The end-of-text token serves as padding: real ones count, padding does not."""
    task = get_task(recipe("language_model"), TEXTS)
    ids = [[3, 0, 5, 0], [4, 6, 1, 2, 2, 0], [1, 1]]
    batch = task.collate(text_rows(ids, [1, 1, 0]), train=True)
    width = batch.inputs["input_ids"].shape[1]
    assert width == 8
    assert batch.inputs["attention_mask"].sum(-1).tolist() == [4, 6, 2]
    logits = torch.randn(3, width, 7, generator=torch.Generator().manual_seed(0))
    expected = sum(
        -float(logits[b, t].log_softmax(-1)[row[t + 1]]) for b, row in enumerate(ids[:2]) for t in range(len(row) - 1)
    )
    sums = task.loss(logits, batch)
    assert sums.weight == 3 + 5
    assert sums.loss_sum.item() == pytest.approx(expected, rel=1e-5)
    figures = task.metrics(expected, 8, {})
    assert figures["perplexity"] == pytest.approx(np.exp(expected / 8))


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=20), min_size=2, max_size=6), st.integers(0, 1))
def test_padding_keeps_rows_also_of_a_slice(rows: list[list[int]], start: int) -> None:
    column = pa.array(rows, pa.list_(pa.int32())).slice(start)
    padded = pad_lists(column, 0)
    assert padded.shape[1] % 8 == 0
    assert [[token for token in row if token] for row in padded.tolist()] == rows[start:]
    assert pad_lists(column, 0, length=24).shape == (len(rows) - start, 24)


@pytest.mark.parametrize(
    ("task", "facts", "item"),
    [
        ("text_classification", {"labels": ["a", "b"]} | TEXTS, {"text": "  "}),
        ("text_classification", {"labels": ["a", "b"]} | TEXTS, {"text": 3}),
        ("text_classification", {"labels": ["a", "b"]} | TEXTS, {"texts": "a"}),
        ("language_model", TEXTS, {"text": ""}),
        ("image_classification", IMAGES, {"image": "%%%"}),
        ("image_classification", IMAGES, {"image": base64.b64encode(b"none").decode()}),
        ("image_classification", IMAGES, {"image": 1}),
    ],
)
def test_requests_are_refused_by_the_number_of_the_input(
    task: str, facts: dict[str, Any], item: dict[str, Any]
) -> None:
    found = get_task(recipe(task), facts)
    assert found.parse([found.example()]).num_rows == 1
    with pytest.raises(Refused, match=r"inputs\.1"):
        found.parse([found.example(), item])


def test_images_of_a_request_take_the_size_of_training() -> None:
    task = get_task(recipe("image_classification"), IMAGES)
    stream = io.BytesIO()
    Image.new("RGB", (30, 20), (255, 255, 255)).save(stream, "PNG")
    source = task.parse([{"image": base64.b64encode(stream.getvalue()).decode()}])
    assert task.prepare(source, None).column("pixels").to_pylist() == [[255] * 64]


def test_predictions_name_the_classes() -> None:
    task = get_task(recipe("image_classification"), IMAGES)
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    found = task.predictions(logits, Batch({}, {}, torch.ones(2)))
    assert [item["label"] for item in found] == ["b", "a"]
    probabilities = np.exp([0, 2, 1]) / np.exp([0, 2, 1]).sum()
    assert list(found[0]["scores"].values()) == pytest.approx(probabilities)
    assert found[0]["score"] == pytest.approx(probabilities[1])
