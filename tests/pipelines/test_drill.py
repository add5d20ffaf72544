"""The drill on a real Ray cluster: each fault, and what is left of it."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from heliostat.train.folder import CHECKPOINT_FAULTS_FILE
from heliostat.train.notes import read_notes
from tests.pipelines.jobs import finish, run, start
from tests.recipes import tiny_llama


@pytest.mark.slow
def test_no_fault_leaves_a_trace(tmp_path: Path) -> None:
    """A killed worker is in tests/pipelines/test_train.py."""
    tiny_llama(tmp_path).save(tmp_path / "recipe.json")
    words = ["--recipe", str(tmp_path / "recipe.json"), "--run-name", "drill"]
    done = finish(start("drill", *words, "--faults", "hang,nan,disk_full,truncate"), timeout_s=560)
    assert done.code == 0, done.stderr[-3000:]
    faults = {each["fault"]: each for each in done.answer["faults"]}
    assert list(faults) == ["hang", "nan", "disk_full", "truncate"]
    for each in faults.values():
        assert each["weights_equal"] is True
        assert each["sample_order_equal"] is True
        assert (each["lost"], each["repeated"], each["max_relative_loss_difference"]) == (0, 0, 0.0)
        assert each["ledger_error"] < 0.01
    for name in ("hang", "truncate"):
        assert min(faults[name][key] for key in ("detect_s", "reschedule_s", "restore_s", "replay_s")) > 0
    truncated = faults["truncate"]
    replaced = sum(truncated[key] for key in ("detect_s", "reschedule_s", "restore_s"))
    assert done.answer["worst_replacement_s"] == pytest.approx(replaced)
    assert done.answer["plain_ray_restart_s"] > 1
    runs = Path(done.answer["run_dir"])
    (missed,) = read_notes(runs / "disk_full" / CHECKPOINT_FAULTS_FILE)
    assert (missed["step"], missed["what"]) == (32, "missed")
    (rejected,) = read_notes(runs / "truncate" / CHECKPOINT_FAULTS_FILE)
    assert (rejected["step"], rejected["what"]) == (24, "rejected")
    stacks = sorted((runs / "hang" / "stacks").iterdir())
    assert [file.name for file in stacks] == [f"attempt-001-rank-{rank}.txt" for rank in (0, 1)]
    assert "after_step" in stacks[1].read_text(), "the rank that hangs says where"
    # The checkpoint that was cut short was not used: its steps were made again, and those of the one before were not.
    samples = pq.read_table(runs / "truncate" / "samples.parquet").to_pylist()
    assert min(row["step"] for row in samples if row["attempt"] == 2) == 17
    assert {row["step"] for row in samples if row["committed"]} == set(range(1, 49))


def test_an_unknown_fault_is_refused(tmp_path: Path) -> None:
    tiny_llama(tmp_path).save(tmp_path / "recipe.json")
    done = run("drill", "--recipe", str(tmp_path / "recipe.json"), "--faults", "kil")
    assert (done.code, done.answer["field"]) == (2, "faults")
    assert "kill" in done.answer["suggestion"]
