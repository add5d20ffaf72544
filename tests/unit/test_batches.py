"""What a rank is fed."""

from __future__ import annotations

from pathlib import Path

import pytest

from heliostat.data.loader import Loader
from heliostat.parallel.mesh import make_layout
from heliostat.recipe import Recipe, override
from heliostat.train.batches import validation_loader
from tests import recipes


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return recipes.tiny_bert(tmp_path, **{"parallelism.workers": 1})


def loader(recipe: Recipe, limit: int | None) -> Loader:
    limited = override(recipe, {"data.validation_limit": limit})
    return validation_loader(limited, recipes.prepared(limited), make_layout(limited.parallelism))


def test_few_validation_rows_are_a_fixed_choice_of_all(recipe: Recipe) -> None:
    every = loader(recipe, None).table
    few, again = (loader(recipe, 10).table for _ in range(2))
    texts, lengths = few.column("text").to_pylist(), few.column("length").to_pylist()
    assert (every.num_rows, few.num_rows) == (32, 10)
    assert set(texts) < set(every.column("text").to_pylist())
    assert lengths == sorted(lengths)
    assert lengths != every.column("length").to_pylist()[:10], "not the shortest"
    assert again.equals(few)
    assert loader(recipe, 1000).table.equals(every)
