"""A trial of training: the one loop on few rows, on one worker or many."""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heliostat.launch.tune.runner import Figures, Origin, Report, Stopped
from heliostat.launch.tune.space import needs, trial_recipe
from heliostat.recipe import Recipe, build
from heliostat.train.checkpoint.find import folder_name
from heliostat.train.loop import OUTCOME_FILE, train


@dataclass
class Training:
    """The objective of a search over a recipe. What a trial wrote goes when it ends, but not when it dies."""

    recipe: Recipe
    prepared: Path
    rows: int
    folder: Path
    use_gpu: bool

    def needs(self, values: dict[str, Any]) -> tuple[dict[str, float], bool]:
        recipe = trial_recipe(self.recipe, values, self.rows)
        return needs(recipe, self.use_gpu), recipe.parallelism.workers == 1

    def __call__(self, number: int, values: dict[str, Any], report: Report, origin: Origin | None) -> Figures:
        recipe, run_dir = trial_recipe(self.recipe, values, self.rows), self._run_dir(number)
        if origin is not None:
            self._begin_at(origin, recipe, run_dir / "checkpoints")

        def tell(figures: Figures) -> None:
            report(evaluation(recipe, figures), figures)

        try:
            if recipe.parallelism.workers == 1:
                outcome = train(recipe, self.prepared, run_dir, report=tell, write_bundle=False)
            else:
                outcome = self._on_workers(recipe, run_dir)
        finally:
            gc.collect()
            if self.recipe.tune.scheduler != "pbt":  # where others may go on from it
                shutil.rmtree(run_dir, ignore_errors=True)
        return {"seconds": outcome["loop_s"], "parameters": outcome["parameters"]}

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

    def _on_workers(self, recipe: Recipe, run_dir: Path) -> dict[str, Any]:
        import ray
        from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        resources = {"CPU": recipe.parallelism.cpus_per_worker} | ({"GPU": 1} if self.use_gpu else {})
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
                "prepared": str(self.prepared),
                "run_dir": str(run_dir),
                "stopped": str(stopped),
            },
            torch_config=TorchConfig(backend="nccl" if self.use_gpu else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=recipe.parallelism.workers, use_gpu=self.use_gpu, resources_per_worker=resources
            ),
            run_config=RunConfig(name="train", storage_path=str(run_dir / "ray"), **failing),
        ).fit()
        if stopped.exists():
            raise Stopped
        return json.loads((run_dir / OUTCOME_FILE).read_text())


def evaluation(recipe: Recipe, figures: Figures) -> int:
    """Which of a run's evaluations figures are of, counted from 1."""
    return math.ceil(figures["step"] / recipe.training.evaluate_every_steps)


def _worker(config: dict[str, Any]) -> None:
    import ray
    import torch.distributed as dist

    recipe, first = build(config["recipe"]), dist.get_rank() == 0

    def report(figures: Figures) -> None:
        """Rank 0 asks the driver, and all do what it says."""
        at = evaluation(recipe, figures)
        said = [ray.get(config["runner"].report.remote(at, figures)) if first else None]
        dist.broadcast_object_list(said, src=0)
        if not said[0]:
            raise Stopped

    try:
        run_dir = Path(config["run_dir"])
        train(recipe, Path(config["prepared"]), run_dir, report=report, write_bundle=False)
    except Stopped:
        if first:
            Path(config["stopped"]).touch()
