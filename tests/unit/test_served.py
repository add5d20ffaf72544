"""Samples of what is served: what is kept, and that nobody waits for it."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from scipy import stats

from heliostat.models.bundle import Bundle
from heliostat.monitor import served
from heliostat.monitor.served import DROPPED, KEPT, WAITING_BYTES, WAITING_ROWS, Sampler, bundles_of, folder_of, read
from heliostat.recipe import Deploy, Refused, build

ANSWER = {"label": "sun", "score": 0.9}


def bundle(folder: Path, digest: str = "0123456789abcdef") -> Bundle:
    recipe = build({"name": "tiny", "task": "text_classification", "storage": str(folder)})
    return Bundle(folder, {"recipe": recipe.model_dump(mode="json"), "digest": digest})


class Counts(Counter[str]):
    def __call__(self, outcome: str, rows: int) -> None:
        self[outcome] += rows


def sampler(counts: Counts, **settings: Any) -> Sampler:
    return Sampler(Deploy(**{"sample_share": 1.0, "sample_every_s": 0.05, **settings}), counts, seed=0)


def offered(to: Sampler, of: Bundle, inputs: list[dict[str, Any]]) -> None:
    to.offer(of, "3", inputs, [ANSWER | {"text": str(item.get("text"))} for item in inputs])


def kept(of: Bundle, settings: Deploy | None = None, since_s: float = 0.0, max_rows: int = 10_000) -> served.Served:
    return read(folder_of(of, settings or Deploy()), since_s, max_rows)


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    """Whatever JSON can say, by bundle, with the times between which they were served."""
    counts = Counts()
    one, other = bundle(tmp_path), bundle(tmp_path, "f" * 64)
    inputs: list[dict[str, Any]] = [{"text": "Ünïcödé \U0001f600"}, {"width": 0.1, "height": None}, {"n": 1 << 60}]
    begun, writer = time.time(), sampler(counts)
    offered(writer, one, inputs)
    offered(writer, other, [{"text": "other"}])
    writer.close()
    found = kept(one)
    assert found.inputs == inputs
    assert found.predictions == [ANSWER | {"text": str(item.get("text"))} for item in inputs]
    assert begun - 1e-3 <= found.first_s <= found.last_s <= time.time()
    assert (found.total, kept(other).inputs) == (3, [{"text": "other"}])
    assert bundles_of(tmp_path / "served" / "tiny") == ["0123456789ab", "ffffffffffff"]
    assert counts == {KEPT: 4}
    folder = folder_of(one, Deploy())
    assert folder.stat().st_mode & 0o077 == 0, "for its owner alone"
    (file,) = folder.iterdir()
    assert pq.read_table(file).column("version").to_pylist() == ["3"] * 3


def test_a_share_is_kept(tmp_path: Path) -> None:
    counts, of = Counts(), bundle(tmp_path)
    writer = sampler(counts, sample_share=0.25)
    for number in range(200):
        offered(writer, of, [{"n": number}] * 10)
    writer.close()
    low, high = stats.binom(2000, 0.25).ppf([0.001, 0.999])
    assert low <= counts[KEPT] <= high
    assert kept(of).total == counts[KEPT]


def test_it_is_written_in_time_without_being_closed(tmp_path: Path) -> None:
    counts, of = Counts(), bundle(tmp_path)
    writer = sampler(counts)
    offered(writer, of, [{"n": 1}])
    until(lambda: kept(of).total == 1)
    writer.close()
    assert not writer.thread.is_alive()


def until(reached: Any) -> None:
    deadline = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A disk that writes nothing until this is set."""
    free, write = threading.Event(), pq.write_table

    def blocked(*words: Any, **options: Any) -> None:
        free.wait()
        write(*words, **options)

    monkeypatch.setattr(pq, "write_table", blocked)
    return free


def test_nobody_waits_for_a_disk_that_is_stuck(disk: threading.Event, tmp_path: Path) -> None:
    """What is too much is dropped and counted; the rest is there once the disk is."""
    counts, of = Counts(), bundle(tmp_path)
    writer = sampler(counts)
    offered(writer, of, [{"n": -1}])
    until(lambda: not writer.waiting)  # the thread has taken it, and is stuck
    longest = 0.0
    for number in range(WAITING_ROWS + 500):
        begun = time.perf_counter()
        offered(writer, of, [{"n": number}])
        longest = max(longest, time.perf_counter() - begun)
    assert longest < 0.5
    assert len(writer.waiting) == WAITING_ROWS
    assert counts == {DROPPED: 500}
    begun = time.perf_counter()
    writer.close(timeout_s=0.1)
    assert time.perf_counter() - begun < 5, "nor does an end"
    disk.set()
    writer.close()
    assert counts == {DROPPED: 500, KEPT: WAITING_ROWS + 1}
    assert [item["n"] for item in kept(of).inputs] == list(range(-1, WAITING_ROWS))


