"""Prometheus beside a cluster, and each panel of the dashboards asked of it while there is something to see."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

from heliostat.hardware import free_port
from heliostat.launch.cluster import KEPT_SESSION, nodes_file
from heliostat.launch.gauges import exported
from heliostat.launch.train import fit
from heliostat.launch.tune.search import search
from heliostat.monitor.dashboards import DASHBOARDS, SERVING, Dashboard, Panel, render
from heliostat.recipe import Deploy, Refused, override
from heliostat.train.folder import STOP_FILE
from heliostat.train.loop import train
from heliostat.train.pulse import Pulse
from pipelines import drift
from pipelines.job import Job, Options
from serve.application import deploy
from tests import needs, recipes
from tests.bundles import chat_bundle
from tests.pipelines.jobs import ROOT, finish, run, start
from tests.prometheus import Prometheus

LIST = "prom_metrics_service_discovery.json"
SPACE = {"optimizer.lr": {"kind": "log_uniform", "low": 1e-4, "high": 1e-2}}
PATIENCE_S = 180.0


# -- the job


@contextmanager
def head(session: Path) -> Iterator[None]:
    """A process that looks as the head of a cluster does."""
    words = ["/opt/ray/gcs_server", "-c", "import time; time.sleep(600)", f"--session-dir={session}"]
    process = subprocess.Popen(words, executable=sys.executable)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def test_the_cluster_is_the_kept_one_or_else_the_last(tmp_path: Path) -> None:
    older, newer = (tmp_path / f"session_2999-01-0{day}_00-00-00_000000_1" for day in (1, 2))
    for session in (older, newer):
        session.mkdir()
        (session / LIST).write_text("[]")
    with head(older), head(newer):
        assert nodes_file(tmp_path) == newer / LIST
        (tmp_path / KEPT_SESSION).write_text(f"{older.name} 127.0.0.1:6379")
        assert nodes_file(tmp_path) == older / LIST
        (older / LIST).unlink()
        with pytest.raises(Refused, match=r"cluster: session_2999-01-01.* has no list.*dashboard"):
            nodes_file(tmp_path)


def test_without_a_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(psutil, "process_iter", lambda attributes: iter(()))
    with pytest.raises(Refused, match=r"cluster: no Ray runs on this machine \(start one"):
        nodes_file(tmp_path)


def test_without_prometheus(tmp_path: Path) -> None:
    done = run("monitor", "--storage", str(tmp_path), PATH=str(tmp_path))
    assert (done.code, done.answer["status"], done.answer["field"]) == (2, "refused", "prometheus")
    assert done.answer["suggestion"] == "sudo apt-get install prometheus"


@needs.promtool
def test_a_taken_port(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run("monitor", "--storage", str(tmp_path), "--port", port)
    assert (done.code, done.answer["status"], done.answer["field"]) == (2, "refused", "port")


# -- the dashboards


@pytest.mark.parametrize("board", DASHBOARDS, ids=lambda board: board.name)
def test_files_are_what_the_code_makes(board: Dashboard) -> None:
    file = ROOT / "deploy" / "grafana" / f"{board.name}.json"
    assert file.read_text() == render(board), "make dashboards"


def test_no_file_is_left_over() -> None:
    assert {file.stem for file in (ROOT / "deploy" / "grafana").glob("*.json")} == {board.name for board in DASHBOARDS}


@pytest.fixture
def prometheus(ray_cluster: None, tmp_path: Path) -> Iterator[Prometheus]:
    """Started by the job, beside the tests' cluster; whose nodes are listed here, since it has no dashboard."""
    import ray

    session = Path(ray._private.worker._global_node.get_session_dir_path())
    nodes = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in ray.nodes() if node["Alive"]]
    (session / LIST).write_text(json.dumps([{"labels": {"job": "ray"}, "targets": nodes}]))
    (tmp_path / KEPT_SESSION).write_text(f"{session.name} {ray.get_runtime_context().gcs_address}")
    found = Prometheus(free_port())
    job = start("monitor", "--storage", str(tmp_path), "--port", str(found.port), "--every-s", "1")
    try:
        until(lambda: found.answers() or job.poll() is not None)
        yield found
    finally:
        job.send_signal(signal.SIGINT)
        done = finish(job, timeout_s=60)
        (session / LIST).unlink()
    assert done.code == 0, done.stderr
    assert (done.answer["status"], done.answer["session"]) == ("done", session.name)
    assert not found.answers()


