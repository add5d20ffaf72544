"""The story of a run from its folder, and its page in a browser."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from heliostat.place import Place
from heliostat.record.logs import LINE_CHARACTERS, Log
from heliostat.record.parts import Shipper
from heliostat.record.secrets import HIDDEN, hider
from heliostat.report import story as stories
from heliostat.report.page import render
from heliostat.report.story import tell
from tests import needs
from tests.browser import opened, tab

ROOT = Path(__file__).resolve().parents[2]
T = 1_700_000_000.0
EVIL = "<script>document.title = 'stolen'</script>"
FACTS = {
    "job": "train",
    "words": ["tiny_lm", "--optimizer.lr", "0.1"],
    "user": "anna",
    "folder": "/home/anna",
    "versions": {"python": "3.11", "ray": "2.60.0"},
    "machine": {"cpus": 2},
    "recipe": {"name": "tiny", "note": "</pre>" + EVIL},
    "changed": {"optimizer.lr": [0.001, 0.1]},
}


def lines(path: Path, *records: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        stream.write("".join(json.dumps(record) + "\n" for record in records))


def event(run: Path, after_s: float, name: str, /, **facts: Any) -> None:
    lines(run / "record/events/host-1.jsonl", {"time": T + after_s, "event": name, "host": "host", "pid": 1, **facts})


def recorded(run: Path) -> Path:
    """A run of two attempts: 4 s that count of the first's 10 s, a failure that was noticed 2 s after it, and 8 of the
    second's 10 s, from 15 s on."""
    event(run, 0, "begun", run_dir=str(run), **FACTS)
    for number, (start, step) in enumerate(((0.0, 4.0), (15.0, 8.0)), 1):
        seconds = {"start_up" if number == 1 else "restore": 10.0 - step, "step": step}
        attempt = {"started": T + start, "ended": T + start + 10, "workers": 2, "seconds": seconds}
        lines(run / f"ledger/attempt-{number:03d}.json", attempt)
    lines(run / "ledger/failures.jsonl", {"time": T + 12, "reasons": {"1": f"Traceback\nKilled: {EVIL}"}})
    event(run, 8, "checkpoint", step=2, folder="/checkpoints", seconds=0.1)
    event(run, 20, "checkpoint", step=4, folder="/checkpoints", seconds=0.1)
    event(run, 21, "bad_step", step=3, reason=EVIL)
    event(run, 22, "worker", log="10.0.0.1-7", name="RayTrainWorker")
    for step in range(1, 6):
        lines(
            run / "metrics.jsonl", {"step": step, "loss": 1 / step, "grad_norm": 1.0, "lr": 0.1, "time": T + 15 + step}
        )
    lines(run / "metrics.jsonl", {"step": 5, "validation": {"loss": 0.3, "accuracy": 0.8}, "time": T + 24})
    (run / "stacks").mkdir()
    (run / "stacks/attempt-001-rank-0.txt").write_text(f"Thread 0x1\n  File {EVIL}\n")
    for name, said in (("driver", "prepare: 3 s"), ("10.0.0.1-7", f"{EVIL} &amp; <b>bold</b>")):
        log = Log(run / "record/logs" / name, hider({}))
        log.write([said, *(f"{name} line {number}" for number in range(30))])
    return run


