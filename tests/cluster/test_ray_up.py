"""`ray up` on hosts of our own: a job trains over two, one loses its power and comes back, a whole life of a model
ends in an endpoint, and `ray down` leaves nothing."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from heliostat.curves import METRICS_FILE, read_metrics
from heliostat.models import bundle as bundles
from heliostat.recipe import Recipe, override
from heliostat.registry import promote, register
from heliostat.train.folder import LEDGER
from heliostat.train.loop import train
from tests import needs
from tests.cluster import clients
from tests.cluster.lab import SUBMIT, WAIT_S, Lab, lab
from tests.recipes import prepared, tiny_bert

ENDLESS = 1_000_000


def train_through_a_power_cut(lab: Lab, recipe: Recipe) -> dict[str, Any]:
    """The answer of a run that is stopped once it has grown again."""
    recipe = override(
        recipe,
        {
            "schedule.max_steps": ENDLESS,
            "training.evaluate_every_steps": ENDLESS,
            "training.micro_batch_size": 4,
            "checkpoint.every_steps": 50,
            "parallelism.workers": 2,
            "parallelism.min_workers": 1,
            "recovery.grow_every_s": 3.0,
        },
    )
    file, run_dir = lab.room.shared / "endless.json", recipe.storage_path / "runs" / "endless"
    recipe.save(file)

    def attempts() -> list[int]:
        """Their workers."""
        return [json.loads(each.read_text())["workers"] for each in sorted((run_dir / LEDGER).glob("attempt-*.json"))]

    def step() -> int:
        return max((record["step"] for record in read_metrics(run_dir / METRICS_FILE)), default=0)

    words = ["python", "-m", "pipelines.train", file, "--run-name", "endless"]
    job = lab.start(*SUBMIT, "--submission-id", "endless", "--", *words)
    lost = lab.room.hosts[-1]
    job.wait_for(lambda: step() > 60, "steps on two hosts")
    lab.room.cut(lost)
    job.wait_for(lambda: attempts() == [2, 1], "an attempt on the host that is left")
    reached = step()
    job.wait_for(lambda: step() > reached + 30, "steps on one host")
    lab.room.boot(lost)  # and nobody types anything
    job.wait_for(lambda: attempts() == [2, 1, 2], "an attempt on two hosts again")
    reached = step()
    job.wait_for(lambda: step() > reached + 30, "steps on two hosts again")
    lab.start("ray", "job", "stop", "endless").wait_for((run_dir / "result.json").is_file, "the answer")
    records = [record["step"] for record in read_metrics(run_dir / METRICS_FILE) if "loss" in record]
    assert records == list(range(1, len(records) + 1))
    return json.loads((run_dir / "result.json").read_text())


def weak_champion(recipe: Recipe, folder: Path) -> None:
    """Registers a model that has hardly learned."""
    weak = override(recipe, {"schedule.max_steps": 1, "optimizer.lr": 1e-6})
    outcome = train(weak, prepared(weak).folder, folder)
    promote(recipe, register(recipe, bundles.read(Path(outcome["bundle"])), None))


def serve_through_a_power_cut(lab: Lab, file: Path) -> None:
    """The endpoint of a recipe's champion on two hosts, asked through two. One loses its power, and what others had
    sent to it is answered, but for answers that had begun; when it comes back, so does its replica."""
    lab.type("ray", "exec", lab.file, "serve shutdown --yes")  # whose choice of a proxy stays as long as it runs
    words = ["python", "-m", "pipelines.deploy", file, "--keep", "--deploy.host", "0.0.0.0"]
    words += ["--deploy.min_replicas", "2", "--deploy.max_replicas", "2", "--deploy.cpus_per_replica", "1"]
    lab.type(*SUBMIT, "--", *words)
    *others, lost = lab.room.hosts
    until = lab.room.shared / "asked"
    until.touch()
    load = lab.start("python", "-m", "tests.cluster.clients", until, *(host.address for host in others))

    def pairs() -> int:
        """Of a replica and a host that it answered through."""
        lines = [line for line in load.said().splitlines() if line.endswith("}")]
        return len(json.loads(lines[-1])["answers"]) if lines else 0

    load.wait_for(lambda: pairs() == 4, "answers of both replicas through both hosts")
    lab.room.cut(lost)
    lab.room.boot(lost)  # and nobody types anything
    load.wait_for(lambda: pairs() == 6, "answers of another replica through both hosts")
    until.unlink()
    seen = json.loads(load.done().splitlines()[-1])
    assert seen["lost"] == []
    assert seen["broken_off"] <= clients.EACH * len(others)

    def heard() -> list[list[str]]:
        """By each host's HAProxy: where its figures are, and where its clients come."""
        said = [host.run("ss", "-tlnpH", capture_output=True).stdout.splitlines() for host in lab.room.hosts]
        return [sorted(line.split()[3].rpartition(":")[0] for line in lines if '"haproxy"' in line) for lines in said]

    load.wait_for(lambda: all(heard()), "HAProxy on each host")
    assert heard() == [["0.0.0.0", "127.0.0.1", "127.0.0.1"]] * len(lab.room.hosts)


@needs.hosts
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_cluster_from_up_to_down() -> None:
    with lab() as there:
        recipe = tiny_bert(there.room.shared, **{"schedule.max_steps": 150, "optimizer.lr": 2e-3})
        recipe.save(there.room.shared / "recipe.json")
        weak_champion(recipe, there.room.shared / "weak")
        there.up()
        there.wait_for_nodes()
        with there.tunnel():
            answer = train_through_a_power_cut(there, recipe)
            assert answer["status"] == "interrupted"
            assert [each["workers"] for each in answer["ledger"]["by_attempt"]] == [2, 1, 2]
            life = there.type(*SUBMIT, "--", "python", "-m", "pipelines.lifecycle", there.room.shared / "recipe.json")
            (line,) = re.findall(r'^{"job": .*$', life, re.MULTILINE)
            assert json.loads(line)["promoted"], line

        question = json.dumps({"inputs": [{"text": "sun salt mirror"}, {"text": "cloud noon shade"}]})
        ask = f"curl -s 127.0.0.1:8000/predict -H 'content-type: application/json' -d '{question}'"
        (said,) = re.findall(r'{"predictions".*}', there.type("ray", "exec", there.file, ask))
        assert [each["label"] for each in json.loads(said)["predictions"]] == ["dark", "bright"]

        with there.tunnel():
            serve_through_a_power_cut(there, there.room.shared / "recipe.json")

        there.type("ray", "down", "--yes", there.file)
        for host in there.room.hosts[1:]:  # as docs/cluster.md says
            subprocess.run(host.inside("bash", "-ic", "ray stop"), check=False)  # what counts is what it leaves
        deadline = time.monotonic() + WAIT_S
        while left := [line for host in there.room.hosts for line in host.processes() if "ray" in line]:
            assert time.monotonic() < deadline, left
            time.sleep(1)
