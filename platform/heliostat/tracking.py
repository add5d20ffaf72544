"""What is kept of a run in MLflow: its recipe, its curves, its result.

The run's folder is the record and MLflow a copy of it. So nothing here can fail a run: what a tracking server
that is away did not take is logged by a later call.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heliostat.curves import METRICS_FILE, read_metrics
from heliostat.recipe import Recipe, Refused, build, field_paths, write_atomically

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger("heliostat")

PENDING_FILE = "tracking-pending.json"
ARTIFACTS = ("recipe.json", "result.json", "report.html")
SERVER_LOG = "mlflow-server.log"
RUN_TAG, LOGGED_TAG = "heliostat.run", "heliostat.logged"
TRIAL_TAG, STATE_TAG, ERROR_TAG = "heliostat.trial", "heliostat.state", "heliostat.error"

# MLflow's own limits.
METRICS_PER_BATCH, PARAMS_PER_BATCH, PARAM_LENGTH, MOST_RUNS = 1000, 100, 6000, 50_000
# MLflow would try an absent server for minutes (7 times, 120 s each).
IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


class Away(ConnectionError):
    """The tracking server does not answer, or answers that it is unwell (5xx)."""


def tracking_uri(recipe: Recipe) -> str:
    """Where runs and model versions are recorded."""
    return recipe.tracking.uri or local_store(recipe)


def local_store(recipe: Recipe) -> str:
    return f"sqlite:///{recipe.storage_path}/mlflow.db"


def in_database(recipe: Recipe) -> bool:
    """Whether the store is a database that every process opens itself, not behind a server."""
    return tracking_uri(recipe).startswith(("sqlite", "postgresql", "mysql", "mssql"))


@contextmanager
def client(recipe: Recipe) -> Iterator[MlflowClient]:
    """A client for the recipe's store that gives up on an absent server within seconds. Raises Away."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # a run tells nobody outside of itself
    import requests
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    uri = tracking_uri(recipe)
    added = {name: value for name, value in IMPATIENT.items() if name not in os.environ}
    os.environ.update(added)
    try:
        if in_database(recipe):
            # MLflow does not keep two first comers from making the tables at once.
            with locked(recipe.storage_path / ".mlflow.lock"):
                made = MlflowClient(tracking_uri=uri, registry_uri=uri)
        else:
            made = MlflowClient(tracking_uri=uri, registry_uri=uri)
        yield made
    except MlflowException as error:
        # 500 is also what MLflow's client gives an error of the connection.
        if error.get_http_status_code() < 500:
            raise
        raise Away(f"{uri} does not answer: {error}") from error
    except requests.RequestException as error:
        raise Away(f"{uri} does not answer: {error}") from error
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file's lock, against other processes and threads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def log_run(
    recipe: Recipe,
    run_dir: Path,
    *,
    metrics: Mapping[str, float],
    tags: Mapping[str, str] = {},
) -> str | None:
    """Record a finished run, once, and return MLflow's id of it. `metrics`: its summary figures.

    Where the store does not take it: a warning, `tracking-pending.json` in the run's folder, and None;
    calling again (or `log_pending`) logs it then.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    pending = run_dir / PENDING_FILE
    try:
        with client(recipe) as mlflow:
            run_id = _log(mlflow, recipe, run_dir, metrics, tags)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        logger.warning("run %s is not in MLflow yet: %s", run_dir.name, reason)
        write_atomically(
            pending,
            json.dumps(
                {
                    "recipe": recipe.model_dump(mode="json"),
                    "metrics": dict(metrics),
                    "tags": dict(tags),
                    "reason": reason,
                },
                indent=2,
            )
            + "\n",
        )
        return None
    pending.unlink(missing_ok=True)
    return run_id


def log_trials(recipe: Recipe, search_id: str, trials: list[dict[str, Any]], objectives: list[str]) -> None:
    """Record the trials of a search as runs nested in its own (`search_id`), each once. A trial: its number, values,
    state, objectives, `curve` (the first objective's value by evaluation) and error.

    Where the store does not take them: a warning; calling again logs what is missing."""
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.exceptions import MlflowException
    from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
    from sqlalchemy.exc import SQLAlchemyError

    try:
        with client(recipe) as mlflow:
            experiment, parent = _experiment(mlflow, recipe), mlflow.get_run(search_id)
            found = mlflow.search_runs(
                [experiment], f"tags.`{MLFLOW_PARENT_RUN_ID}` = {quoted(search_id)}", max_results=MOST_RUNS
            )
            logged = {run.data.tags[TRIAL_TAG] for run in found if run.info.status == "FINISHED"}
            for trial in trials:
                if str(trial["number"]) in logged:
                    continue
                tags = {MLFLOW_PARENT_RUN_ID: search_id, TRIAL_TAG: str(trial["number"]), STATE_TAG: trial["state"]}
                run = mlflow.create_run(
                    experiment, parent.info.start_time, tags, f"{parent.info.run_name}-{trial['number']:05d}"
                )
                now = _milliseconds(time.time())
                figures = [
                    Metric(_key(objectives[0]), value, now, int(at)) for at, value in sorted(trial["curve"].items())
                ]
                figures += [
                    Metric(_key(name), trial[name], now, len(trial["curve"]))
                    for name in objectives[bool(trial["curve"]) :]
                    if trial[name] is not None
                ]
                mlflow.log_batch(
                    run.info.run_id,
                    figures,
                    [Param(path, str(value)[:PARAM_LENGTH]) for path, value in trial["values"].items()],
                    [RunTag(ERROR_TAG, trial["error"])] if trial["error"] else [],
                )
                mlflow.set_terminated(run.info.run_id, "FINISHED", now)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        logger.warning("not all trials are in MLflow yet: %s", str(error).strip().splitlines()[0])


def log_pending(runs: Path) -> list[str]:
    """Log the runs of a folder that an earlier call could not; MLflow's ids of those that it took."""
    logged = []
    for path in sorted(runs.glob(f"*/{PENDING_FILE}")):
        saved = json.loads(path.read_text(encoding="utf-8"))
        run_id = log_run(build(saved["recipe"]), path.parent, metrics=saved["metrics"], tags=saved["tags"])
        if run_id is not None:
            logged.append(run_id)
    return logged


def _log(
    mlflow: MlflowClient, recipe: Recipe, run_dir: Path, metrics: Mapping[str, float], tags: Mapping[str, str]
) -> str:
    from mlflow.entities import Metric, Param

    records = read_metrics(run_dir / METRICS_FILE)
    experiment = _experiment(mlflow, recipe)
    found = mlflow.search_runs([experiment], f"tags.`{RUN_TAG}` = {quoted(run_dir.name)}", max_results=1)
    if found and found[0].data.tags.get(LOGGED_TAG) == "true":
        return found[0].info.run_id
    started = _milliseconds(records[0]["time"] if records else time.time())
    run = (
        found[0]
        if found
        else mlflow.create_run(
            experiment, start_time=started, tags={**tags, RUN_TAG: run_dir.name}, run_name=run_dir.name
        )
    )
    run_id = run.info.run_id

    # MLflow drops a figure it already has with this step and time: an attempt that was cut off is made again
    # whole, and for that no time may be taken from the clock.
    step, ended = 0, run.info.start_time
    if records:
        step, ended = records[-1]["step"], _milliseconds(records[-1]["time"])
    figures = [Metric(*point) for record in records for point in _points(record)]
    figures += [Metric(_key(name), float(value), ended, step) for name, value in metrics.items()]
    for i in range(0, len(figures), METRICS_PER_BATCH):
        mlflow.log_batch(run_id, metrics=figures[i : i + METRICS_PER_BATCH], synchronous=True)
    params = [Param(name, value) for name, value in flatten(recipe).items()]
    for i in range(0, len(params), PARAMS_PER_BATCH):
        mlflow.log_batch(run_id, params=params[i : i + PARAMS_PER_BATCH], synchronous=True)
    for name in ARTIFACTS:
        if (run_dir / name).is_file():
            mlflow.log_artifact(run_id, str(run_dir / name))
    mlflow.set_terminated(run_id, "FINISHED", ended)
    mlflow.set_tag(run_id, LOGGED_TAG, "true")
    return run_id


def _experiment(mlflow: MlflowClient, recipe: Recipe) -> str:
    """The id of the recipe's experiment, made where it is missing."""
    from mlflow.exceptions import MlflowException

    name = recipe.tracking.experiment or recipe.name
    # A server decides itself where artifacts go.
    location = None
    if in_database(recipe):
        location = (recipe.storage_path / "mlflow-artifacts" / name).as_uri()
    found = mlflow.get_experiment_by_name(name)
    if found is None:
        try:
            return mlflow.create_experiment(name, location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = mlflow.get_experiment_by_name(name)
            assert found is not None
    return found.experiment_id


def flatten(recipe: Recipe) -> dict[str, str]:
    """The recipe's fields by dotted path, as text; cut where MLflow cuts (recipe.json holds them whole)."""
    tree = recipe.model_dump(mode="json")
    flat = {}
    for path in field_paths():
        value: Any = tree
        for part in path.split("."):
            value = value[part]
        flat[path] = (value if isinstance(value, str) else json.dumps(value))[:PARAM_LENGTH]
    return flat


def _points(record: dict[str, Any]) -> Iterator[tuple[str, float, int, int]]:
    """A record's figures: name, value, milliseconds, step. MLflow groups charts by the part before `/`."""
    validation = "validation" in record
    for name, value in (record["validation"] if validation else record).items():
        if value is not None and (validation or name not in ("step", "time")):
            key = _key(f"{'validation' if validation else 'train'}/{name}")
            yield key, float(value), _milliseconds(record["time"]), record["step"]


def quoted(text: str) -> str:
    """A string of MLflow's search language, which has no escapes."""
    return f'"{text}"' if "'" in text else f"'{text}'"


def _key(name: str) -> str:
    """A name that MLflow takes for a metric."""
    return re.sub(r"[^/\w.\- :]", "_", name)


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)


def start_server(recipe: Recipe, port: int, timeout_s: float = 120.0) -> subprocess.Popen[bytes]:
    """Serve the recipe's store on 127.0.0.1:`port`; returns once it answers. It outlives this process.

    Raises Refused where the port is taken, RuntimeError with the end of its output where it does not come up.
    """
    import httpx

    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise Refused("port", f"{port} is in use on 127.0.0.1", "use another")
    storage = recipe.storage_path
    storage.mkdir(parents=True, exist_ok=True)
    store = tracking_uri(recipe) if in_database(recipe) else local_store(recipe)
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        store,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
        # Clients see the storage and write artifacts there themselves, so that the same experiment can be
        # used with the server and without.
        "--no-serve-artifacts",
        "--default-artifact-root",
        (storage / "mlflow-artifacts").as_uri(),
    ]
    # Its job runner serves features that are not used here, with more processes.
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **os.environ}
    log = storage / SERVER_LOG
    with log.open("wb") as output:
        server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2.0, trust_env=False).status_code == 200:
                return server
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    ended = server.poll()
    state = f"did not answer within {timeout_s:g} s" if ended is None else f"exited with {ended}"
    stop_server(server)
    tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])
    raise RuntimeError(f"the MLflow server on port {port} {state}; {log} ends with:\n{tail}")


def stop_server(server: subprocess.Popen[bytes]) -> None:
    """End a server that `start_server` returned, and its workers."""
    for sign, patience_s in ((signal.SIGTERM, 10.0), (signal.SIGKILL, None)):
        try:
            os.killpg(server.pid, sign)
            server.wait(patience_s)
        except ProcessLookupError:
            server.wait()
            return
        except subprocess.TimeoutExpired:
            continue
