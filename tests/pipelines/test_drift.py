"""The job, on samples as replicas write them: what it says with and without drift, and with too little to say."""

from __future__ import annotations

import json
import re
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from heliostat.evaluate import prepared_rows
from heliostat.hardware import free_port
from heliostat.models import bundle as bundles
from heliostat.monitor.served import Sampler, folder_of
from heliostat.predictor import Predictor
from heliostat.recipe import Deploy, Recipe, Refused, override
from heliostat.train.loop import train
from pipelines import drift
from pipelines.job import Job, main, parse
from tests.bundles import tabular_bundle
from tests.recipes import number_file, prepared, tiny_tabular

Change = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    recipe = tiny_tabular(tmp_path, **{"drift.min_rows": 50, "deploy.port": free_port()})
    recipe.save(tmp_path / "recipe.json")
    return recipe


@pytest.fixture
def bundle(recipe: Recipe, tmp_path: Path) -> bundles.Bundle:
    run = recipe.storage_path / "runs" / f"{recipe.name}-train"
    return bundles.read(Path(train(recipe, prepared(recipe).folder, run)["bundle"]))


def inputs(folder: Path, rows: int, seed: int) -> list[dict[str, Any]]:
    return pq.read_table(number_file(folder, rows, seed), columns=["angle", "tilt", "heat"]).to_pylist()


def serve(bundle: bundles.Bundle, asked: list[dict[str, Any]]) -> None:
    """As a replica does."""
    writer = Sampler(Deploy(sample_share=1.0), lambda outcome, rows: None)
    writer.offer(bundle, "1", asked, Predictor(bundle).predict(asked))
    writer.close()


def job(recipe: Recipe, *words: str) -> Job:
    file = recipe.storage_path.parent / "recipe.json"
    return Job("drift", *parse(["--recipe", str(file), *words]), recipe.storage_path / "runs" / "looked")


def moved(item: dict[str, Any]) -> dict[str, Any]:
    return item | {"tilt": item["tilt"] + 1e-3}  # by one standard deviation


def never_hot(item: dict[str, Any]) -> dict[str, Any]:
    return item | {"heat": None}


@pytest.mark.parametrize(
    ("change", "drifted"),
    [(dict, set()), (moved, {"tilt"}), (never_hot, {"heat (missing)"})],
    ids=["as ever", "moved", "missing"],
)
def test_what_it_says(
    change: Change, drifted: set[str], recipe: Recipe, bundle: bundles.Bundle, tmp_path: Path, capfd: Any
) -> None:
    serve(bundle, [change(item) for item in inputs(tmp_path / "served", 200, 5)])
    code = main("drift", drift.run, ["--recipe", str(tmp_path / "recipe.json"), "--run-name", "looked"])
    said = capfd.readouterr()
    answer = json.loads(said.out.strip().splitlines()[-1])
    assert (code, answer["status"]) == (0, "done"), said.err
    assert answer["drift"] is bool(drifted)
    found = {each["name"]: each for each in answer["findings"]}
    compared = {"angle", "tilt", "heat", "heat (missing)", "predicted_label", "predicted_score", "embeddings"}
    assert set(found) == compared - ({"heat"} if change is never_hot else set()), "of nothing there is nothing to say"
    named = {name for name, each in found.items() if each["drifted"]}
    assert drifted <= named <= drifted | {"embeddings", "predicted_label", "predicted_score"}
    assert answer["rows"] == {"validation": 64, "served": 200}
    assert answer["metrics"] == {"served_rows": 200, "drifted": len(named)}
    assert answer["from"] <= answer["to"]
    assert answer["said"] in said.err
    assert re.search(r"angle +│ no +│.* KS ", said.err)
    run_dir = Path(answer["run_dir"])
    report = json.loads((run_dir / "report.json").read_text())
    assert (report["drift"], report["findings"]) == (answer["drift"], answer["findings"])
    assert "predicted_score" in Path(answer["report"]).read_text()


def test_the_predictions_are_those_that_were_answered(recipe: Recipe, bundle: bundles.Bundle, tmp_path: Path) -> None:
    """A replica that answers one class whatever it is asked, one that is seldom right: its inputs are as ever."""
    asked = inputs(tmp_path / "served", 200, 5)
    predicted = [each["label"] for each in Predictor(bundle).predict(asked)]
    rare = min(bundle.card["facts"]["labels"], key=predicted.count)
    writer = Sampler(Deploy(sample_share=1.0), lambda outcome, rows: None)
    writer.offer(bundle, "1", asked, [{"label": rare, "score": 0.5, "scores": {}}] * 200)
    writer.close()
    found = drift.look(job(recipe))
    assert {each["name"] for each in found["findings"] if each["drifted"]} == {"predicted_label", "predicted_score"}


