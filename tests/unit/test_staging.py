"""Copies of bundles on a node's own disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from heliostat.models import bundle as bundles
from heliostat.models.staging import KEPT, staged
from heliostat.recipe import Deploy, Refused
from serve.application import answering
from tests.bundles import tabular_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return tabular_bundle(tmp_path / "storage")


def test_a_copy_is_made_once(bundle: Path, tmp_path: Path) -> None:
    node = tmp_path / "node" / "cache"
    copy = staged(bundle, node)
    assert list(node.iterdir()) == [copy]
    assert bundles.read(copy).digest == bundles.read(bundle).digest
    written = (copy / "model.safetensors").stat()
    assert staged(bundle, node) == copy
    assert (copy / "model.safetensors").stat().st_ctime_ns == written.st_ctime_ns
    assert staged(bundle, node, anew=True) == copy
    assert (copy / "model.safetensors").stat().st_ctime_ns != written.st_ctime_ns


def test_what_is_not_whole_or_has_no_room_leaves_nothing(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="cannot be copied") as error:
        staged(bundle, tmp_path / "file")
    assert error.value.field == "deploy.stage_folder"
    with (bundle / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x01\x02")
    with pytest.raises(Refused, match=r"model\.safetensors"):
        staged(bundle, tmp_path / "node")
    assert list((tmp_path / "node").iterdir()) == []


def test_the_last_copies_stay_and_what_is_none(bundle: Path, tmp_path: Path) -> None:
    node = tmp_path / "node"
    (node / "photographs").mkdir(parents=True)
    for number in range(KEPT + 2):
        (node / f"{number:064x}").mkdir()
        os.utime(node / f"{number:064x}", (number, number))
    copy = staged(bundle, node)
    kept = [f"{number:064x}" for number in range(3, KEPT + 2)]
    assert {each.name for each in node.iterdir()} == {"photographs", copy.name, *kept}


def test_a_replica_reads_the_copy_and_mends_it(bundle: Path, tmp_path: Path) -> None:
    settings = Deploy(stage_folder=str(tmp_path / "node"))
    exact = answering(bundle, settings)
    copy = exact.bundle.path
    assert copy.parent == tmp_path / "node"
    (copy / "model.safetensors").unlink()
    assert answering(bundle, settings).bundle.path == copy
    (bundle / "model.safetensors").unlink()  # where the storage is away, the copy is enough
    example = [exact.task.example()]
    assert answering(bundle, settings).predict(example) == exact.predict(example)


def test_a_folder_is_named_from_the_root(bundle: Path) -> None:
    with pytest.raises(ValueError, match="stage_folder"):
        Deploy(stage_folder="cache")
