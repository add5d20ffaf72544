"""The whole life of a model, on a small recipe: a better challenger is promoted, a worse one is not, and what has not
changed is not done again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
import yaml

from heliostat.hardware import free_port
from heliostat.launch.cluster import KEPT_SESSION, stop_kept_cluster
from heliostat.recipe import build
from tests.pipelines.jobs import ROOT, Done, finish, run, start
from tests.prometheus import Prometheus
from tests.recipes import prepared, tiny_bert


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lifecycle")
    recipe = tiny_bert(
        folder,
        **{
            "schedule.max_steps": 150,
            "optimizer.lr": 2e-3,
            "parallelism.workers": 2,
            "deploy.port": free_port(),
            "tune.num_trials": 2,
            "tune.reports": 2,
            "tune.objectives": ["loss"],
            "tune.space": {
                "optimizer.lr": {"kind": "log_uniform", "low": 1.5e-3, "high": 3e-3},
                "model.max_length": {"kind": "choice", "values": [40, 44]},
            },
        },
    )
    recipe.save(folder / "recipe.json")
    return folder / "recipe.json"


def ok(done: Done) -> Done:
    assert done.code == 0, done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def weak_champion(recipe_file: Path) -> Path:
    """The recipe's file, once its registry holds a champion that has hardly learned."""
    weak = ok(run("train", str(recipe_file), "--schedule.max-steps", "1", "--optimizer.lr", "1e-6"))
    ok(run("register", str(recipe_file), "--bundle", weak.answer["bundle"]))
    return recipe_file


@pytest.fixture(scope="module")
def first(weak_champion: Path) -> dict[str, Any]:
    """The answer of the recipe's life."""
    return ok(run("lifecycle", str(weak_champion))).answer


@pytest.mark.timeout(1200)
def test_a_better_challenger_is_promoted_and_nothing_is_done_twice(first: dict[str, Any], weak_champion: Path) -> None:
    assert first["promoted"] is True, first["gate"]
    assert first["champion"] == first["version"] == 2
    assert first["gate"]["lower_bound"] > 0
    assert first["gate"]["against"] == "champion version 1"
    low, high = first["metrics"]["test.accuracy.ci95"]
    assert low <= first["metrics"]["test.accuracy"] <= high
    assert [answer["label"] in ("dark", "bright") for answer in first["answers"]] == [True, True]

    card = json.loads((Path(first["bundle"]) / "card.json").read_text())
    best = build(first["best_recipe"])
    assert best.model.max_length in (40, 44)
    assert card["data"]["fingerprint"] == prepared(best).fingerprint, "rows as the search's winner had them"

    again = ok(run("lifecycle", str(weak_champion))).answer
    unchanged = {row["stage"] for row in again["stages"] if row["unchanged"]}
    assert unchanged == {"tune", "train", "evaluate"}
    assert again["champion"] == 2
    assert again["metrics"] == first["metrics"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_worse_challenger_is_not_and_the_champion_is_what_jobs_take(
    first: dict[str, Any], weak_champion: Path, tmp_path: Path
) -> None:
    nothing = ["--schedule.max-steps", "1", "--tune.space", "{}", "--optimizer.lr", "1e-6", "--seed", "0"]
    worse = ok(run("lifecycle", str(weak_champion), *nothing)).answer
    assert worse["promoted"] is False
    assert worse["champion"] == 2, "the champion stays and is what is deployed"

    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("sun salt mirror", "noon shade cloud")))
    predicted = ok(run("predict", str(weak_champion), "--input", str(texts))).answer
    table = pq.read_table(predicted["predictions"])
    assert table.num_rows == 2
    assert set(table.column("predicted_label").to_pylist()) <= {"dark", "bright"}
    evaluated = ok(run("evaluate", str(weak_champion))).answer
    assert evaluated["metrics"]["test.accuracy"] == pytest.approx(first["metrics"]["test.accuracy"])


@pytest.mark.slow
def test_deploy_serves_until_interrupted(weak_champion: Path) -> None:
    recipe_file = weak_champion
    port = json.loads(recipe_file.read_text())["deploy"]["port"]
    process = start("deploy", str(recipe_file))
    try:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("serving "):
                break
        assert said[-1].startswith("serving "), "".join(said)[-3000:]
        predict(f"http://127.0.0.1:{port}")
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, stderr[-3000:]
    assert json.loads(stdout.strip().splitlines()[-1])["endpoint"].endswith(str(port))


def predict(endpoint: str) -> dict[str, Any]:
    answer = httpx.post(f"{endpoint}/predict", json={"inputs": [{"text": "sun salt"}]}, timeout=10)
    assert answer.status_code == 200, answer.text
    return answer.json()


