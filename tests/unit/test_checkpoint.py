"""Checkpoints of one process: written while training goes on, found again, trusted only as they were written."""

from __future__ import annotations

import json
import os
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from heliostat.recipe import Refused, override
from heliostat.train import checkpoint
from heliostat.train.checkpoint import Place, Writer
from heliostat.train.checkpoint.find import MANIFEST
from heliostat.train.errors import DiskFull
from heliostat.train.faults import Fault
from heliostat.train.folder import CHECKPOINT_FAULTS_FILE
from heliostat.train.loop import train
from heliostat.train.notes import read_notes
from tests.object_stores import gs, s3
from tests.recipes import prepared, tiny_llama


class Model(torch.nn.Module):
    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.randn(size, 1024))


def stepped(model: Model) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters())
    model.matrix.grad = torch.randn_like(model.matrix)
    optimizer.step()
    return optimizer


def values(place: Place, scratch: Path) -> dict[str, torch.Tensor]:
    """As PyTorch's own converter reads them."""
    dcp_to_torch_save(place.path, scratch)
    whole = torch.load(scratch, weights_only=False)
    return {"matrix": whole["model"]["matrix"], "mean": whole["optimizer"]["state.matrix.exp_avg"]}


def flip(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.seek(-8, os.SEEK_END)
        byte = stream.read(1)
        stream.seek(-8, os.SEEK_END)
        stream.write(bytes([byte[0] ^ 1]))


def test_what_is_written_is_what_was_there_when_it_was_asked_for(tmp_path: Path) -> None:
    model = Model(4096)
    optimizer = stepped(model)
    writer = Writer(Place.at(tmp_path), keep=4)
    for step in (1, 2, 3):  # into the same memory, time and again
        expected = model.matrix.detach().clone()
        mean = optimizer.state[model.matrix]["exp_avg"].clone()
        writer.save(step, {}, model, optimizer)
        with torch.no_grad():  # training goes on
            model.matrix.add_(1)
        optimizer.state[model.matrix]["exp_avg"].add_(1)
        writer.settle()
        found = checkpoint.newest(tmp_path)
        assert found is not None
        assert found.step == step
        got = values(found.place, tmp_path / "scratch.pt")
        assert torch.equal(got["matrix"], expected)
        assert torch.equal(got["mean"], mean)


def test_training_does_not_wait_for_the_disk(tmp_path: Path) -> None:
    """A write that cannot end before training has gone on."""
    model = Model()
    writer = Writer(Place.at(tmp_path), keep=1)
    gate = threading.Event()
    publish = writer._publish
    writer._publish = lambda *args: (gate.wait(60), publish(*args))  # type: ignore[assignment, method-assign]
    writer.save(1, {}, model)
    assert checkpoint.newest(tmp_path) is None
    gate.set()
    writer.settle()
    assert [found.step for found in checkpoint.complete(tmp_path)] == [1]


def test_the_newest_stay(tmp_path: Path) -> None:
    model = Model()
    writer = Writer(Place.at(tmp_path), keep=2)
    half_written = tmp_path / "step-00000002"
    half_written.mkdir()
    (half_written / "__0_0.distcp").write_bytes(b"half")
    for step in (1, 3, 5, 7):
        writer.save(step, {}, model)
    writer.settle()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000005", "step-00000007"]


@pytest.mark.parametrize("harm", ["flipped", "short", "missing", "manifest"])
def test_a_spoilt_checkpoint_is_passed_over_and_named(tmp_path: Path, harm: str) -> None:
    recipe = tiny_llama(tmp_path, **{"checkpoint.every_steps": 2, "checkpoint.keep": 3})
    data, run_dir = prepared(recipe).folder, tmp_path / "run"
    whole = train(recipe, data, tmp_path / "whole")
    train(override(recipe, {"schedule.max_steps": 8, "schedule.shape": "constant"}), data, run_dir, write_bundle=False)
    newest = checkpoint.complete(run_dir / "checkpoints")[-1]
    shard = next(newest.path.glob("*.distcp"))
    if harm == "flipped":
        flip(shard)
        assert checkpoint.newest(run_dir / "checkpoints") == newest, "its length does not tell"
    elif harm == "short":
        os.truncate(shard, shard.stat().st_size - 1)
    elif harm == "missing":
        shard.unlink()
    else:
        (newest.path / MANIFEST).write_text('{"version": 2, "st')
    outcome = train(override(recipe, {"schedule.max_steps": 8, "schedule.shape": "constant"}), data, run_dir)
    (fault,) = read_notes(run_dir / CHECKPOINT_FAULTS_FILE)
    assert (fault["step"], fault["what"]) == (8, "rejected")
    assert fault["reason"]
    assert outcome["step"] == 8
    assert whole["step"] == 10
    found, rejected = checkpoint.choose(Place.at(run_dir / "checkpoints"))
    assert found is not None
    assert (found.step, rejected) == (8, []), "written anew"


def test_one_of_a_newer_version_is_refused_and_an_older_one_loads(tmp_path: Path) -> None:
    model = Model()
    checkpoint.save(tmp_path, 1, {}, model, None, None)
    file = tmp_path / "step-00000001" / MANIFEST
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps(manifest | {"version": 99}))
    with pytest.raises(Refused, match="newer"):
        checkpoint.choose(Place.at(tmp_path))
    sizes = {name: said["bytes"] for name, said in manifest["files"].items()}
    file.write_text(json.dumps(manifest | {"version": 1, "files": sizes}))
    found, _ = checkpoint.choose(Place.at(tmp_path))
    assert found is not None
    other = Model()
    checkpoint.load(found, other, None, None)
    assert torch.equal(other.matrix, model.matrix)


