"""Exactly once: whatever kills a run and however many workers go on, the rows in its weights are those of one worker
that was never stopped, in its order. Kills are simulated: what a log's file had not been handed yet is cut off."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heliostat.data.loader import Coordinate, Cursor, Loader
from heliostat.data.order import Source
from heliostat.recipe import Refused
from heliostat.tasks import Batch
from heliostat.train.loop import Run
from heliostat.train.samples import SAMPLES_FILE, SampleLog, collect, write_samples
from tests.recipes import prepared, tiny_bert

Schedule = list[tuple[int, int]]
"""For each attempt, how many workers it has and after how many steps it is killed. The last one is not."""


@st.composite
def loaders(draw: st.DrawFn) -> Loader:
    counts = draw(st.lists(st.integers(5, 40), min_size=1, max_size=4))
    sources = [Source(rows, draw(st.floats(0.5, 3.0)), f"source {i}") for i, rows in enumerate(counts)]
    ids = np.concatenate([np.arange(source.rows) | (i << 52) for i, source in enumerate(sources)])
    length = np.random.default_rng(sum(counts)).integers(1, 99, len(ids)).astype(np.int32)
    table = pa.table({"length": length, "sample_id": ids})
    buckets = draw(st.sampled_from([0, 3]))
    return Loader(table, draw(st.integers(0, 2**31 - 1)), draw(st.integers(1, 13)), "f", buckets, sources=sources)


def feed(loader: Loader, logs: list[SampleLog], step: int, size: int) -> None:
    """One step of as many workers as there are logs."""
    real = []
    for log in logs:
        rows = loader.read(loader.advance(Cursor(), step - 1), log.coordinate, size)
        batches = [Batch({}, {}, torch.from_numpy(r.row_weight_B), r.sample_ids) for r in rows]
        real.append(sum(bool(batch.row_weight_B.any()) for batch in batches))
        log.step(step, batches)
    assert max(real) - min(real) <= 1, "micro-batches of the ranks"


def simulate(
    run_dir: Path, loader: Loader, schedule: Schedule, steps: int, every: int, size: int, seed: int = 0
) -> pa.Table:
    random = np.random.default_rng(seed)
    saved = 0
    for number, (workers, lives) in enumerate(schedule, 1):
        start, last = saved, number == len(schedule)
        logs = [SampleLog(run_dir, number, Coordinate(i, workers), start) for i in range(workers)]
        safe = [log.stream.tell() for log in logs]
        for step in range(start + 1, steps + 1 if last else min(steps, start + lives) + 1):
            feed(loader, logs, step, size)
            if step % every == 0 or step == steps:
                for log in logs:
                    log.flush()
                safe = [log.stream.tell() for log in logs]
                saved = step
        for log, kept in zip(logs, safe, strict=True):
            log.stream.close()
            if not last:  # anywhere, also within a record
                os.truncate(log.stream.name, random.integers(kept, os.path.getsize(log.stream.name) + 1))
    return pq.read_table(write_samples(run_dir, saved, [source.name for source in loader.sources]))


@settings(max_examples=60)
@given(
    loaders(),
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 12)), min_size=1, max_size=5),
    st.integers(1, 25),
    st.integers(1, 7),
    st.integers(1, 5),
    st.integers(0, 2**31),
)
def test_the_committed_rows_are_those_of_one_worker(
    loader: Loader, schedule: Schedule, steps: int, every: int, size: int, seed: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        one = simulate(Path(folder) / "one", loader, [(1, 0)], steps, steps, loader.global_batch_size)
        killed = simulate(Path(folder) / "killed", loader, schedule, steps, every, size, seed)
    columns = ["step", "position", "source", "id"]
    committed = killed.filter(killed["committed"]).sort_by([("step", "ascending"), ("position", "ascending")])
    assert committed.select(columns).to_pylist() == one.select(columns).to_pylist()
    assert one["committed"].to_pylist() == [True] * one.num_rows
    # The same by plain counting.
    ids = loader.table["sample_id"].to_numpy()
    batches = [ids[loader.batch_rows(loader.advance(Cursor(), step))] for step in range(steps)]
    assert committed["id"].to_pylist() == np.concatenate(batches).tolist()
    assert committed["position"].to_pylist() == [i for batch in batches for i in range(len(batch))]
    names = [loader.sources[number].name for number in (committed["id"].to_numpy() >> 52).tolist()]
    assert committed["source"].to_pylist() == names
    assert killed["attempt"].to_pylist() == sorted(killed["attempt"].to_pylist())


def test_steps_that_were_made_again_are_not_committed(tmp_path: Path) -> None:
    loader = Loader(pa.table({"length": np.ones(20, np.int32), "sample_id": np.arange(20)}), 0, 4, sources=[Source(20)])
    table = simulate(tmp_path, loader, [(2, 5), (1, 3), (3, 0)], steps=8, every=2, size=4, seed=3)
    by_attempt: dict[int, dict[int, bool]] = {}
    for row in table.to_pylist():
        by_attempt.setdefault(row["attempt"], {})[row["step"]] = row["committed"]
    assert {step: by_attempt[1][step] for step in range(1, 5)} == dict.fromkeys(range(1, 5), True)
    assert not by_attempt[1].get(5, False)
    assert {step: by_attempt[2][step] for step in (5, 6)} == {5: True, 6: True}
    assert not by_attempt[2].get(7, False)
    assert by_attempt[3] == {7: True, 8: True}


@pytest.mark.parametrize("rows_at_once", [1, 50])
def test_a_long_log_is_read_some_steps_at_a_time(
    rows_at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pa.table({"length": np.ones(97, np.int32), "sample_id": np.arange(97)})
    loader = Loader(table, 5, 10, sources=[Source(97)])
    whole = simulate(tmp_path / "whole", loader, [(3, 9), (2, 0)], 30, 4, 3)
    monkeypatch.setattr("heliostat.train.samples.ROWS_AT_ONCE", rows_at_once)
    assert simulate(tmp_path / "parts", loader, [(3, 9), (2, 0)], 30, 4, 3).equals(whole)


def test_a_run_without_ray_logs_what_it_fed(tmp_path: Path) -> None:
    recipe = tiny_bert(tmp_path, **{"data.log_samples": True, "schedule.max_steps": 5})
    attempt = Run(recipe, prepared(recipe), tmp_path / "run", write_bundle=False)
    attempt.train()
    table = pq.read_table(collect(tmp_path / "run", recipe))
    assert table["committed"].to_pylist() == [True] * 5 * 16
    assert table["step"].to_pylist() == [step for step in range(1, 6) for _ in range(16)]
    assert set(table["source"].to_pylist()) == {"train"}
    loader = attempt.loader
    ids = loader.table["sample_id"].to_numpy()
    fed = [ids[loader.batch_rows(loader.advance(Cursor(), step))] for step in range(5)]
    assert table["id"].to_pylist() == np.concatenate(fed).tolist()
    assert [file.name for file in (tmp_path / "run").glob(f"*{SAMPLES_FILE}*")] == [SAMPLES_FILE]


def test_a_task_without_sample_ids_is_refused(tmp_path: Path) -> None:
    log = SampleLog(tmp_path, 1, Coordinate(), 0)
    with pytest.raises(Refused, match="sample_ids") as caught:
        log.step(1, [Batch({}, {}, torch.ones(3))])
    assert caught.value.field == "data.log_samples"


def test_micro_batches_of_a_short_last_batch() -> None:
    """Of 10 rows over 4 workers, 3 + 3 + 2 + 2."""
    loader = Loader(pa.table({"length": np.ones(10, np.int32), "sample_id": np.arange(10)}), 0, 16)
    for size in (1, 2, 3):
        shares = [loader.read(Cursor(), Coordinate(i, 4), size) for i in range(4)]
        assert {len(share) for share in shares} == {math.ceil(3 / size)}
        assert [sum(int(rows.row_weight_B.sum()) for rows in share) for share in shares] == [3, 3, 2, 2]
