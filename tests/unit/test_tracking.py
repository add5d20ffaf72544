"""Runs in MLflow: a real SQLite store, a real server, and one that is away."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from heliostat import tracking
from heliostat.curves import read_metrics
from heliostat.hardware import free_port
from heliostat.recipe import Recipe, Refused, override
from heliostat.train.loop import train
from tests.recipes import prepared, tiny_bert


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return tiny_bert(tmp_path_factory.mktemp("tracking"), **{"schedule.max_steps": 2})


@pytest.fixture(scope="module")
def run_dir(recipe: Recipe) -> Path:
    """A real run of two steps, with its recipe and a result."""
    folder = recipe.storage_path / "runs" / "first"
    train(recipe, prepared(recipe).folder, folder)
    recipe.save(folder / "recipe.json")
    (folder / "result.json").write_text('{"test.accuracy": 0.5}')
    return folder


@pytest.fixture(scope="module")
def mlflow(recipe: Recipe) -> MlflowClient:
    """The module's one store: making its tables takes seconds."""
    with tracking.client(recipe) as made:
        return made


@pytest.fixture
def closed_port() -> int:
    return free_port()


def copy_metrics(run_dir: Path, name: str) -> Path:
    other = run_dir.with_name(name)
    other.mkdir()
    (other / "metrics.jsonl").write_bytes((run_dir / "metrics.jsonl").read_bytes())
    return other


def curves(mlflow: MlflowClient, run_id: str) -> dict[str, list[tuple[int, float, int]]]:
    """Every curve that MLflow holds of a run, as (step, value, milliseconds)."""
    found = {}
    for key in mlflow.get_run(run_id).data.metrics:
        if "/" in key:
            points = mlflow.get_metric_history(run_id, key)
            found[key] = sorted((point.step, point.value, point.timestamp) for point in points)
    return found


def expected(run_dir: Path) -> dict[str, list[tuple[int, float, int]]]:
    """The curves that metrics.jsonl holds."""
    found: dict[str, list[tuple[int, float, int]]] = {}
    for record in read_metrics(run_dir / "metrics.jsonl"):
        kind = "validation" if "validation" in record else "train"
        for name, value in record.get("validation", record).items():
            if kind == "validation" or name not in ("step", "time"):
                point = (record["step"], value, int(record["time"] * 1000))
                found.setdefault(f"{kind}/{name}", []).append(point)
    return found


def runs_named(mlflow: MlflowClient, experiment: str, name: str) -> int:
    found = mlflow.get_experiment_by_name(experiment)
    return len(mlflow.search_runs([found.experiment_id], f"tags.`heliostat.run` = '{name}'"))


def test_a_run_is_recorded_whole_and_once(recipe: Recipe, run_dir: Path, mlflow: MlflowClient) -> None:
    run_id = tracking.log_run(recipe, run_dir, metrics={"test.accuracy": 0.5}, tags={"kind": "train"})
    assert run_id is not None
    run = mlflow.get_run(run_id)
    assert len(expected(run_dir)["train/loss"]) == 2
    assert {"train/lr", "train/grad_norm", "validation/loss", "validation/accuracy"} <= set(expected(run_dir))
    assert curves(mlflow, run_id) == expected(run_dir)
    assert run.data.metrics["test.accuracy"] == 0.5
    assert run.data.tags["kind"] == "train"
    assert run.info.status == "FINISHED"
    assert run.data.params == tracking.flatten(recipe)
    assert json.loads(run.data.params["model.config"]) == recipe.model.config
    stored = recipe.storage_path / "mlflow-artifacts" / recipe.name / run_id / "artifacts"
    assert (stored / "recipe.json").read_text() == (run_dir / "recipe.json").read_text()
    assert {item.path for item in mlflow.list_artifacts(run_id)} == {"recipe.json", "result.json"}

    assert tracking.log_run(recipe, run_dir, metrics={"test.accuracy": 0.75}) == run_id
    assert mlflow.get_run(run_id).data.metrics["test.accuracy"] == 0.5
    assert runs_named(mlflow, recipe.name, "first") == 1


def test_an_attempt_that_was_cut_off_is_completed(
    recipe: Recipe,
    run_dir: Path,
    mlflow: MlflowClient,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    other = copy_metrics(run_dir, "cut-off")
    (other / "result.json").write_text("{}")

    def break_off(*_: object) -> None:
        raise ConnectionResetError("connection reset by peer")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "heliostat"):
        patch.setattr(MlflowClient, "log_artifact", break_off)
        assert tracking.log_run(recipe, other, metrics={"test.accuracy": 0.5}) is None
    assert "connection reset by peer" in caplog.text
    [run_id] = tracking.log_pending(run_dir.parent)
    assert curves(mlflow, run_id) == expected(run_dir)
    assert [point.value for point in mlflow.get_metric_history(run_id, "test.accuracy")] == [0.5]
    assert runs_named(mlflow, recipe.name, "cut-off") == 1
    assert not (other / tracking.PENDING_FILE).exists()


