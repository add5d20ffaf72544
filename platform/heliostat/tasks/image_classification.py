"""One label for an image. Shapes: B rows, C channels, H × W pixels; K classes."""

from __future__ import annotations

import base64
import binascii
import io
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from heliostat.models.load import on_meta
from heliostat.recipe import Refused
from heliostat.tasks import (
    Baseline,
    Batch,
    Rows,
    Task,
    class_predictions,
    classification_sums,
    encode_labels,
    labels_of,
    last_hidden_state,
    row_name,
)


class ImageClassification(Task):
    model_class = "AutoModelForImageClassification"
    metric = "accuracy"
    higher_is_better = True
    train_metrics = ("accuracy",)

    def check(self) -> None:
        super().check()
        recipe = self.recipe
        rows = recipe.training.micro_batch_size * recipe.parallelism.data_parallel
        if recipe.model.sync_batch_norm and recipe.training.global_batch_size > rows and self._has_batch_norm():
            raise Refused(
                "training.micro_batch_size",
                "batch normalisation over the global batch and gradient accumulation exclude each other: "
                f"{recipe.training.global_batch_size} rows a step, {rows} in one forward pass of all workers",
                "raise training.micro_batch_size, or set model.sync_batch_norm false",
            )

    def choices(self) -> dict[str, list[Any]]:
        return {"data.augment": ["none", "crop", "crop_flip"]}

    def _has_batch_norm(self) -> bool:
        return any(isinstance(module, torch.nn.BatchNorm2d) for module in on_meta(self).modules())

    def required_columns(self) -> list[str]:
        return [self.recipe.data.image_column, self.recipe.data.label_column]

    def content(self, table: pa.Table) -> list[bytes]:
        column = table.column(self.recipe.data.image_column).combine_chunks()
        if isinstance(column.type, pa.FixedShapeTensorType):
            return [image.tobytes() for image in column.to_numpy_ndarray()]
        return [_encoded(value) or b"" for value in column.to_pylist()]

    def fit(self, table: pa.Table) -> dict[str, Any]:
        labels = labels_of(table.column(self.recipe.data.label_column), "data.label_column")
        sample = self._pixels(table.slice(0, 2000), "the training rows").astype(np.float32) / 255
        return {
            "labels": labels,
            "image_shape": list(sample.shape[1:]),
            "mean": sample.mean((0, 2, 3)).tolist(),
            "std": np.maximum(sample.std((0, 2, 3)), 1e-3).tolist(),
        }

    def _pixels(self, table: pa.Table, where: str) -> np.ndarray:
        """(B, C, H, W) uint8. The first image says how many channels, and its size if no size is set."""
        column = table.column(self.recipe.data.image_column).combine_chunks()
        if isinstance(column.type, pa.FixedShapeTensorType):
            pixels = column.to_numpy_ndarray()
            return pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
        shape = self.facts.get("image_shape")
        images = []
        for row, value in enumerate(column.to_pylist()):
            try:
                image = _decode(value, shape)
            except ValueError as error:
                reason = f"{row_name(table, row, where)} is {error}"
                raise Refused("data.image_column", reason, "remove the row, or repair the file") from error
            shape = shape or list(image.shape)
            images.append(image)
        return np.stack(images) if images else np.empty((0, *(shape or (1, 1, 1))), np.uint8)

    def prepare(self, table: pa.Table, processor: Any, where: str = "") -> pa.Table:
        pixels = self._pixels(table, where)
        if len(pixels) and list(pixels.shape[1:]) != self.facts["image_shape"]:
            raise Refused(
                "data.image_column",
                f"{where} has images of {list(pixels.shape[1:])}, the training rows of {self.facts['image_shape']}",
            )
        width = int(np.prod(self.facts["image_shape"]))
        columns = {
            "pixels": pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), width),
            "length": pa.array(np.ones(len(pixels), np.int32)),
        }
        if self.recipe.data.label_column in table.column_names:
            columns["label"] = encode_labels(
                table, self.recipe.data.label_column, self.facts["labels"], "data.label_column", where
            )
        return pa.table(columns)

    def collate(self, rows: Rows, train: bool, epoch: int = 0, length: int | None = None) -> Batch:
        flat = rows.column("pixels").flatten().to_numpy()
        pixels = torch.from_numpy(flat.reshape(-1, *self.facts["image_shape"]).copy())
        if train and self.recipe.data.augment != "none":
            pixels = augment(pixels, rows.sample_ids, (self.recipe.seed, epoch), self.recipe.data.augment)
        mean, std = (torch.tensor(self.facts[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
        x_BCHW = (pixels.float() / 255 - mean) / std
        size = self.recipe.model.image_size
        if size and list(x_BCHW.shape[-2:]) != [size, size]:
            x_BCHW = torch.nn.functional.interpolate(x_BCHW, (size, size), mode="bilinear", antialias=True)
        targets = {}
        if "label" in rows.table.column_names:
            targets["labels"] = torch.from_numpy(rows.column("label").to_numpy().astype(np.int64))
        return Batch({"pixel_values": x_BCHW}, targets, torch.from_numpy(rows.row_weight_B), rows.sample_ids)

    def model_config(self) -> dict[str, Any]:
        labels, (channels, height, _) = self.facts["labels"], self.facts["image_shape"]
        return {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "num_channels": channels,
            "label2id": {label: i for i, label in enumerate(labels)},
            "image_size": self.recipe.model.image_size or height,
        }

    def row_sums(self, outputs: Tensor, batch: Batch, train: bool) -> dict[str, Tensor]:
        smoothing = self.recipe.training.label_smoothing if train else 0.0
        return classification_sums(outputs, batch.targets["labels"], smoothing)

    def parse(self, inputs: list[dict[str, Any]]) -> pa.Table:
        images = []
        for i, item in enumerate(inputs):
            if set(item) != {"image"} or not isinstance(item["image"], str):
                raise Refused(f"inputs.{i}", 'each input is {"image": "…"}, an image file in base64')
            try:
                image = base64.b64decode(item["image"].partition(",")[2] or item["image"], validate=True)
            except binascii.Error as error:
                raise Refused(f"inputs.{i}", f"not base64: {error}") from error
            try:
                _decode(image, self.facts["image_shape"])
            except ValueError as error:
                raise Refused(f"inputs.{i}", str(error)) from error
            images.append(image)
        return pa.table({self.recipe.data.image_column: pa.array(images, pa.binary())})

    def predictions(self, outputs: Tensor, batch: Batch) -> list[dict[str, Any]]:
        return class_predictions(outputs, self.facts["labels"])

    def example(self) -> dict[str, Any]:
        from PIL import Image

        channels, height, width = self.facts["image_shape"]
        file = io.BytesIO()
        Image.new("L" if channels == 1 else "RGB", (width, height)).save(file, "PNG")
        return {"image": base64.b64encode(file.getvalue()).decode()}

    def watched(self, table: pa.Table) -> dict[str, np.ndarray]:
        """Brightness and contrast of each channel: mean and standard deviation of its pixels, from 0 to 1."""
        flat = table.column("pixels").combine_chunks().flatten().to_numpy()
        pixels = flat.reshape(table.num_rows, self.facts["image_shape"][0], -1)
        found: dict[str, np.ndarray] = {}
        for channel in range(pixels.shape[1]):
            # Image by image: as floats, all of them at once may not fit in memory.
            found[f"mean of channel {channel}"] = np.array([row.mean() for row in pixels[:, channel]]) / 255
            found[f"deviation of channel {channel}"] = np.array([row.std() for row in pixels[:, channel]]) / 255
        return found

    def embeddings(self, model: Any, batch: Batch) -> Tensor | None:
        """The mean over patches, or over what convolutions leave of height and width."""
        hidden = last_hidden_state(model, batch)
        if hidden is None:
            return None
        return hidden.flatten(2).mean(-1) if hidden.ndim == 4 else hidden.mean(1)

    def baseline(self, train: pa.Table, other: pa.Table) -> Baseline:
        """Logistic regression on the pixels (of at most 5000 images)."""
        from sklearn.linear_model import LogisticRegression

        def features(table: pa.Table) -> np.ndarray:
            flat = table.column("pixels").combine_chunks().flatten().to_numpy()
            return flat.reshape(table.num_rows, -1).astype(np.float32) / 255

        train = train.slice(0, 5000)
        model = LogisticRegression(max_iter=100, C=0.1).fit(features(train), train.column("label").to_numpy())
        correct = model.predict(features(other)) == other.column("label").to_numpy()
        sums = {"accuracy": correct.astype(np.float64), "weight": np.ones(len(correct))}
        return Baseline("logistic regression on the pixels", sums, estimator=model)


def _encoded(value: Any) -> bytes | None:
    """The file's bytes from a binary column, or from the hub's `{bytes, path}` struct."""
    value = value.get("bytes") if isinstance(value, dict) else value
    return value if isinstance(value, bytes) else None


def _decode(value: Any, shape: list[int] | None) -> np.ndarray:
    """An encoded image as (C, H, W) uint8, converted to the channels and size of `shape`. Raises ValueError for what is
    none."""
    from PIL import Image, UnidentifiedImageError

    try:
        image: Image.Image = Image.open(io.BytesIO(_encoded(value) or b""))
        image.load()
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"not an image that can be read: {error}") from error
    channels = shape[0] if shape else (1 if image.mode in ("L", "1", "I;16") else 3)
    image = image.convert("L" if channels == 1 else "RGB")
    if shape and image.size != (shape[2], shape[1]):
        image = image.resize((shape[2], shape[1]), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def augment(pixels_BCHW: Tensor, sample_ids: np.ndarray, key: tuple[int, int], kind: str) -> Tensor:
    """Random shifts (zero padding) and flips, a pure function of (seed, epoch, sample): no rank count, no
    history enters, so a resumed or re-laid-out run sees the same pixels."""
    height, width = pixels_BCHW.shape[-2:]
    reach = max(1, height // 8)
    padded = torch.nn.functional.pad(pixels_BCHW, (reach, reach, reach, reach))
    out = torch.empty_like(pixels_BCHW)
    for i, sample in enumerate(sample_ids.tolist()):
        draw = np.random.Generator(np.random.Philox(key=np.array(key, np.uint64), counter=[0, int(sample), 0, 0]))
        top, left, flip = draw.integers(0, [2 * reach + 1, 2 * reach + 1, 2])
        image = padded[i, :, top : top + height, left : left + width]
        out[i] = image.flip(-1) if flip and kind == "crop_flip" else image
    return out