@contextmanager
def small_files() -> Iterator[None]:
    """The system lets this process write no file above 16 KiB: what a disk that is full answers. Not for longer than
    the test's body: what pytest prints after it may go into a longer file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 10, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_costs_a_checkpoint_and_no_more(tmp_path: Path) -> None:
    missed = []
    writer = Writer(Place.at(tmp_path), keep=2, missed=lambda step, reason: missed.append((step, reason)))
    with small_files():
        writer.save(1, {}, Model(2))
        writer.save(2, {}, Model(16))
        writer.wait()
        assert [(step, "no room" in reason) for step, reason in missed] == [(2, True)]
        writer.save(3, {}, Model(2))  # which does not fail for the one before
        writer.settle()
        assert [found.step for found in checkpoint.complete(tmp_path)] == [1, 3]
        writer.save(4, {}, Model(16))
        with pytest.raises(DiskFull, match="step 4"):
            writer.settle()
    # Room was made by removing what is not needed, and nothing is left half-written.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003"]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_run_goes_on_without_a_checkpoint_that_found_no_room(asynchronous: bool, tmp_path: Path) -> None:
    recipe = tiny_llama(tmp_path, **{"checkpoint.every_steps": 2, "checkpoint.asynchronous": asynchronous})
    data = prepared(recipe).folder
    train(recipe, data, tmp_path / "plain")
    outcome = train(recipe, data, tmp_path / "full", fault=Fault("disk_full", 5))
    assert outcome["status"] == "done"
    assert [(each["step"], each["what"]) for each in read_notes(tmp_path / "full" / CHECKPOINT_FAULTS_FILE)] == [
        (6, "missed")
    ]
    weights = [(tmp_path / name / "bundle" / "model.safetensors").read_bytes() for name in ("plain", "full")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("store", [s3, gs])
def test_checkpoints_in_an_object_store(store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """Over HTTP, from a server that speaks the store's protocol."""
    recipe = tiny_llama(tmp_path, **{"checkpoint.every_steps": 2, "checkpoint.keep": 2})
    data = prepared(recipe).folder
    train(recipe, data, tmp_path / "whole")
    with store(monkeypatch) as address:
        recipe = override(recipe, {"checkpoint.storage": address.format("/checkpoints")})
        stop_at = time.monotonic()  # the first look at the clock stops the run
        asked: list[float] = []

        def stop() -> bool:
            asked.append(stop_at)
            return len(asked) >= 5

        first = train(recipe, data, tmp_path / "run", should_stop=stop)
        assert (first["status"], first["step"]) == ("interrupted", 5)
        place = checkpoint.folder_of(recipe, tmp_path / "run")
        assert not place.local
        assert [found.step for found in checkpoint.complete(place)] == [4, 5]
        assert set(place.folders()) == {"step-00000004", "step-00000005"}
        assert not (tmp_path / "run" / "checkpoints").exists()
        # What is not as it was written is not used there, either.
        newest = checkpoint.complete(place)[-1]
        name = next(name for name in newest.manifest["files"] if name.endswith(".distcp"))
        data_ = bytearray(newest.place.read(name))
        data_[-8] ^= 1
        with place.filesystem.open_output_stream(f"{newest.place.path}/{name}") as stream:
            stream.write(bytes(data_))
        second = train(recipe, data, tmp_path / "run")
        assert second["status"] == "done"
        (fault,) = read_notes(tmp_path / "run" / CHECKPOINT_FAULTS_FILE)
        assert (fault["step"], fault["what"]) == (5, "rejected")
    weights = [(tmp_path / name / "bundle" / "model.safetensors").read_bytes() for name in ("whole", "run")]
    assert weights[0] == weights[1]


def test_a_store_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"checkpoint\.storage"):
        Place.at("nowhere://bucket/folder")