def test_many_figures_go_in_batches(recipe: Recipe, run_dir: Path, mlflow: MlflowClient) -> None:
    other = run_dir.with_name("long")
    other.mkdir()
    lines = [{"step": step, "loss": 1 / step, "lr": 1e-3, "time": 1e9 + step} for step in range(1, 1202)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    # A step that was replayed, and a line that a crash cut.
    replayed = json.dumps({"step": 7, "loss": 0.7, "lr": 1e-3, "time": 2e9})
    (other / "metrics.jsonl").write_text(text + replayed + "\n" + '{"step": 12')
    run_id = tracking.log_run(recipe, other, metrics={})
    assert run_id is not None
    assert curves(mlflow, run_id) == expected(other)
    assert (7, 0.7, int(2e12)) in curves(mlflow, run_id)["train/loss"]


def test_a_run_without_figures(recipe: Recipe, run_dir: Path, mlflow: MlflowClient) -> None:
    other = run_dir.with_name("it's empty")
    other.mkdir()
    run_id = tracking.log_run(recipe, other, metrics={"recall (%)": 1.0})
    assert run_id is not None
    assert mlflow.get_run(run_id).data.metrics == {"recall ___": 1.0}
    assert tracking.log_run(recipe, other, metrics={}) == run_id


@pytest.fixture
def returned_server(recipe: Recipe, closed_port: int) -> Iterator[list[object]]:
    """Servers to stop when the test is over."""
    servers: list = []
    yield servers
    for server in servers:
        tracking.stop_server(server)
        assert server.poll() is not None


def test_nothing_is_lost_while_the_server_is_away(
    recipe: Recipe,
    run_dir: Path,
    mlflow: MlflowClient,
    closed_port: int,
    returned_server: list,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    uri = f"http://127.0.0.1:{closed_port}"
    away = override(recipe, {"tracking.uri": uri, "tracking.experiment": "remote"})
    other = copy_metrics(run_dir, "second")
    with caplog.at_level(logging.WARNING, "heliostat"):
        assert tracking.log_run(away, other, metrics={"test.accuracy": 0.25}, tags={"kind": "train"}) is None
    assert "second is not in MLflow yet" in caplog.text
    assert json.loads((other / tracking.PENDING_FILE).read_text())["metrics"] == {"test.accuracy": 0.25}
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "5"
    assert tracking.log_pending(run_dir.parent) == []
    assert (other / tracking.PENDING_FILE).exists()

    returned_server.append(tracking.start_server(away, closed_port))
    [run_id] = tracking.log_pending(run_dir.parent)
    assert not (other / tracking.PENDING_FILE).exists()
    assert tracking.log_run(away, other, metrics={}) == run_id
    # The server serves the storage's store: what it took is there.
    assert curves(mlflow, run_id) == expected(run_dir)
    assert mlflow.get_run(run_id).data.metrics["test.accuracy"] == 0.25
    assert runs_named(mlflow, "remote", "second") == 1
    with pytest.raises(Refused, match="in use"):
        tracking.start_server(away, closed_port)


def test_a_server_that_cannot_start_says_why(recipe: Recipe, tmp_path: Path, closed_port: int) -> None:
    broken = override(recipe, {"storage": str(tmp_path), "tracking.uri": "mssql+nonsense://store"})
    with pytest.raises(RuntimeError, match=r"exited with [1-9][\s\S]*mssql.nonsense"):
        tracking.start_server(broken, closed_port)


def test_trials_are_nested_in_their_search_once(recipe: Recipe, mlflow: MlflowClient, run_dir: Path) -> None:
    search = run_dir.with_name("search")
    search.mkdir()
    search_id = tracking.log_run(recipe, search, metrics={"best_value": 0.2})
    assert search_id is not None
    done = {"number": 0, "values": {"optimizer.lr": 0.1}, "state": "done", "loss": 0.2, "seconds": 3.0,
            "curve": {1: 0.5, 2: 0.2}, "error": None}  # fmt: skip
    failed = {"number": 1, "values": {"optimizer.lr": 9.0}, "state": "infeasible", "loss": None, "seconds": None,
              "curve": {}, "error": "too large"}  # fmt: skip
    for trials in ([done], [done, failed]):
        tracking.log_trials(recipe, search_id, trials, ["loss", "seconds"])
    experiment = mlflow.get_run(search_id).info.experiment_id
    nested = mlflow.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{search_id}'", order_by=["run_name"])
    assert [run.info.run_name for run in nested] == ["search-00000", "search-00001"]
    first, second = nested
    assert first.data.params == {"optimizer.lr": "0.1"}
    assert first.data.metrics == {"loss": 0.2, "seconds": 3.0}
    assert [(point.step, point.value) for point in mlflow.get_metric_history(first.info.run_id, "loss")] == [
        (1, 0.5), (2, 0.2)
    ]  # fmt: skip
    assert second.data.metrics == {}
    assert (second.data.tags["heliostat.state"], second.data.tags["heliostat.error"]) == ("infeasible", "too large")