def test_large_inputs_are_limited_by_their_size(disk: threading.Event, tmp_path: Path) -> None:
    counts, of = Counts(), bundle(tmp_path)
    writer = sampler(counts)
    offered(writer, of, [{"image": ""}])
    until(lambda: not writer.waiting)
    image = "x" * (WAITING_BYTES // 4)
    offered(writer, of, [{"image": image}] * 6)
    assert (len(writer.waiting), counts) == (4, {DROPPED: 2})
    disk.set()
    writer.close()
    assert counts == {DROPPED: 2, KEPT: 5}


def test_a_folder_that_cannot_be_written_is_no_failure(tmp_path: Path) -> None:
    counts, of = Counts(), bundle(tmp_path)
    taken = tmp_path / "taken"
    taken.touch()
    writer = sampler(counts, sample_folder=str(taken))
    offered(writer, of, [{"n": 1}])
    until(lambda: counts == {DROPPED: 1})
    taken.unlink()
    offered(writer, of, [{"n": 2}])
    writer.close()
    assert counts == {DROPPED: 1, KEPT: 1}
    assert kept(of, Deploy(sample_folder=str(taken))).inputs == [{"n": 2}]


def test_the_oldest_make_room(tmp_path: Path) -> None:
    """Whichever bundle they are of."""
    old, new = bundle(tmp_path, "a" * 64), bundle(tmp_path, "b" * 64)
    for number, of in enumerate([old, old, new, new]):
        writer = sampler(Counts())
        offered(writer, of, [{"n": number}])
        writer.close()
        time.sleep(0.002)  # a file's name has milliseconds
    sizes = [file.stat().st_size for file in folder_of(old, Deploy()).parent.glob("*/*.parquet")]
    writer = sampler(Counts(), sample_bytes=3 * max(sizes))
    offered(writer, new, [{"n": 4}])
    writer.close()
    assert kept(old).inputs == []
    assert kept(new).inputs == [{"n": 2}, {"n": 3}, {"n": 4}]


def test_what_is_too_old_or_left_over_is_removed(tmp_path: Path) -> None:
    of = bundle(tmp_path)
    folder = folder_of(of, Deploy())
    folder.mkdir(parents=True)
    hours_old = round(1000 * (time.time() - 25 * 3600))
    now = f"{round(1000 * time.time()):015d}"
    dead, busy, foreign = (folder / name for name in (f".{now}-dead.parquet", f".{now}-busy.parquet", "mine.parquet"))
    for path in (folder / f"{hours_old:015d}-x.parquet", dead, busy, foreign):
        path.touch()
    os.utime(dead, (0, 0))
    writer = sampler(Counts(), sample_days=1.0)
    offered(writer, of, [{"n": 0}])
    writer.close()
    found = kept(of)
    assert found.inputs == [{"n": 0}]
    assert {busy, foreign} < set(folder.iterdir())
    assert len(list(folder.iterdir())) == 3


def test_some_are_read_of_many_and_of_late_ones(tmp_path: Path) -> None:
    of = bundle(tmp_path)
    ended = []
    for start in (0, 100):
        writer = sampler(Counts())
        offered(writer, of, [{"n": start + number} for number in range(100)])
        writer.close()
        ended.append(time.time())
        time.sleep(0.01)
    found = kept(of, max_rows=50)
    assert found.total == 200
    numbers = [item["n"] for item in found.inputs]
    assert len(set(numbers)) == 50
    assert 0 < sum(number < 100 for number in numbers) < 50
    assert [item["n"] for item in kept(of, since_s=ended[0]).inputs] == list(range(100, 200))
    assert kept(of, since_s=time.time()).total == 0
    assert read(tmp_path / "nowhere", 0.0, 10).total == 0


def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = bundle(tmp_path)
    writer = sampler(Counts())
    offered(writer, of, [{"n": 0}])
    writer.close()
    monkeypatch.setattr(served, "VERSION", b"0")
    with pytest.raises(Refused, match=r"deploy\.sample_folder: .* another Heliostat \(remove it\)"):
        kept(of)
