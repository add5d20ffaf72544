"""A training job whose cluster and driver are killed: what its report has, from its folder and from an object store."""

from __future__ import annotations

import html
import re
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from heliostat.record.events import RECORD, read_events
from heliostat.record.logs import LOGS
from tests.object_stores import s3
from tests.pipelines.jobs import run, start
from tests.pipelines.test_train import wait_for
from tests.recipes import tiny_bert

OWN = """
import time
from pathlib import Path

from heliostat.recipe import Recipe, load
from heliostat.tasks.text_classification import TextClassification

last = 0.0


class Beating(TextClassification):
    def row_sums(self, outputs, batch, train):
        global last
        if time.time() - last > 0.1:
            last = time.time()
            print(f"heartbeat {last:.3f}", flush=True)
        return super().row_sums(outputs, batch, train)


def recipe() -> Recipe:
    return load(Path("base.json")).model_copy(update={"task": "mine:Beating", "name": "own"})
"""
BEAT = re.compile(r"heartbeat (\d+\.\d+)")


def beats(text: str) -> list[float]:
    return sorted(float(beat) for beat in BEAT.findall(text))


def log_of(page: str, name: str) -> str:
    """The text of a worker's log in a report."""
    ((text),) = re.findall(rf"<summary>{re.escape(name)}[^<]*<span.*?<pre>\n(.*?)</pre>", page, re.DOTALL)
    return html.unescape(text)


def check(answer: dict[str, Any], killed: float, session: Path) -> None:
    """The report has what every worker had printed a second before the kill, and all that before it."""
    assert answer["run_status"] == "killed"
    page = Path(answer["report"]).read_text()
    assert '<span class="status killed">killed</span>' in page
    assert "<td>schedule.max_steps</td>" not in page, "it is the recipe's own"
    assert "<td>parallelism.workers</td><td>1</td><td>2</td>" in page
    for plot in ("Timeline", "Where the time went", "Loss"):
        assert f"<h2>{plot}</h2>" in page
    assert "<td>checkpoint</td>" in page
    # Ray's own files say what was printed.
    files = {file: beats(file.read_text()) for file in (session / "logs").glob("worker-*.out")}
    files = {file: printed for file, printed in files.items() if printed}
    assert len(files) == 2
    for file, printed in files.items():
        pid = file.stem.rpartition("-")[2]
        (name,) = re.findall(rf"<summary>(\S+-{pid}) ", page)
        told = beats(log_of(page, name))
        assert told == printed[: len(told)]
        assert all(beat in told for beat in printed if beat < killed - 1.0)
        assert told[-1] > killed - 1.0


@pytest.mark.slow
def test_head_and_driver_are_killed_and_the_story_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {
        "schedule.max_steps": 100_000,
        "checkpoint.every_steps": 30,
        "training.evaluate_every_steps": 100_000,
        "training.keep_best": False,
    }
    tiny_bert(tmp_path, **settings).save(tmp_path / "base.json")
    (tmp_path / "mine.py").write_text(OWN)
    run_dir = tmp_path / "storage" / "runs" / "lost"
    with s3(monkeypatch) as address:
        words = ["--run-name", "lost", "--parallelism.workers", "2", "--record.storage", address.format("/records")]
        process = start("train", "mine:recipe", *words, cwd=tmp_path)
        assert process.stderr is not None
        threading.Thread(target=process.stderr.read, daemon=True).start()  # or it would wait for a reader

        def published() -> list[dict[str, Any]]:
            return [event for event in read_events(run_dir) if event["event"] == "checkpoint"]

        wait_for(lambda: process.poll() is not None or len(published()) > 1)
        assert process.poll() is None
        below = psutil.Process(process.pid).children(recursive=True)
        (scribe,) = [each for each in below if "heliostat.record.scribe" in each.cmdline()]
        head = [each for each in below if each.name() in ("gcs_server", "raylet")]
        assert len(head) == 2
        time.sleep(2)
        for each in head:
            each.kill()
        process.kill()
        killed = time.time()
        process.wait()
        scribe.wait(60)
        for each in below:  # what else Ray has takes a minute to notice
            with suppress(psutil.NoSuchProcess):
                each.kill()
        assert psutil.wait_procs(below, timeout=60)[1] == [], "the cluster is gone"
        connected = next(event for event in read_events(run_dir) if event["event"] == "connected")
        session = Path("/tmp/ray") / connected["session"]
        assert not (run_dir / "result.json").exists()
        assert len(list((run_dir / RECORD / LOGS).iterdir())) >= 4  # the job, Ray Train's controller, two workers
        done = run("report", "lost", "--storage", str(tmp_path / "storage"), cwd=tmp_path)
        assert done.code == 0, done.stderr[-3000:]
        check(done.answer, killed, session)
        shutil.rmtree(tmp_path / "storage")
        done = run("report", address.format("/records/lost"), cwd=tmp_path)
        assert done.code == 0, done.stderr[-3000:]
        assert done.answer["report"] == str(tmp_path / "lost.html")
        check(done.answer, killed, session)
