"""Training through Ray Train: workers are started, watched and started again; the loop does the rest."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from heliostat.curves import METRICS_FILE, read_all_metrics, read_metrics
from heliostat.launch.cluster import NODES, capacity, present
from heliostat.launch.gauges import exported
from heliostat.models.flops import peak_flops, published_peak_flops
from heliostat.models.precision import computes_in_bfloat16
from heliostat.recipe import Recipe, Refused, build, override, write_atomically
from heliostat.record import attend, say
from heliostat.train import ledger, samples
from heliostat.train.errors import Unrecoverable
from heliostat.train.faults import Fault
from heliostat.train.folder import CHECKPOINT_FAULTS_FILE, LEDGER, OUTCOME_FILE, STOP_FILE
from heliostat.train.guard import read_bad_steps
from heliostat.train.loop import train
from heliostat.train.notes import read_notes

PLACEMENT_TIMEOUT = ("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "5")
"""Ray Train's setting for runs that take the workers there are. It may count on a node that is gone already, and would
wait a minute for its workers."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Ctrl-C; `ray job stop`, and machines that are taken away."""


def _worker(config: dict[str, Any]) -> None:
    """On each worker. What would fail again is written down instead of raised, so that it is not tried again."""
    import ray.train
    import torch
    from ray.train.torch import get_device

    run_dir = Path(config["run_dir"])
    attend(run_dir)
    # As many as there are now: an elastic run is not always given all it may have.
    workers = ray.train.get_context().get_world_size()
    try:
        recipe = override(build(config["recipe"]), {"parallelism.workers": workers, "parallelism.min_workers": None})
        device = get_device()
        dtype = torch.bfloat16 if computes_in_bfloat16(recipe.training.precision, device) else torch.float32
        name = torch.cuda.get_device_name(device) if device.type == "cuda" and dtype == torch.bfloat16 else ""
        published = published_peak_flops(name)
        with exported(run_dir.name, recipe, device.type == "cuda", published and workers * published) as observe:
            outcome = train(
                recipe,
                Path(config["prepared"]),
                run_dir,
                resume=Path(config["resume"]) if config["resume"] else None,
                lineage=config["lineage"],
                watch=True,
                fault=config["fault"],
                notice=_taken_away,
                observe=observe,
            )
        if ray.train.get_context().get_world_rank() == 0:
            peak, known = peak_flops(device, dtype)
            outcome |= {"peak_flops": peak, "peak_flops_are": known}
            write_atomically(run_dir / OUTCOME_FILE, json.dumps(outcome))
    except Refused as error:
        write_atomically(
            run_dir / OUTCOME_FILE,
            json.dumps(
                {"status": "refused", "field": error.field, "reason": error.reason, "suggestion": error.suggestion}
            ),
        )
    except Unrecoverable as error:
        try:
            write_atomically(run_dir / OUTCOME_FILE, json.dumps({"status": "failed", "error": str(error)}))
        except OSError:
            raise error from None  # no room for a word: the error itself has to travel


def _taken_away() -> float | None:
    """When this run's machines will be taken away, as Ray was told (Unix time)."""
    # What ray.train.get_preemption_info reads; that one waits for all workers, at every step.
    from ray.train.v2._internal.execution.context import get_train_context

    context = get_train_context().preemption_context
    info = context.preemption_info if context is not None else None
    if info is None:
        return None
    return math.inf if info.deadline_ms is None else info.deadline_ms / 1000


