"""Recipes for tables of numbers."""

from heliostat.recipe import Data, Model, Optimizer, Parallelism, Recipe, Schedule, Training, Tune


def breast_cancer() -> Recipe:
    """Benign or malignant, by 30 measures of a tumour's cells; 569 rows."""
    return Recipe(
        name="breast_cancer",
        task="tabular_classification",
        model=Model(config={"model_type": "tabular_resnet"}),
        data=Data(train="packaged:breast_cancer/all", validation_fraction=0.2, test_fraction=0.2),
        optimizer=Optimizer(lr=2e-3, weight_decay=0.05),
        schedule=Schedule(epochs=30),
        training=Training(global_batch_size=32, micro_batch_size=16, label_smoothing=0.05, evaluate_every_steps=20),
        parallelism=Parallelism(workers=2),
        tune=Tune(epochs=30),
    )


def credit() -> Recipe:
    """Whether a loan goes well, by what is known of who takes it; 4454 rows, some of whose numbers are missing."""
    base = breast_cancer()
    return base.model_copy(
        update={
            "name": "credit",
            "data": Data(train="packaged:credit/all", validation_fraction=0.2, test_fraction=0.2),
            "schedule": Schedule(epochs=10),
            "training": Training(global_batch_size=64, micro_batch_size=32, evaluate_every_steps=40),
            "tune": Tune(epochs=10),
        }
    )
