"""Recipes for text."""

from heliostat.recipe import (
    Checkpoint,
    Data,
    LogUniform,
    Model,
    Optimizer,
    Parallelism,
    Recipe,
    Schedule,
    Training,
    Tune,
)


def sentiment() -> Recipe:
    """Positive or negative reviews, from a pre-trained encoder of 22.7 M parameters. Minutes on two cores."""
    return Recipe(
        name="sentiment",
        task="text_classification",
        model=Model(
            name="packaged:minilm",
            max_length=160,
            config={"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.0},
            truncation="head_tail",
            freeze_layers=4,  # of six: not much more than half the work, and on so few reviews no worse
        ),
        data=Data(
            train="packaged:reviews/train", test="packaged:reviews/test", validation_fraction=0.2, bucket_batches=40
        ),
        optimizer=Optimizer(lr=6e-5, head_lr_scale=5.0),
        schedule=Schedule(epochs=1.5),
        training=Training(global_batch_size=16, micro_batch_size=8, precision="auto", label_smoothing=0.1),
        parallelism=Parallelism(workers=2),
        tune=Tune(
            num_trials=4,
            limit=400,
            validation_limit=200,
            reports=2,
            objectives=["loss"],  # so few steps find the majority's accuracy, whatever the learning rate
            space={"optimizer.lr": LogUniform(low=4e-5, high=1.2e-4)},
        ),
    )


def topics() -> Recipe:
    """The 20 newsgroups."""
    base = sentiment()
    return base.model_copy(
        update={
            "name": "topics",
            "model": base.model.model_copy(update={"freeze_layers": 0, "truncation": "head"}),
            "data": Data(train="packaged:newsgroups/train", test="packaged:newsgroups/test", bucket_batches=40),
            "schedule": Schedule(epochs=3),
        }
    )


def smollm() -> Recipe:
    """Fine-tune SmolLM2-135M-Instruct on Python functions."""
    return Recipe(
        name="smollm",
        task="language_model",
        model=Model(name="packaged:smollm2"),
        data=Data(train="packaged:stdlib/functions", sequence_length=256, pack=False, bucket_batches=40),
        optimizer=Optimizer(lr=2e-5),
        training=Training(global_batch_size=16, micro_batch_size=4, precision="auto"),
        parallelism=Parallelism(workers=2),
        checkpoint=Checkpoint(every_steps=100),
    )


def minilm() -> Recipe:
    """all-MiniLM-L6-v2, an encoder of sentences, to be served as it is."""
    return Recipe(name="minilm", task="text_embedding", model=Model(name="packaged:minilm", max_length=256))


def tiny_lm() -> Recipe:
    """A Llama of a few million parameters, trained from scratch on the source of Python's standard library."""
    return Recipe(
        name="tiny_lm",
        task="language_model",
        model=Model(
            tokenizer="train:4096",
            config={
                "model_type": "llama",
                "hidden_size": 256,
                "intermediate_size": 704,
                "num_hidden_layers": 4,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "max_position_embeddings": 512,
            },
        ),
        data=Data(train="packaged:stdlib/functions", sequence_length=256),
        optimizer=Optimizer(lr=1e-3, beta2=0.95, weight_decay=0.1),
        schedule=Schedule(epochs=3),
        training=Training(global_batch_size=16, micro_batch_size=8, precision="auto"),
        parallelism=Parallelism(workers=2),
    )
