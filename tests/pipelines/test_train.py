"""The training job through Ray Train: a killed worker, an interrupt, a recipe and a task of one's own."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import needs
from tests.pipelines.jobs import ROOT, Done, finish, run, start
from tests.recipes import tiny_bert

# Long enough to be met while they run.
LONG = {
    "schedule.max_steps": 300,
    "checkpoint.every_steps": 20,
    "parallelism.workers": 2,
    "training.keep_best": False,
    "training.evaluate_every_steps": 150,
}


def wait_for(condition: object, timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def train_workers(parent: int) -> list[int]:
    """Process ids of Ray Train's workers below a job's process."""
    table = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in table.splitlines()[1:]]
    parents = {int(pid): int(ppid) for pid, ppid, _ in rows}

    def below(pid: int) -> bool:
        while pid in parents and pid != parent:
            pid = parents[pid]
        return pid == parent

    return [int(pid) for pid, _, args in rows if "ray::RayTrainWorker" in args and below(int(pid))]


def weights(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "bundle/model.safetensors").read_bytes()).hexdigest()


def last_step(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    tiny_bert(folder, **LONG).save(folder / "recipe.json")
    return folder / "recipe.json"


@pytest.fixture(scope="module")
def undisturbed(recipe_file: Path) -> Done:
    done = run("train", "--recipe", str(recipe_file), "--run-name", "undisturbed")
    assert done.code == 0, done.stderr[-3000:]
    return done


@needs.ps
def test_killed_worker_changes_nothing(recipe_file: Path, undisturbed: Done) -> None:
    """kill -9 in mid-run: the run ends by itself with bitwise the weights of one that nobody disturbed."""
    runs = recipe_file.parent / "storage" / "runs"
    process = start("train", "--recipe", str(recipe_file), "--run-name", "killed")
    wait_for(lambda: last_step(runs / "killed") > 60)
    victims = train_workers(process.pid)
    assert victims, "no worker was found to kill"
    os.kill(victims[-1], signal.SIGKILL)
    done = finish(process)
    assert done.code == 0, done.stderr[-3000:]
    assert done.answer["attempts"] == 2
    assert done.answer["losses"] == undisturbed.answer["losses"]
    assert weights(runs / "killed") == weights(runs / "undisturbed")
    ledger = done.answer["ledger"]
    assert ledger["seconds"]["rescheduling"] > 0
    assert sum(ledger["seconds"].values()) == pytest.approx(ledger["wall_s"], rel=0.01)
    recorded = json.loads(Path(done.answer["result"]).read_text())
    assert recorded == done.answer
    told = run("report", str(runs / "killed"))
    assert (told.code, told.answer["run_status"]) == (0, "done"), told.stderr[-3000:]
    page = Path(told.answer["report"]).read_text()
    events = re.findall(r"<td>(begun|attempt|failure|restored|ended)</td>", page)
    assert events == ["begun", "attempt", "failure", "attempt", "restored", "ended"]


@needs.ps
@pytest.mark.slow
@pytest.mark.usefixtures("undisturbed")
def test_interrupt_writes_a_checkpoint_and_resumes(recipe_file: Path) -> None:
    runs = recipe_file.parent / "storage" / "runs"
    process = start("train", "--recipe", str(recipe_file), "--run-name", "interrupted")
    wait_for(lambda: last_step(runs / "interrupted") > 30)
    process.send_signal(signal.SIGTERM)  # as from Ctrl-C, which other tests send
    done = finish(process)
    assert done.code == 130, done.stderr[-3000:]
    assert done.answer["status"] == "interrupted"
    step = done.answer["step"]
    assert (runs / "interrupted" / "checkpoints" / f"step-{step:08d}" / "manifest.json").is_file()
    assert not train_workers(process.pid)
    resumed = run("train", "--recipe", str(recipe_file), "--resume", str(runs / "interrupted"))
    assert resumed.code == 0, resumed.stderr[-3000:]
    assert len(resumed.answer["losses"]) == LONG["schedule.max_steps"]
    assert weights(runs / "interrupted") == weights(runs / "undisturbed")


@pytest.mark.slow
def test_second_interrupt_ends_at_once(recipe_file: Path) -> None:
    runs = recipe_file.parent / "storage" / "runs"
    process = start("train", "--recipe", str(recipe_file), "--run-name", "twice", "--checkpoint.every-steps", "100000")
    wait_for(lambda: last_step(runs / "twice") > 5)
    for worker in train_workers(process.pid):
        os.kill(worker, signal.SIGSTOP)  # a run that hangs would keep the first interrupt waiting
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    done = finish(process, timeout_s=60)
    assert done.code == 130
    assert done.answer["status"] == "interrupted"
    assert not list((runs / "twice").rglob("manifest.json"))
    wait_for(lambda: not train_workers(process.pid), timeout_s=30)


OWN = """
from heliostat.recipe import Recipe, load
from heliostat.tasks.text_classification import TextClassification
from pathlib import Path


class Shouting(TextClassification):
    def parse(self, inputs):
        return super().parse([{"text": item["text"].lower()} for item in inputs])


def recipe() -> Recipe:
    return load(Path("base.json")).model_copy(update={"task": "mine:Shouting", "name": "own"})
"""


@pytest.mark.slow
def test_own_task_and_recipe_from_outside(tmp_path: Path) -> None:
    tiny_bert(tmp_path, **{"schedule.max_steps": 6, "parallelism.workers": 2}).save(tmp_path / "base.json")
    (tmp_path / "mine.py").write_text(OWN)
    done = run("train", "mine:recipe", cwd=tmp_path)
    assert done.code == 0, done.stderr[-3000:]
    card = json.loads((Path(done.answer["bundle"]) / "card.json").read_text())
    assert card["task"] == "mine:Shouting"


@pytest.mark.slow
def test_full_disk_is_said_and_leaves_no_half_checkpoint(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False).returncode:
        pytest.skip("a small disk may not be mounted here: `sudo make test`; in a container, --cap-add SYS_ADMIN")
    try:
        recipe = tiny_bert(
            tmp_path,
            **{
                "schedule.max_steps": 400,
                "checkpoint.every_steps": 20,
                "checkpoint.keep": 50,
                "parallelism.workers": 1,
                "training.keep_best": False,
            },
        )
        recipe.model_copy(update={"storage": str(disk)}).save(tmp_path / "recipe.json")
        done = run("train", "--recipe", str(tmp_path / "recipe.json"), "--run-name", "full")
        assert done.code == 1, done.stderr[-3000:]
        checkpoints = disk / "runs" / "full" / "checkpoints"
        for folder in checkpoints.iterdir():
            assert (folder / "manifest.json").is_file(), f"{folder} is half-written"
        assert not (disk / "runs" / "full" / "bundle").exists()
        assert "full" in done.answer["error"] or "No space left" in done.answer["error"]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_nothing_is_imported_at_the_source_root() -> None:
    """An __init__.py there would shadow the standard library's `platform`, and Ray would die at import."""
    assert not (ROOT / "platform" / "__init__.py").exists()
    found = subprocess.run(
        [sys.executable, "-c", "import platform; print(platform.python_version())"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert found.stdout.strip().startswith("3.")
