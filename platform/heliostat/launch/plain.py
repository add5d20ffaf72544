"""The peer of the drill: the same model and rows in a loop of its own under Ray Train, as Ray's documentation writes
it, with none of what this library adds. A worker is killed, and the seconds until training goes on are counted."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from heliostat.data.prepare import read_prepared
from heliostat.launch.train import worker_resources
from heliostat.recipe import Recipe, build
from heliostat.train.notes import note, read_notes

NOTES = "plain.jsonl"


def restart_s(recipe: Recipe, prepared: Path, folder: Path, *, steps: int, every_steps: int, kill_step: int) -> float:
    """Seconds from the kill of a worker until the others and its successor have the checkpoint and begin a step."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from heliostat.launch.backend import torch_config

    folder.mkdir(parents=True)
    use_gpu, resources = worker_resources(recipe)
    TorchTrainer(
        _worker,
        train_loop_config={
            "recipe": recipe.model_dump(mode="json"),
            "prepared": str(prepared),
            "notes": str(folder / NOTES),
            "steps": steps,
            "every_steps": every_steps,
            "kill_step": kill_step,
        },
        torch_config=torch_config(use_gpu),
        scaling_config=ScalingConfig(
            num_workers=recipe.parallelism.workers,
            use_gpu=use_gpu,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(name="plain", storage_path=str(folder), failure_config=FailureConfig(max_failures=1)),
    ).fit()
    times = {each["what"]: each["time"] for each in read_notes(folder / NOTES)}
    return float(times["resumed"] - times["killed"])


def _worker(config: dict[str, Any]) -> None:
    import ray.train
    import torch
    from ray.train import Checkpoint
    from ray.train.torch import get_device, prepare_model

    from heliostat.data.loader import Coordinate, Cursor, training_loader
    from heliostat.models.load import build_model
    from heliostat.parallel.loss import loss_sums
    from heliostat.tasks import LossSums

    recipe = build(config["recipe"])
    prepared = read_prepared(Path(config["prepared"]))
    task, loader, notes = prepared.task(recipe), training_loader(recipe, prepared), Path(config["notes"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(max(1, int(recipe.parallelism.cpus_per_worker)))
    model = prepare_model(build_model(task))
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.optimizer.lr)
    first = 0
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as where:
            state = torch.load(Path(where) / "state.pt", map_location=get_device())
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
        if rank == 0:
            note(notes, {"what": "resumed", "time": time.time()})
    for step in range(first, config["steps"]):
        rows = loader.read(loader.advance(Cursor(), step), Coordinate(rank, world), recipe.training.micro_batch_size)
        for each in rows:
            batch = task.collate(each, train=True).to(get_device())
            sums: LossSums = loss_sums(task, task.outputs(model, batch), batch, train=True)
            (sums.loss_sum / sums.weight.clamp(min=1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % config["every_steps"] == 0:
            with tempfile.TemporaryDirectory() as where:
                saved = None
                if rank == 0:
                    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                    torch.save(state, Path(where) / "state.pt")
                    saved = Checkpoint.from_directory(where)
                ray.train.report({"step": step + 1}, checkpoint=saved)
        if step + 1 == config["kill_step"] and rank == world - 1 and not first:
            note(notes, {"what": "killed", "time": time.time()})
            os.kill(os.getpid(), signal.SIGKILL)
