"""A trial of training: the one loop on few rows, on one worker or many."""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heliostat.data.loader import open_split
from heliostat.data.prepare import Prepared
from heliostat.energy import joules
from heliostat.launch.tune.runner import Figures, Origin, Report, Stopped
from heliostat.launch.tune.space import needs, row_settings, trial_recipe
from heliostat.models import bundle as bundles
from heliostat.models.precision import computes_in_bfloat16
from heliostat.parallel.mesh import this_device
from heliostat.predictor import Predictor
from heliostat.recipe import Recipe, build, write_atomically
from heliostat.train.checkpoint.find import folder_name
from heliostat.train.folder import OUTCOME_FILE
from heliostat.train.loop import train


@dataclass
class Training:
    """The objective of a search over a recipe. What a trial wrote goes when it ends, but not when it dies."""

    recipe: Recipe
    prepared: dict[tuple[Any, ...], Prepared]
    """By `row_settings`."""
    folder: Path
    use_gpu: bool

    def needs(self, values: dict[str, Any]) -> tuple[dict[str, float], bool]:
        recipe, _ = self._of(values)
        return needs(recipe, self.use_gpu), recipe.parallelism.workers == 1

    def _of(self, values: dict[str, Any]) -> tuple[Recipe, Path]:
        """A trial's recipe, and where its prepared rows are."""
        prepared = self.prepared[row_settings(self.recipe, values)]
        return trial_recipe(self.recipe, values, prepared.meta["rows"]["train"]), prepared.folder

    def __call__(self, number: int, values: dict[str, Any], report: Report, origin: Origin | None) -> Figures:
        (recipe, prepared), run_dir = self._of(values), self._run_dir(number)
        if origin is not None:
            self._begin_at(origin, recipe, run_dir / "checkpoints")

        def tell(figures: Figures) -> None:
            spent = joules(recipe.energy, figures["loop_cpu_s"], figures["loop_s"] * self.use_gpu)
            report(evaluation(recipe, figures), figures | {"joules": spent})

        try:
            if recipe.parallelism.workers == 1:
                outcome = trained(recipe, prepared, run_dir, tell)
            else:
                outcome = self._on_workers(recipe, prepared, run_dir)
        finally:
            gc.collect()
            if self.recipe.tune.scheduler != "pbt":  # where others may go on from it
                shutil.rmtree(run_dir, ignore_errors=True)
        figures = {"seconds": outcome["loop_s"], "parameters": outcome["parameters"]}
        return figures | ({"latency": outcome["latency_s"]} if "latency_s" in outcome else {})

    def _run_dir(self, number: int) -> Path:
        return self.folder / f"{number:05d}"

    def _begin_at(self, origin: Origin, recipe: Recipe, checkpoints: Path) -> None:
        """Copy the checkpoint that the other trial wrote after that report, unless this one has its own already."""
        if checkpoints.exists():
            return
        name = folder_name(origin.report * recipe.training.evaluate_every_steps)
        beside = checkpoints.with_name(f".{checkpoints.name}.{os.getpid()}")
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(self._run_dir(origin.trial) / "checkpoints" / name, beside / name)
        os.replace(beside, checkpoints)

    def _on_workers(self, recipe: Recipe, prepared: Path, run_dir: Path) -> dict[str, Any]:
        import ray
        from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        from heliostat.launch.backend import torch_config

        failing: dict[str, Any] = {
            "failure_config": FailureConfig(max_failures=recipe.checkpoint.max_failures),
            "logging_config": LoggingConfig("CRITICAL"),  # what fails is listed with its trial
        }
        stopped = run_dir / "stopped"
        TorchTrainer(
            _worker,
            train_loop_config={
                "runner": ray.get_runtime_context().current_actor,
                "recipe": recipe.model_dump(mode="json"),
                "prepared": str(prepared),
                "run_dir": str(run_dir),
                "stopped": str(stopped),
                "use_gpu": self.use_gpu,
            },
            torch_config=torch_config(self.use_gpu),
            scaling_config=ScalingConfig(
                num_workers=recipe.parallelism.workers,
                use_gpu=self.use_gpu,
                resources_per_worker=recipe.parallelism.worker_resources(self.use_gpu),
            ),
            run_config=RunConfig(name="train", storage_path=str(run_dir / "ray"), **failing),
        ).fit()
        if stopped.exists():
            raise Stopped
        return json.loads((run_dir / OUTCOME_FILE).read_text())


def trained(recipe: Recipe, prepared: Path, run_dir: Path, report: Callable[[Figures], None]) -> dict[str, Any]:
    """The loop's outcome, with `latency_s` where that is an objective. Collective: every rank must call it."""
    timed = "latency" in recipe.tune.objectives
    outcome = train(recipe, prepared, run_dir, report=report, write_bundle=timed)
    if timed and outcome["bundle"] is not None:  # on the rank that wrote it
        device = this_device()
        bfloat16 = computes_in_bfloat16(recipe.training.precision, device)
        predictor = Predictor(bundles.read(Path(outcome["bundle"])), bfloat16=bfloat16, device=device)
        outcome["latency_s"] = predictor.latency_s(open_split(prepared, "validation"))
        write_atomically(run_dir / OUTCOME_FILE, json.dumps(outcome))
    return outcome


def evaluation(recipe: Recipe, figures: Figures) -> int:
    """Which of a run's evaluations figures are of, counted from 1."""
    return math.ceil(figures["step"] / recipe.training.evaluate_every_steps)


def _worker(config: dict[str, Any]) -> None:
    import ray
    import torch.distributed as dist

    recipe, first = build(config["recipe"]), dist.get_rank() == 0

    def report(figures: Figures) -> None:
        """Rank 0 asks the driver, and all do what it says."""
        at, ranks = evaluation(recipe, figures), dist.get_world_size()
        cpu_s = [0.0] * ranks
        dist.all_gather_object(cpu_s, figures["loop_cpu_s"])
        figures |= {"joules": joules(recipe.energy, sum(cpu_s), figures["loop_s"] * ranks * config["use_gpu"])}
        said = [ray.get(config["runner"].report.remote(at, figures)) if first else None]
        dist.broadcast_object_list(said, src=0)
        if not said[0]:
            raise Stopped

    try:
        trained(recipe, Path(config["prepared"]), Path(config["run_dir"]), report)
    except Stopped:
        if first:
            Path(config["stopped"]).touch()