def until(reached: Callable[[], bool]) -> bool:
    """Whether it was reached in time."""
    deadline = time.monotonic() + PATIENCE_S
    while not (there := reached()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return there


def promql(query: str) -> str:
    """As Grafana asks it where all is chosen."""
    asked = query.replace("$__range", "10m").replace("$usd_per_node_hour", "2")
    return re.sub(r"\$\w+", ".*", asked)


class Panels:
    """Those that were empty until now. What each of its queries gives has to have a number in it."""

    def __init__(self, prometheus: Prometheus, panels: Iterable[Panel]) -> None:
        self.prometheus, self.begun = prometheus, time.time()
        self.empty = list(panels)

    def look(self) -> list[str]:
        """Their titles."""
        self.empty = [panel for panel in self.empty if not self._is_filled(panel)]
        return [panel.title for panel in self.empty]

    def _is_filled(self, panel: Panel) -> bool:
        ask, now = self.prometheus, time.time()
        queries = [promql(query) for query in panel.queries.values()]
        return all(ask.now(query) if panel.total else ask.numbers(query, self.begun, now) for query in queries)


@pytest.mark.slow
@needs.promtool
def test_no_panel_is_empty(prometheus: Prometheus, tmp_path: Path) -> None:
    """While a model is trained, another searched for, and a classifier (watched for drift) and a language model are
    asked."""
    from ray import serve

    every = [panel for board in DASHBOARDS for row in board.rows.values() for panel in row]
    panels = Panels(prometheus, [panel for panel in every if not panel.needs_gpu])
    others = Panels(prometheus, [panel for panel in every if panel.needs_gpu])
    llama = recipes.tiny_llama(tmp_path / "run", **{"schedule.max_steps": 1_000_000, "parallelism.workers": 1})
    searched = {"tune.space": SPACE, "tune.num_trials": 2, "tune.epochs": 1, "tune.reports": 1}
    bert = recipes.tiny_bert(tmp_path / "search", **searched)
    rows, texts = recipes.prepared(llama).folder, recipes.prepared(bert)
    classifier = Path(train(bert, texts.folder, tmp_path / "classifier")["bundle"])
    language_model = chat_bundle(tmp_path)
    settings = Deploy(port=free_port(), max_replicas=1, cache_tokens=8192)
    sampled = settings.model_copy(update={"sample_share": 1.0, "sample_every_s": 1.0})
    run_dir, search_dir = tmp_path / "watched", tmp_path / "trials"
    search_dir.mkdir()
    tokens = {"prompt": 0, "completion": 0}
    with ThreadPoolExecutor() as beside:
        training = beside.submit(fit, llama, rows, run_dir)
        searching = beside.submit(search, bert, texts, search_dir)
        try:
            url = deploy(classifier, "1", sampled, "watched")
            asked_of = Job("drift", override(bert, {"drift.min_rows": 10}), Options(bundle=str(classifier)), tmp_path)
            gauges = drift.Gauges("watched")

            def batched() -> bool:
                for inputs in ([{"text": "sun"}] * 3, []):
                    httpx.post(f"{url}/predict", json={"inputs": inputs}, timeout=60)
                gauges.tell(drift.look(asked_of))
                empty = panels.look()
                return not {"Inputs of a forward pass", *(panel.title for panel in SERVING.rows["Drift"])} & set(empty)

            until(batched)
            deploy(language_model, "1", settings, "watched")

            def filled() -> bool:
                asked = {"model": "tiny", "prompt": "sun salt", "max_tokens": 8}
                usage = httpx.post(f"{url}/v1/completions", json=asked, timeout=60).json()["usage"]
                for kind in tokens:
                    tokens[kind] += usage[f"{kind}_tokens"]
                return not panels.look()

            until(filled)
            assert panels.empty == []
            # Nothing else is marked.
            assert torch.cuda.is_available() or others.look() == [panel.title for panel in every if panel.needs_gpu]
            check_numbers(prometheus, searching.result(), tokens)
        finally:
            run_dir.mkdir(exist_ok=True)
            (run_dir / STOP_FILE).touch()
            assert training.result()["status"] == "interrupted"
            serve.shutdown()


def check_numbers(prometheus: Prometheus, searched: dict[str, Any], tokens: dict[str, int]) -> None:
    """What is shown is what there was."""

    def shown(query: str) -> float:
        ((_, value),) = prometheus.now(query) or [({}, -1.0)]
        return value

    def last(gauge: str) -> float:
        """Of the search, which is over."""
        return shown(f"last_over_time(ray_heliostat_tune_{gauge}[10m])")

    assert [trial["state"] for trial in searched["trials"]] == ["done", "done"]
    assert last('trials{state="done"}') == 2
    assert last('trials{state="running"}') == 0
    assert last("best_value") == pytest.approx(searched["best_value"])
    assert 0 < last("joules") == pytest.approx(3.6e6 * searched["spent"]["kwh"])
    served = 'sum(ray_heliostat_serve_tokens_total{application="watched",kind="%s"})'
    assert until(lambda: {kind: shown(served % kind) for kind in tokens} == tokens)


@pytest.mark.slow
@needs.promtool
def test_a_run_that_makes_no_steps_is_seen_until_it_ends(prometheus: Prometheus, tmp_path: Path) -> None:
    steps = 'ray_heliostat_train_step{run="still"}'
    pulse = Pulse(1, 7, {"step": 2.5}, {}, 0.0, None, time.time(), 0, 2.5, 2.5)
    with exported("still", recipes.tiny_llama(tmp_path), False, None) as observe:
        observe(pulse)
        assert until(lambda: [value for _, value in prometheus.now(steps)] == [7])
        time.sleep(45)  # Ray forgets after 20 s, and tells every 10 s
        assert [value for _, value in prometheus.now(steps)] == [7]
    assert until(lambda: prometheus.now(steps) == [])
