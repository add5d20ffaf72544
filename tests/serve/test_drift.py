"""From requests to a new model: what is served is kept, compared, and trained on again."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from heliostat.data.loader import open_split
from heliostat.data.packaged import packaged_table
from heliostat.hardware import free_port
from heliostat.models import bundle as bundles
from heliostat.monitor.served import folder_of, read
from heliostat.recipe import Recipe, Refused, override
from heliostat.registry import Version, champion, promote, register
from heliostat.train.loop import train
from pipelines import drift
from pipelines.job import Job, parse
from pipelines.recipes.tabular import breast_cancer
from serve.application import application, deploy
from tests.bundles import chat_bundle
from tests.recipes import TINY_TABULAR, prepared

UNIT = 1.6
"""What a new clinic's measures are multiplied by."""


def source(table: pa.Table) -> pa.Table:
    """The same tumours, measured in another unit."""
    return pa.table(
        {name: table[name] if name == "label" else pc.multiply(table[name], UNIT) for name in table.column_names}
    )


@dataclass
class Clinic:
    """A model of the breast cancer data that is served, and rows that it has not seen."""

    recipe: Recipe
    url: str
    inputs: list[dict[str, float]]

    def ask(self, unit: float) -> set[str]:
        """The bundles that answered."""
        asked = [{name: unit * value for name, value in item.items()} for item in self.inputs]
        answer = httpx.post(f"{self.url}/predict", json={"inputs": asked}, timeout=60)
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["predictions"]) == len(asked)
        return {answer.json()["bundle"]}

    def job(self, *words: str) -> Job:
        file = self.recipe.storage_path / "recipe.json"
        run_dir = self.recipe.storage_path / "runs" / f"{self.recipe.name}-drift"
        return Job("drift", *parse(["--recipe", str(file), *words]), run_dir)

    def rows(self) -> int:
        """That its champion was asked and are on the disk."""
        return read(folder_of(bundles.read(self.champion().path), self.recipe.deploy), 0.0, 1).total

    def kept(self, rows: int) -> None:
        """Wait until so many are."""
        deadline = time.monotonic() + 60
        while (total := self.rows()) < rows and time.monotonic() < deadline:
            time.sleep(0.2)
        assert total == rows

    def champion(self) -> Version:
        version = champion(self.recipe)
        assert version is not None
        return version

    def write_often(self) -> None:
        often = self.recipe.deploy.model_copy(update={"sample_every_s": 0.5})
        deploy(self.champion().path, "1", often, self.recipe.name)


@pytest.fixture(scope="module")
def clinic(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clinic]:
    from ray import serve

    folder = tmp_path_factory.mktemp("clinic")
    (folder / "rows").mkdir()
    pq.write_table(packaged_table("breast_cancer/all", "data.train"), folder / "rows" / "first.parquet")
    recipe = override(
        breast_cancer(),
        {
            "storage": str(folder),
            "model.config": TINY_TABULAR,
            "data.train": str(folder / "rows"),
            "schedule.epochs": 10,
            "parallelism.workers": 1,
            "drift.min_rows": 80,
            "deploy.port": free_port(),
            "deploy.max_replicas": 1,
            "deploy.sample_share": 1.0,
            "deploy.sample_every_s": 600.0,
        },
    )
    data = prepared(recipe)
    bundle = bundles.read(Path(train(recipe, data.folder, folder / "runs" / "breast_cancer-first")["bundle"]))
    promote(recipe, register(recipe, bundle, None))
    recipe.save(folder / "recipe.json")
    names, rows = data.facts["columns"], open_split(data.folder, "test").column("features").to_pylist()
    inputs = [dict(zip(names, row, strict=True)) for row in rows]
    yield Clinic(recipe, deploy(bundle.path, "1", recipe.deploy, recipe.name), inputs)
    serve.shutdown()


def test_requests_as_ever_are_no_drift(clinic: Clinic) -> None:
    """They are written once the replica is asked to stop, which other settings make it do."""
    assert drift.look(clinic.job())["drift"] is None
    clinic.ask(1.0)
    clinic.write_often()
    clinic.kept(len(clinic.inputs))
    found = drift.run(clinic.job())
    assert found["drift"] is False, found["said"]
    assert found["rows"]["served"] == len(clinic.inputs)


@pytest.fixture
def handlers() -> Iterator[None]:
    """Of signals, which jobs that run until they are told set."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_it_looks_again_until_it_is_told_to_end(clinic: Clinic) -> None:
    job = clinic.job("--every-s", "0.5")
    times = set[int]()

    def interrupt() -> None:
        deadline = time.monotonic() + 60
        while len(times) < 3 and time.monotonic() < deadline:
            if (job.run_dir / drift.REPORT).exists():
                times.add((job.run_dir / drift.REPORT).stat().st_mtime_ns)
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    before = threading.Thread(target=interrupt)
    before.start()
    found = drift.run(job)
    before.join()
    assert len(times) == 3
    assert found["bundle"]


@pytest.mark.slow
def test_another_unit_is_drift_and_a_new_model_learns_it(clinic: Clinic) -> None:
    before = clinic.champion()
    clinic.write_often()
    rows = clinic.rows()
    clinic.ask(UNIT)
    clinic.kept(rows + len(clinic.inputs))
    found = drift.run(clinic.job("--on-drift", "retrain"))
    drifted = [each["name"] for each in found["findings"] if each["drifted"]]
    assert found["drift"] is True
    assert {"mean radius", "mean texture", "embeddings"} <= set(drifted)
    assert found["retrain"] == {"status": "no new rows"}, "the same model would come of it"
    assert champion(clinic.recipe) == before

    # Somebody has labelled rows of the new kind.
    new = source(packaged_table("breast_cancer/all", "data.train"))
    pq.write_table(new, clinic.recipe.storage_path / "rows" / "second.parquet")
    found = drift.run(clinic.job("--on-drift", "retrain", "--deploy.sample-every-s", "0.5"))
    assert found["drift"] is True
    again = found["retrain"]
    assert again["promoted"] is True, again["gate"]
    assert again["gate"]["against"] == f"champion version {before.version}"
    now = clinic.champion()
    assert now.version == again["champion"] == before.version + 1
    digest = bundles.read(now.path).digest
    assert clinic.ask(UNIT) == {digest[:12]}, "the endpoint has it"
    clinic.kept(1 + len(clinic.inputs))  # the lifecycle has asked it, too
    assert np.isfinite(again["metrics"]["test.accuracy"])
    assert drift.look(clinic.job())["bundle"] == str(now.path), "and is compared from now on"


def test_language_models_are_not_sampled(clinic: Clinic, tmp_path: Path) -> None:
    settings: Any = clinic.recipe.deploy
    with pytest.raises(Refused, match=r"deploy\.sample_share: only what classifiers are asked"):
        application(chat_bundle(tmp_path), "1", settings)
