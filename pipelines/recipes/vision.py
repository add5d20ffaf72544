"""Recipes for images."""

from typing import Any

from heliostat.recipe import Data, Model, Optimizer, Parallelism, Recipe, Schedule, Training

RESNET18: dict[str, Any] = {
    "model_type": "resnet",
    "layer_type": "basic",
    "embedding_size": 64,
    "hidden_sizes": [64, 128, 256, 512],
    "depths": [2, 2, 2, 2],
}


def digits() -> Recipe:
    """5000 handwritten digits, ResNet-18 at half width. Its stem shrinks images fourfold, so they are enlarged."""
    return Recipe(
        name="digits",
        task="image_classification",
        model=Model(config=RESNET18 | {"embedding_size": 32, "hidden_sizes": [32, 64, 128, 256]}, image_size=56),
        data=Data(train="packaged:digits/all", augment="crop"),
        optimizer=Optimizer(lr=2e-3, weight_decay=0.05),
        schedule=Schedule(epochs=3),
        training=Training(global_batch_size=64, micro_batch_size=32, label_smoothing=0.1),
        parallelism=Parallelism(workers=2),
    )


def fashion() -> Recipe:
    """Fashion-MNIST, where Debian's dataset-fashion-mnist is installed."""
    base = digits()
    return base.model_copy(
        update={
            "name": "fashion",
            "data": Data(train="packaged:fashion/train", test="packaged:fashion/test", augment="crop_flip"),
        }
    )


def cifar10() -> Recipe:
    """32×32 colour images: `--data.train` takes any Parquet of images, or a hub id."""
    base = digits()
    return base.model_copy(
        update={
            "name": "cifar10",
            "model": Model(config=RESNET18, image_size=64),
            "data": Data(
                train="hf://uoft-cs/cifar10/plain_text/train",
                test="hf://uoft-cs/cifar10/plain_text/test",
                image_column="img",
                augment="crop_flip",
            ),
            "schedule": Schedule(epochs=30),
            "training": Training(global_batch_size=256, micro_batch_size=128, precision="auto"),
        }
    )