def served_from_file(bundle: str, folder: Path, env: dict[str, str]) -> dict[str, Any]:
    """What the endpoint answers after `serve deploy` of the repository's file, with this bundle named in it."""
    config = yaml.safe_load((ROOT / "serve" / "classifier.yaml").read_text())
    config["http_options"]["port"] = free_port()
    config["applications"][0]["args"] = {"bundle": bundle, "version": "from a file"}
    file = folder / "classifier.yaml"
    file.write_text(yaml.safe_dump(config))
    serve = str(Path(sys.executable).with_name("serve"))
    for arguments in (["shutdown", "-y"], ["deploy", str(file)]):
        done = subprocess.run(
            [serve, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    options, end = config["http_options"], time.monotonic() + 120
    endpoint = f"http://{options['host']}:{options['port']}"
    while time.monotonic() < end:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{endpoint}/healthz", timeout=5).status_code == 200:
                break
        time.sleep(0.5)
    answer = predict(endpoint)
    assert answer["version"] == "from a file"
    return answer


METRICS = {
    "node": "ray_node_cpu_count",
    "autoscaler": "autoscaler_active_nodes",
    "endpoint": "ray_heliostat_serve_requests_total",
}


def seen(storage: str) -> set[str]:
    """Whose metrics Prometheus gets beside the cluster that was kept with this storage."""
    prometheus, found = Prometheus(free_port()), set[str]()
    job = start("monitor", "--storage", storage, "--port", str(prometheus.port), "--every-s", "1")
    deadline = time.monotonic() + 60
    while found != set(METRICS) and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.5)
        if prometheus.answers():
            found = {name for name, query in METRICS.items() if prometheus.now(query)}
    job.send_signal(signal.SIGINT)
    ok(finish(job))
    return found


KEEP = """
import sys
from pathlib import Path
from heliostat.launch.cluster import connect
from heliostat.recipe import load, override
with connect(override(load(Path(sys.argv[1])), {"storage": sys.argv[2]}), keep=True):
    pass
"""


@pytest.mark.slow
def test_submitted_job_and_kept_cluster(weak_champion: Path, tmp_path: Path) -> None:
    """`ray job submit` on a cluster that `--keep` left running, then `make stop` leaves nothing."""
    recipe_file = weak_champion
    storage = json.loads(recipe_file.read_text())["storage"]
    kept = ok(run("deploy", str(recipe_file), "--keep"))
    env = os.environ | {"RAY_AUTH_MODE": "token", "RAY_ADDRESS": "http://127.0.0.1:8265"}
    try:
        assert httpx.get(kept.answer["endpoint"] + "/healthz", timeout=10).status_code == 200
        digest = predict(kept.answer["endpoint"])["bundle"]
        assert seen(storage) == set(METRICS)
        submitted = subprocess.run(
            [
                str(Path(sys.executable).with_name("ray")),
                "job",
                "submit",
                "--runtime-env",
                "runtime_env.yaml",
                "--working-dir",
                ".",
                "--",
                *f"python -m pipelines.train {recipe_file} --schedule.max-steps 4 --run-name submitted".split(),
            ],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert submitted.returncode == 0, submitted.stdout[-3000:] + submitted.stderr[-2000:]
        result = json.loads((Path(storage) / "runs" / "submitted" / "result.json").read_text())
        assert result["status"] == "done"
        assert len(result["losses"]) == 4
        assert served_from_file(kept.answer["bundle"], Path(storage), env)["bundle"] == digest
        # A job without an address is still on its own: the kept cluster is neither used nor in its way.
        ok(run("train", str(recipe_file), "--schedule.max-steps", "1", "--run-name", "beside"))
        # Another storage keeps another cluster; ending that one touches no other.
        before = (Path(storage) / KEPT_SESSION).read_text()
        for folder in (storage, str(tmp_path)):
            subprocess.run([sys.executable, "-c", KEEP, recipe_file, folder], cwd=ROOT, env=env, check=True)
        assert (Path(storage) / KEPT_SESSION).read_text() == before
        assert (tmp_path / KEPT_SESSION).read_text().split()[0] != before.split()[0]
        assert stop_kept_cluster(tmp_path) > 0
        assert httpx.get(kept.answer["endpoint"] + "/healthz", timeout=10).status_code == 200
    finally:
        stopped = subprocess.run(
            [sys.executable, "-m", "pipelines.stop", "--storage", storage],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert stopped.returncode == 0, stopped.stderr
    assert "processes ended" in stopped.stdout
    with pytest.raises(httpx.HTTPError):
        httpx.get(kept.answer["endpoint"] + "/healthz", timeout=5)