def test_too_little_to_say(recipe: Recipe, bundle: bundles.Bundle, tmp_path: Path) -> None:
    found = drift.look(job(recipe))
    assert (found["drift"], found["findings"]) == (None, [])
    assert found["said"].endswith("is deploy.sample_share above 0?")
    serve(bundle, inputs(tmp_path / "served", 49, 5))
    found = drift.look(job(recipe))
    assert (found["drift"], found["rows"]["served"]) == (None, 49)
    assert found["said"].startswith("49 rows are kept in")
    serve(bundle, inputs(tmp_path / "served", 1, 6))
    assert drift.look(job(recipe))["drift"] is False
    late = drift.look(job(recipe, "--since", "2999-01-01"))
    assert (late["drift"], late["rows"]["served"]) == (None, 0)
    assert drift.look(job(recipe, "--since", "1h"))["drift"] is False
    few = drift.look(job(recipe, "--drift.min-rows", "65"))
    assert few["drift"] is None
    assert "65 are needed" in few["said"]


def test_another_bundle_is_what_was_served(recipe: Recipe, bundle: bundles.Bundle, tmp_path: Path) -> None:
    serve(bundle, inputs(tmp_path / "served", 60, 5))
    other = override(recipe, {"seed": 1})
    run = recipe.storage_path / "runs" / f"{recipe.name}-train-again"
    train(other, prepared(other).folder, run)
    found = drift.look(job(recipe))
    assert found["drift"] is None
    assert found["said"].endswith(f"there are some of bundles {bundle.digest[:12]}")
    assert drift.look(job(recipe, "--bundle", str(bundle.path)))["drift"] is False


def test_validation_rows_are_prepared_again_or_missed(recipe: Recipe, bundle: bundles.Bundle) -> None:
    (data,) = (recipe.storage_path / "data").iterdir()
    expected = np.array(prepared_rows(bundle, recipe.storage).column("features").to_pylist())
    shutil.rmtree(data)
    again = np.array(prepared_rows(bundle, recipe.storage).column("features").to_pylist())
    assert np.array_equal(again, expected, equal_nan=True)
    shutil.rmtree(data)
    table = pq.read_table(recipe.data.validation)
    pq.write_table(table.slice(1), recipe.data.validation)
    with pytest.raises(Refused, match=r"bundle: the rows that .* was validated on are gone \(train again\)"):
        prepared_rows(bundle, recipe.storage)


def test_a_bundle_that_was_never_validated(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="does not say on what it was validated"):
        drift.look(job(recipe, "--bundle", str(tabular_bundle(tmp_path))))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--since", "yesterday"], r"since: 'yesterday' is no time \(24h, 7d"),
        (["--every-s", "-1"], r"every_s: -1 is below 0"),
        (["--on-drift", "pray"], r"on_drift: .*report, retrain"),
        (["--on-drift", "retrain"], r"deploy\.sample_share: .*without samples.* \(give it here, too\)"),
        (["--drift.min-rows", "3000"], r"min_rows=3000 is above max_rows=2000"),
    ],
)
def test_what_cannot_be_is_refused(words: list[str], reason: str, recipe: Recipe) -> None:
    with pytest.raises(Refused, match=reason):
        drift.run(job(recipe, *words))


def test_a_port_that_a_new_model_could_not_have_is_refused(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """The endpoint's own, where this job would start a cluster for itself."""
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # though a test before may have connected this process
    words = ["--on-drift", "retrain", "--deploy.sample-share", "0.5"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(Refused, match=rf"deploy\.port: 127\.0\.0\.1:{port} .* by --address, or by --keep"):
            drift.check(job(recipe, *words, "--deploy.port", port))
        drift.check(job(recipe, *words, "--deploy.port", port, "--keep"))


def test_times() -> None:
    now = time.time()
    assert drift.since_s("2h") == pytest.approx(now - 7200, abs=5)
    assert drift.since_s("1.5d") == pytest.approx(now - 129_600, abs=5)
    assert drift.since_s("2026-01-31T08:00+00:00") == 1769846400.0
    assert drift.since_s("") == 0.0


def test_samples_lie_where_they_are_looked_for(recipe: Recipe, bundle: bundles.Bundle, tmp_path: Path) -> None:
    assert folder_of(bundle, recipe.deploy).parent == recipe.storage_path / "served" / recipe.name
    elsewhere = Deploy(sample_folder=str(tmp_path / "elsewhere"), sample_share=1.0)
    writer = Sampler(elsewhere, lambda outcome, rows: None)
    asked = inputs(tmp_path / "served", 60, 5)
    writer.offer(bundle, "1", asked, Predictor(bundle).predict(asked))
    writer.close()
    assert drift.look(job(recipe))["drift"] is None
    assert drift.look(job(recipe, "--deploy.sample-folder", elsewhere.sample_folder))["drift"] is False