def test_the_ledger_is_that_of_the_attempts(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run")
    event(run, 30, "gone", reason="the job's process is gone")
    story = tell(run)
    assert (story.status, story.began, story.ended) == ("killed", T, T + 30)
    # 10 s of the first attempt, 2 until it was noticed, 3 until the second began, its 10, and 5 until the end.
    expected = {"start_up": 6.0, "step": 12.0, "detection": 2.0, "rescheduling": 3.0, "restore": 2.0, "idle": 5.0}
    assert {name: value for name, value in story.book["seconds"].items() if value} == pytest.approx(expected)
    assert story.book["goodput"] == pytest.approx(12 / 30)
    assert [each["event"] for each in story.events if each["event"] in ("attempt", "failure")] == [
        "attempt",
        "failure",
        "attempt",
    ]
    assert [log.name for log in story.logs] == ["driver", "10.0.0.1-7"]
    assert story.logs[1].titles == ["RayTrainWorker"]


def test_how_a_job_ended(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run")

    def status(after_s: float) -> str:
        return tell(run, now=T + after_s).status

    assert status(26) == "running"
    assert status(200) == "killed", "no sign of life for minutes"
    (run / "record/alive").write_text(f"{T + 190}\n")
    assert status(200) == "running", "the scribe gives one"
    (run / "result.json").write_text(json.dumps({"status": "done", "bundle": "/of/an/earlier/job"}))
    assert status(300) == "killed", "an answer of an earlier job is not this one's"
    assert tell(run).bundle == ""
    event(run, 195, "gone", reason="it is gone")
    assert (status(196), tell(run).reason) == ("killed", "it is gone")
    event(run, 200, "begun", run_dir=str(run), **FACTS)
    assert status(201) == "running", "it was started again"
    event(run, 210, "ended", status="failed", seconds=10, error="ValueError: no")
    assert (status(300), tell(run).reason) == ("failed", "ValueError: no")
    assert tell(run).bundle == "/of/an/earlier/job"
    assert (tell(run).began, tell(run).ended) == (T + 200, T + 210)


def test_a_run_that_was_not_recorded(tmp_path: Path) -> None:
    lines(
        tmp_path / "ledger/attempt-001.json", {"started": T, "ended": T + 10, "workers": 1, "seconds": {"step": 10.0}}
    )
    assert tell(tmp_path).status == "unknown"
    (tmp_path / "result.json").write_text('{"status": "done"}')
    story = tell(tmp_path)
    assert (story.status, story.began, story.ended) == ("done", T, T + 10)
    assert "The job was not recorded" in render(story)


def test_long_logs_show_their_ends_and_say_where_the_rest_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stories, "MOST_LINES", 100)
    run = tmp_path / "run"
    event(run, 0, "begun", run_dir=str(run), **FACTS)
    log = Log(run / "record/logs/driver", hider({}))
    log.write([f"number {number}." for number in range(1000)] + ["x" * 2 * LINE_CHARACTERS])
    (shown,) = tell(run).logs
    assert (len(shown.first), len(shown.last), shown.left_out) == (10, 90, 901)
    page = render(tell(run))
    assert "number 9." in page
    assert "number 10." not in page
    assert "number 999." in page
    assert f"901 lines are left out: {run}/record/logs/driver has them" in page
    assert len(page) < 6 << 20


def test_a_page_holds_no_secret_that_the_recorder_never_saw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = recorded(tmp_path / "run")
    monkeypatch.setenv("SOME_TOKEN", "wonderful-secret")
    lines(run / "ledger/failures.jsonl", {"time": T + 13, "reasons": {"0": "s3://me:hunter22@b wonderful-secret"}})
    page = render(tell(run))
    assert "hunter22" not in page
    assert "wonderful-secret" not in page
    assert HIDDEN in page


@needs.chromium
def test_a_browser_shows_it(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run")
    event(run, 30, "gone", reason="the job's process is gone")
    page = tmp_path / "page.html"
    page.write_text(render(tell(run)))
    document, console = opened(page)
    assert console == ""
    plots = ["Timeline", "Where the time went", "Loss", "Gradient norm", "Learning rate", "Validation accuracy"]
    heads = ["What was run", *plots, "Ledger", "Failures", "Events", "Logs"]
    assert re.findall(r"<h2>(.*?)</h2>", document) == heads
    assert "Not drawn" not in document
    assert len(re.findall(r'<svg class="main-svg"[^>]*>', document)) >= len(plots)
    assert '<span class="status killed">killed</span>' in document
    assert "<title>Run run</title>" in document, "nothing of the run's text was run"
    assert document.count(html.escape(EVIL, quote=False)) >= 5  # event, failure, stacks, log, recipe
    assert not re.search(r"<(script|img|link)[^>]* (src|href)=", document), "it loads nothing"


@needs.chromium
def test_logs_are_searched_and_their_text_is_text(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(render(tell(recorded(tmp_path / "run"))))
    with tab(page.as_uri(), tmp_path / "profile") as used:
        text = "[...document.querySelectorAll('details.log pre')].map(pre => pre.textContent)"
        whole = used.run(text)
        assert f"{EVIL} &amp; <b>bold</b>" in whole[1]

        def search(word: str) -> list[str]:
            used.run(f"search_ = document.getElementById('search'); search_.value = {json.dumps(word)};"
                     "search_.dispatchEvent(new Event('input'))")  # fmt: skip
            return used.run(text)

        driver, worker = search("LINE 17")
        assert (driver.split(" ", 1)[1], worker.split(" ", 1)[1]) == ("driver line 17", "10.0.0.1-7 line 17")
        driver, worker = search("<script>")
        assert (driver, worker.split(" ", 1)[1]) == ("", f"{EVIL} &amp; <b>bold</b>")
        assert used.run("[...document.querySelectorAll('details.log')].map(each => each.open)") == [False, True]
        assert search("") == whole
        assert used.run("document.title") == "Run run"
        assert used.problems == []


def report(*words: str, cwd: Path) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.report", *words],
        cwd=cwd, env={"PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}", "PATH": "", "HOME": str(cwd)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_by_name_by_folder_the_last_one_and_from_where_it_was_shipped(tmp_path: Path) -> None:
    runs = tmp_path / "storage" / "runs"
    for name in ("first", "second"):
        recorded(runs / name)
        (runs / name / "record/alive").write_text(f"{T + 40}\n")
    place = Place.at(tmp_path / "store") / "second" / "record"
    Shipper(runs / "second", place, hider({})).ship()
    storage = ("--storage", str(tmp_path / "storage"))
    for words, path in (
        (("first", *storage), runs / "first/record/story.html"),
        (("last", *storage), runs / "second/record/story.html"),
        ((str(runs / "first"), "--output", "mine.html"), tmp_path / "mine.html"),
        ((f"file://{tmp_path}/store/second",), tmp_path / "second.html"),
    ):
        code, answer = report(*words, cwd=tmp_path)
        assert (code, answer["status"], answer["run_status"]) == (0, "done", "killed"), answer
        assert answer["report"] == str(path)
        assert html.escape(EVIL) in path.read_text()
    for words, suggestion in ((("secnd", *storage), "did you mean second?"), ((f"file://{tmp_path}",), "one run")):
        code, answer = report(*words, cwd=tmp_path)
        assert (code, answer["status"], answer["field"]) == (2, "refused", "job")
        assert suggestion in answer["suggestion"]
