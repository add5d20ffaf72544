"""Checkpoints of several processes that are written while training goes on, and killed while they are."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from heliostat.curves import METRICS_FILE, read_metrics
from heliostat.recipe import Recipe, override
from heliostat.train import checkpoint
from heliostat.train.checkpoint.find import MANIFEST
from heliostat.train.faults import Fault
from heliostat.train.folder import CHECKPOINT_FAULTS_FILE
from heliostat.train.loop import train
from heliostat.train.notes import read_notes
from tests.distributed.harness import run, run_until_killed
from tests.recipes import prepared, tiny_llama

LAYOUT = {"parallelism.workers": 2, "parallelism.fsdp": 2}


def train_until_published(recipe: Recipe, data: Path, run_dir: Path, step: int, delay_s: float) -> Any:
    """Rank 0 is killed some time after the manifest of a step is there, while later checkpoints are on their way."""
    if os.environ["RANK"] == "0":
        manifest = run_dir / "checkpoints" / f"step-{step:08d}" / MANIFEST

        def watch() -> None:
            while not manifest.exists():
                time.sleep(0.001)
            time.sleep(delay_s)
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=watch, daemon=True).start()
    return train(recipe, data, run_dir, write_bundle=False)


def resume(recipe: Recipe, data: Path, run_dir: Path) -> int:
    """The step that a run goes on from."""
    from heliostat.data.prepare import read_prepared
    from heliostat.train.loop import Run

    return Run(recipe, read_prepared(data), run_dir).progress.step


@pytest.mark.parametrize("delay_s", [0.15, *(pytest.param(delay_s, marks=pytest.mark.slow) for delay_s in (0.0, 0.6))])
def test_a_kill_falls_back_to_the_last_manifest_and_no_further(delay_s: float, tmp_path: Path) -> None:
    steps = {"schedule.max_steps": 4000, "checkpoint.every_steps": 3, "checkpoint.keep": 3}
    recipe = tiny_llama(tmp_path, **(LAYOUT | steps))
    data, run_dir = prepared(recipe).folder, tmp_path / "run"
    run_until_killed(2, tmp_path / "rendezvous", train_until_published, recipe, data, run_dir, 6, delay_s)
    manifests = sorted((run_dir / "checkpoints").glob(f"*/{MANIFEST}"))
    last = int(manifests[-1].parent.name.removeprefix("step-"))
    assert last >= 6
    assert run(2, resume, recipe, data, run_dir) == [last, last]
    assert not read_notes(run_dir / CHECKPOINT_FAULTS_FILE)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path, Path]:
    """A recipe, its data, and a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = tiny_llama(folder, **(LAYOUT | {"checkpoint.every_steps": 2, "checkpoint.keep": 3}))
    data = prepared(recipe).folder
    run(2, train, recipe, data, folder / "run")
    return recipe, data, folder / "run"


def same_weights(one: Path, other: Path) -> bool:
    a, b = (load_file(folder / "bundle" / "model.safetensors") for folder in (one, other))
    return all(a[name].equal(b[name]) for name in a.keys() | b.keys())


def faulty(recipe: Recipe, data: Path, run_dir: Path, fault: Fault) -> Any:
    return train(recipe, data, run_dir, fault=fault)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_is_full_on_one_rank_costs_no_rank_more_than_a_checkpoint(
    whole: tuple[Recipe, Path, Path], rank: int, tmp_path: Path
) -> None:
    recipe, data, undisturbed = whole
    outcomes = run(2, faulty, recipe, data, tmp_path / "run", Fault("disk_full", 5, rank))
    assert [outcome["status"] for outcome in outcomes] == ["done", "done"]
    faults = read_notes(tmp_path / "run" / CHECKPOINT_FAULTS_FILE)
    assert [(each["step"], each["what"]) for each in faults] == [(6, "missed")]
    assert same_weights(tmp_path / "run", undisturbed)


def test_a_file_that_one_rank_finds_altered_is_trusted_by_none(
    whole: tuple[Recipe, Path, Path], tmp_path: Path
) -> None:
    recipe, data, _ = whole
    run(2, train, recipe, data, tmp_path / "run")
    newest = checkpoint.complete(tmp_path / "run" / "checkpoints")[-1]
    assert newest.step == 10
    for name in ("__0_0.distcp", "__1_0.distcp"):  # whoever reads it
        file = newest.path / name
        data_ = bytearray(file.read_bytes())
        data_[-8] ^= 1
        file.write_bytes(bytes(data_))
        assert run(2, resume, recipe, data, tmp_path / "run") == [8, 8]
        data_[-8] ^= 1
        file.write_bytes(bytes(data_))
    assert run(2, resume, recipe, data, tmp_path / "run") == [10, 10]


def test_asynchronous_or_not_is_the_same_run(whole: tuple[Recipe, Path, Path], tmp_path: Path) -> None:
    recipe, data, undisturbed = whole
    run(2, train, override(recipe, {"checkpoint.asynchronous": False}), data, tmp_path / "run")
    assert same_weights(tmp_path / "run", undisturbed)
    losses = [
        [record["loss"] for record in read_metrics(folder / METRICS_FILE) if "loss" in record]
        for folder in (tmp_path / "run", undisturbed)
    ]
    assert losses[0] == losses[1]
    one, two = (
        {found.step: found.manifest["files"] for found in checkpoint.complete(folder / "checkpoints")}
        for folder in (tmp_path / "run", undisturbed)
    )
    shards = {step: {name: said for name, said in files.items() if name != ".metadata"} for step, files in one.items()}
    assert list(one) == list(two) == [6, 8, 10]
    assert all(said == two[step][name] for step, files in shards.items() for name, said in files.items())


def train_noticed(recipe: Recipe, data: Path, run_dir: Path) -> Any:
    """Rank 1 hears, as the fourth step begins, that its machine has an hour left, and is asked to stop at the sixth."""
    asked = [0, 0]

    def heard(question: int, at: int) -> bool:
        asked[question] += 1
        return os.environ["RANK"] == "1" and asked[question] >= at

    return train(
        recipe,
        data,
        run_dir,
        notice=lambda: time.time() + 3600 if heard(0, 4) else None,
        should_stop=lambda: heard(1, 6),
        write_bundle=False,
    )


@pytest.mark.parametrize(
    "axis", ["fsdp", *(pytest.param(axis, marks=pytest.mark.slow) for axis in ("tensor", "context", "pipeline"))]
)
def test_what_one_rank_hears_all_ranks_do(axis: str, whole: tuple[Recipe, Path, Path], tmp_path: Path) -> None:
    recipe, data, _undisturbed = whole
    axes = {"parallelism.fsdp": 1, f"parallelism.{axis}": 2, "checkpoint.every_steps": 0}
    outcomes = run(2, train_noticed, override(recipe, axes), data, tmp_path / "run")
    assert [(outcome["status"], outcome["step"]) for outcome in outcomes] == [("interrupted", 6)] * 2
    assert [found.step for found in checkpoint.complete(tmp_path / "run" / "checkpoints")] == [4, 6]