def fit(
    recipe: Recipe,
    prepared: Path,
    run_dir: Path,
    *,
    resume: Path | None = None,
    lineage: dict[str, Any] | None = None,
    fault: Fault | None = None,
) -> dict[str, Any]:
    """Train on the connected cluster; returns the outcome with losses, ledger and attempts. `fault`: see `train`.

    The first Ctrl-C or SIGTERM lets the run write a checkpoint and end; a second one ends at once."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
    from ray.train.torch import TorchTrainer

    from heliostat.launch.backend import torch_config

    started = time.time()
    run_dir.mkdir(parents=True, exist_ok=True)
    recipe.save(run_dir / "recipe.json")
    for leftover in (OUTCOME_FILE, STOP_FILE):
        (run_dir / leftover).unlink(missing_ok=True)
    workers, least = recipe.parallelism.workers, recipe.parallelism.min_workers
    use_gpu, resources = worker_resources(recipe)

    class NoteFailures(UserCallback):
        """In Ray Train's controller."""

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            ledger.note_failure(run_dir / LEDGER, {rank: str(error) for rank, error in worker_exceptions.items()})

    scaling: dict[str, Any] = {
        "num_workers": workers if least is None else (least, workers),
        "elastic_resize_monitor_interval_s": recipe.recovery.grow_every_s,
        "use_gpu": use_gpu,
        "resources_per_worker": resources,
    }
    if nodes := os.environ.get(NODES):
        scaling["label_selector"] = [{"ray.io/node-id": node} for node in nodes.split(",")]
    failing: dict[str, Any] = {
        "failure_config": FailureConfig(max_failures=recipe.checkpoint.max_failures),
        "callbacks": [NoteFailures()],
    }
    if least is not None:
        os.environ.setdefault(*PLACEMENT_TIMEOUT)  # it reads these in the driver
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "recipe": recipe.model_dump(mode="json"),
            "prepared": str(prepared),
            "run_dir": str(run_dir),
            "resume": str(resume) if resume else "",
            "lineage": lineage or {},
            "fault": fault,
        },
        torch_config=torch_config(use_gpu),
        scaling_config=ScalingConfig(**scaling),
        run_config=RunConfig(
            name="train",
            storage_path=str(run_dir / "ray"),
            **failing,
        ),
    )
    _fit_until_done_or_stopped(trainer, run_dir)
    outcome = json.loads((run_dir / OUTCOME_FILE).read_text())
    if outcome["status"] == "refused":
        raise Refused(outcome["field"], outcome["reason"], outcome["suggestion"])
    if recipe.data.log_samples:
        samples.collect(run_dir, recipe)
    return outcome | report(run_dir, started, outcome)


def worker_resources(recipe: Recipe) -> tuple[bool, dict[str, float]]:
    """Whether workers get GPUs of the connected cluster, and what each asks of it."""
    parallelism = recipe.parallelism
    use_gpu = parallelism.use_gpu
    if use_gpu is None:
        most = capacity().gpus  # of a cluster that has given its workers back, too
        gpus = most if math.isfinite(most) else present().gpus
        use_gpu = gpus >= (parallelism.min_workers or parallelism.workers)
    return use_gpu, parallelism.worker_resources(use_gpu)


def report(run_dir: Path, started: float, outcome: dict[str, Any]) -> dict[str, Any]:
    """The curves and the ledger of a run that ended with an outcome."""
    records = read_metrics(run_dir / METRICS_FILE)
    steps = [record for record in records if "loss" in record]
    evaluations = [record for record in records if "validation" in record]
    made = [(each["time"], each["tokens"]) for each in read_all_metrics(run_dir / METRICS_FILE) if "tokens" in each]
    speed = ledger.Speed(made, outcome.get("flops_per_token"), outcome.get("peak_flops"))
    book = ledger.summarise(run_dir / LEDGER, started, time.time(), speed)
    return {
        "losses": [record["loss"] for record in steps],
        "grad_norms": [record["grad_norm"] for record in steps],
        "metrics": {f"validation.{k}": v for k, v in evaluations[-1]["validation"].items()} if evaluations else {},
        "ledger": book,
        "goodput": book["goodput"],
        "attempts": book["attempts"],
        "bad_steps": read_bad_steps(run_dir),
        "checkpoint_faults": read_notes(run_dir / CHECKPOINT_FAULTS_FILE),
    }


def _fit_until_done_or_stopped(trainer: Any, run_dir: Path) -> None:
    errors: list[BaseException] = []

    def target() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            errors.append(error)

    interrupts = 0

    def on_interrupt(*_: Any) -> None:
        nonlocal interrupts
        interrupts += 1
        if interrupts > 1:
            raise KeyboardInterrupt
        say("stop_requested")
        (run_dir / STOP_FILE).touch()

    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, on_interrupt) for number in STOP_SIGNALS} if main else {}
    # Ray Train's own handler would drop the run without a checkpoint; off the main thread it sets none.
    thread = threading.Thread(target=target, name="fit", daemon=True)
    try:
        thread.start()
        while thread.is_alive():
            thread.join(timeout=0.2)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if errors:
        raise errors[0]
