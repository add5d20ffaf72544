"""The one loop. Every task trains here, in one process or many, under Ray Train or anything else that has set up
torch.distributed; it knows nothing of who started it."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers

from heliostat.curves import METRICS_FILE, Recorder
from heliostat.data.loader import Cursor, Loader, check_resume, training_loader
from heliostat.data.prepare import Prepared, read_prepared
from heliostat.models import bundle as bundles
from heliostat.models.flops import flops_per_token
from heliostat.models.load import build_model
from heliostat.parallel.context import check_task
from heliostat.parallel.mesh import Layout, make_layout
from heliostat.parallel.parallelize import full_state, parallelize
from heliostat.recipe import Recipe, Refused, write_atomically
from heliostat.record import say
from heliostat.tasks import Batch, Task
from heliostat.train import checkpoint
from heliostat.train.batches import Batches, validation_loader
from heliostat.train.checkpoint import Place
from heliostat.train.faults import Fault, Injector
from heliostat.train.folder import BUNDLE, CHECKPOINT_FAULTS_FILE, LEDGER, OUTCOME_FILE, STACKS, STOP_FILE
from heliostat.train.guard import Guard
from heliostat.train.interval import Interval
from heliostat.train.ledger import Ledger
from heliostat.train.notes import note
from heliostat.train.optim import MovingAverage, build_optimizer, lr_factor, set_lr, total_steps
from heliostat.train.prefetch import Prefetcher
from heliostat.train.pulse import Pulse
from heliostat.train.samples import open_log
from heliostat.train.step import StepResult, TrainStep, Wishes
from heliostat.train.watchdog import Watchdog

logger = logging.getLogger("heliostat")


@dataclass
class Progress:
    """What a checkpoint remembers beside tensors."""

    step: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    best: float | None = None
    best_step: int = 0
    evaluations_without_gain: int = 0

    def as_dict(self, loader: Loader, recent_losses: list[float]) -> dict[str, Any]:
        return {
            "step": self.step,
            "cursor": self.cursor.as_dict(),
            "best": self.best,
            "best_step": self.best_step,
            "evaluations_without_gain": self.evaluations_without_gain,
            "fingerprint": loader.fingerprint,
            "global_batch_size": loader.global_batch_size,
            "recent_losses": recent_losses,
        }


class Run:
    """One attempt at a run on this rank. Collective: every rank makes one and calls `train`."""

    def __init__(
        self,
        recipe: Recipe,
        prepared: Prepared,
        run_dir: Path,
        *,
        report: Callable[[dict[str, Any]], None] | None = None,
        resume: Path | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        write_bundle: bool = True,
        lineage: dict[str, Any] | None = None,
        watch: bool = False,
        fault: Fault | None = None,
        notice: Callable[[], float | None] = lambda: None,
        observe: Callable[[Pulse], None] = lambda pulse: None,
    ) -> None:
        """`report` is called after each evaluation on every rank, with its figures and this rank's `loop_s` and
        `loop_cpu_s`; `resume` is a checkpoint folder used when the
        run has none of its own; `watch` ends the process where it hangs; `fault` is injected, for a drill;
        `notice` says when this rank's machine will be taken away (Unix time), as far as is known;
        `observe` is called on rank 0, a few times a second."""
        self.observe = observe
        self.recipe, self.prepared, self.run_dir = recipe, prepared, run_dir
        self.report, self.should_stop, self.write_bundle = report, should_stop, write_bundle
        self.lineage = lineage or {}
        rank = dist.get_rank() if dist.is_initialized() else 0
        self.first = rank == 0
        self.ledger = Ledger(run_dir / LEDGER if self.first else None, recipe.parallelism.workers)
        self.layout: Layout = make_layout(recipe.parallelism)
        self.task: Task = prepared.task(recipe)
        check_task(self.task, recipe.parallelism.context)
        self.loader = training_loader(recipe, prepared)
        self.batches = Batches(recipe, self.task, self.layout, self.loader, train=True)
        self.validation = Batches(
            recipe, self.task, self.layout, validation_loader(recipe, prepared, self.layout), train=False
        )
        model = build_model(self.task, defer=True)
        self.task.check_model(model)
        self.flops_per_token = self._flops_per_token(model)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.parallel = parallelize(model, self.layout, recipe)
        self.new_parameters: set[str] = model.new_parameters
        self.optimizer = build_optimizer(self.parallel.model, recipe, self.new_parameters)
        self.step = TrainStep(self.parallel, self.task, self.optimizer, recipe)
        self.faults = Injector(fault, run_dir, rank)
        self.guard = Guard(self.step, recipe.recovery, run_dir, self.first, self.faults)
        stacks = run_dir / STACKS / f"attempt-{self.ledger.attempt:03d}-rank-{rank}.txt"
        self.watchdog = Watchdog(recipe.recovery.hang_timeout_s, stacks) if watch else None
        self.average = (
            MovingAverage(self.parallel.model, recipe.training.ema_decay) if recipe.training.ema_decay else None
        )
        self.total = total_steps(recipe.schedule, self.loader.batches_per_epoch)
        self.progress = Progress()
        self.checkpoints = checkpoint.Writer(
            checkpoint.folder_of(recipe, run_dir),
            recipe.checkpoint.keep,
            recipe.checkpoint.asynchronous,
            partial(self._note_checkpoint, "missed"),
        )
        self.best = checkpoint.Writer(Place.at(run_dir / "best"), 1, recipe.checkpoint.asynchronous)
        book = run_dir / LEDGER if self.first else None
        self.interval = Interval(recipe.checkpoint, recipe.parallelism.workers, book, notice)
        self._restore(resume)
        self.recorder = Recorder(run_dir / METRICS_FILE, self.first)
        # Steps that an earlier attempt made and lost are replayed.
        self.replay_until = self.recorder.last_step
        self.figures: dict[str, float] = {}
        self.tokens = 0.0
        self._stop_checked = 0.0
        self.samples = open_log(recipe, run_dir, self.layout, self.ledger, self.progress.step)

    # -- setting up

    def _flops_per_token(self, model: Any) -> float | None:
        """None where rows have no tokens. What a head does once a row counts as if once a token: little."""
        if not hasattr(model.config.get_text_config(), "vocab_size"):
            return None
        lengths = self.loader.table.column("length").to_numpy().astype(np.float64)
        return flops_per_token(model, float((lengths**2).sum() / lengths.sum()))

    def _restore(self, resume: Path | None) -> None:
        outer = self.ledger.enter("restore")
        found, rejected = checkpoint.choose(self.checkpoints.folder)
        for each in rejected:
            self._note_checkpoint("rejected", each.step, each.reason)
        if found is None and resume is not None:
            found, _ = checkpoint.choose(Place.at(resume))
            if found is None:
                raise Refused("resume", f"{resume} holds no complete checkpoint")
        if found is not None:
            cursor = check_resume(found.trainer, self.loader)
            checkpoint.load(found, self.parallel.model, self.optimizer, self.average)
            saved = found.trainer
            self.progress = Progress(
                saved["step"], cursor, saved["best"], saved["best_step"], saved["evaluations_without_gain"]
            )
            self.guard.losses = saved.get("recent_losses", [])
            if self.first:
                say("restored", step=saved["step"], folder=str(found.place))
        self.ledger.enter(outer)

    def _note_checkpoint(self, what: str, step: int, reason: str) -> None:
        if self.first:
            logger.warning("the checkpoint of step %d was %s: %s", step, what, reason)
            note(self.run_dir / CHECKPOINT_FAULTS_FILE, {"step": step, "what": what, "reason": reason})
            say(f"checkpoint_{what}", step=step, reason=reason)

    # -- the loop

    def train(self) -> dict[str, Any]:
        """Train to the end, or to a stop; returns the outcome (the same on every rank)."""
        try:
            with closing(self._input()) as batches:
                return self._train(batches)
        finally:
            # The next attempt, in this process or another, is not to meet a checkpoint that this one still writes.
            self.checkpoints.wait()
            self.best.wait()
            self.ledger.save()  # also of an attempt that fails
            if self.watchdog is not None:
                self.watchdog.stop()

    def _train(self, batches_by_step: Iterator[list[Batch]]) -> dict[str, Any]:
        status = "done"
        progress, ledger = self.progress, self.ledger
        pending: tuple[int, StepResult, float] | None = None
        self.parallel.runs.train()  # a pre-trained model comes in evaluation mode, without its dropout
        self._began = time.perf_counter(), time.process_time()
        if self.first:
            self.observe(self._pulse())  # the first step may take minutes, where it compiles
        while progress.step < self.total:
            with ledger("input"):
                batches = next(batches_by_step)
                on_device = [batch.to(self.layout.device) for batch in batches]
            with ledger("replay" if progress.step < self.replay_until else "step"):
                lr = self.recipe.optimizer.lr * lr_factor(self.recipe.schedule, progress.step, self.total)
                set_lr(self.optimizer, lr)
                wishes = Wishes(self._stop_wanted(), self.interval.wanted())
                result = self.guard(progress.step + 1, on_device, self._seed, wishes)
                progress.step += 1
                if self.samples is not None:
                    self.samples.step(progress.step, batches)
                progress.cursor = self.loader.next(progress.cursor)
                if self.average is not None:
                    self.average.update(progress.step)
            # The figures of the step before are read while this one may still run on the device.
            if pending is not None:
                self._record(*pending)
            pending = (progress.step, result, lr)
            if ledger.save(every_s=0.2):
                self.observe(self._pulse())
            self._beat()
            last = progress.step == self.total
            if last or self._evaluation_due():
                self._record(*pending)
                pending = None
                if self._evaluate():
                    status = "stopped_early"
                    last = True
            stopped = result.stop_requested
            if stopped or last or self._checkpoint_due(result):
                if pending is not None:
                    self._record(*pending)
                    pending = None
                self._checkpoint(settle=stopped or last)
            self.faults.after_step(progress.step, self.checkpoints)
            if stopped:
                status = "interrupted"
                break
            if last:
                break
        ledger.enter("checkpoint")  # or what is like one: the bundle
        return self._finish(status, self._spent())

    def _spent(self) -> dict[str, float]:
        """This process's time in the loop, and its processors'."""
        wall, cpu = self._began
        return {"loop_s": time.perf_counter() - wall, "loop_cpu_s": time.process_time() - cpu}

    def _beat(self) -> None:
        if self.watchdog is not None:
            self.watchdog.beat()

    def _record(self, step: int, result: StepResult, lr: float) -> None:
        if self.first:
            self.figures = result.figures()
            self.tokens += self.figures["tokens"]
            self.recorder.step(step, self.figures | {"lr": lr})

    def _pulse(self) -> Pulse:
        return Pulse(
            self.ledger.attempt,
            self.progress.step,
            dict(self.ledger.seconds),
            self.figures,
            self.tokens,
            self.flops_per_token,
            self.checkpoints.completed,
            self.guard.bad_steps,
            **self._spent(),
        )

    def _input(self) -> Generator[list[Batch], None, None] | Prefetcher[Cursor, list[Batch]]:
        """The batches of the steps that are left, on CPU."""
        first, left, ahead = self.progress.cursor, self.total - self.progress.step, self.recipe.data.prefetch
        cursors = (self.loader.advance(first, step) for step in range(left))
        return Prefetcher(self.batches, cursors, ahead) if ahead else (self.batches(cursor) for cursor in cursors)

    def _seed(self) -> None:
        """Dropout is a function of (seed, step, share), not of history: resuming needs no generator state."""
        share = self.layout.coordinate.index * self.recipe.parallelism.context + self.layout.context_rank
        seed = (self.recipe.seed * 1_000_003 + self.progress.step) * 4099 + share
        # Not torch.manual_seed, which looks for every kind of device at each call.
        torch.default_generator.manual_seed(seed)
        if self.layout.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _stop_wanted(self) -> bool:
        if self.should_stop():
            return True
        now = time.monotonic()
        if not self.first or now - self._stop_checked < 0.2:
            return False
        self._stop_checked = now
        return (self.run_dir / STOP_FILE).exists()

    def _evaluation_due(self) -> bool:
        every = self.recipe.training.evaluate_every_steps
        return self.progress.step % every == 0 if every else self.progress.cursor.batch == 0

    def _checkpoint_due(self, result: StepResult) -> bool:
        every = self.recipe.checkpoint.every_steps
        return result.checkpoint_requested or bool(every and self.progress.step % every == 0)

    def _evaluate(self) -> bool:
        """Evaluate on the validation split and keep the best weights; True where patience has run out."""
        with self.ledger("evaluation"):
            if self.average is not None:
                self.average.swap()
            figures = self._validate()
            progress, training = self.progress, self.recipe.training
            value = figures[self.task.metric]
            better = progress.best is None or (
                (value > progress.best) == self.task.higher_is_better and value != progress.best
            )
            if better:
                progress.best, progress.best_step, progress.evaluations_without_gain = value, progress.step, 0
                if training.keep_best and self.write_bundle:
                    self.best.save(progress.step, {}, self.parallel.model)
            else:
                progress.evaluations_without_gain += 1
            if self.average is not None:
                self.average.swap()
        self.recorder.evaluation(progress.step, figures)
        if self.report is not None:
            epochs = progress.step / self.loader.batches_per_epoch
            self.report({"step": progress.step, "epochs": epochs, **self._spent(), **figures})
        patience = training.early_stopping_patience
        return bool(patience and progress.evaluations_without_gain >= patience)

    def _validate(self) -> dict[str, float]:
        model = self.parallel.runs
        model.eval()
        sums: torch.Tensor | None = None
        names: tuple[str, ...] = ()
        for number in range(self.validation.loader.batches_per_epoch):
            self._beat()
            batches = [batch.to(self.layout.device) for batch in self.validation(Cursor(0, number))]
            micro = self.step.forward_only(batches)
            names = self.step.metric_names(micro)
            part = self.step.global_sums(micro, names)
            sums = part if sums is None else sums + part
        model.train()
        self.parallel.reshard()
        assert sums is not None
        loss_sum, weight, _, *metrics = sums.tolist()[: -len(Wishes._fields)]
        return self.task.metrics(loss_sum, weight, dict(zip(names, metrics, strict=True)))

    def _checkpoint(self, settle: bool) -> None:
        """`settle`: it is to be there when this returns. Otherwise training goes on while it is written."""
        begun = time.perf_counter()
        with self.ledger("checkpoint"):
            self.recorder.flush()
            if self.samples is not None:  # every rank, before any can call the checkpoint complete
                self.samples.flush()
            self.faults.before_checkpoint(self.progress.step, self.checkpoints)
            self.checkpoints.save(
                self.progress.step,
                self.progress.as_dict(self.loader, self.guard.losses),
                self.parallel.model,
                self.optimizer,
                self.average,
            )
            self.interval.saved(time.perf_counter() - begun, self.checkpoints.write_s)
            if settle:
                self.checkpoints.settle()

    def _finish(self, status: str, spent: dict[str, float]) -> dict[str, Any]:
        self.recorder.close()
        outcome: dict[str, Any] = {
            "status": status,
            "step": self.progress.step,
            "total_steps": self.total,
            "best": self.progress.best,
            "best_step": self.progress.best_step,
            "metric": self.task.metric,
            "bundle": None,
            "flops_per_token": self.flops_per_token,
            "parameters": self.parameters,
            **spent,
        }
        if status != "interrupted" and self.write_bundle:
            if self.recipe.training.keep_best:
                self.best.settle()
                found = checkpoint.newest(self.run_dir / "best")
                assert found is not None
                checkpoint.load(found, self.parallel.model, None, None)
            elif self.average is not None:
                self.average.swap()
            state = full_state(self.parallel)
            if self.first:
                written = bundles.write(
                    self.run_dir / BUNDLE,
                    self.task,
                    state,
                    self.prepared.processor(),
                    data={"fingerprint": self.prepared.fingerprint, "folder": str(self.prepared.folder)},
                    metrics={f"validation.{self.task.metric}": self.progress.best},
                    lineage={"run": self.run_dir.name, "step": self.progress.best_step, **self.lineage},
                    new_parameters=self.new_parameters,
                )
                outcome["bundle"] = str(written.path)
        if self.first:
            write_atomically(self.run_dir / OUTCOME_FILE, json.dumps(outcome))
        return outcome


def train(recipe: Recipe, prepared_folder: Path, run_dir: Path, **options: Any) -> dict[str, Any]:
    """Run one attempt. Collective: every rank must call it. See `Run`."""
    run_dir.mkdir(parents=True, exist_ok=True)
    prepare_process(recipe)
    return Run(recipe, read_prepared(prepared_folder), run_dir, **options).train()


def prepare_process(recipe: Recipe) -> None:
    """One thread for each processor the worker was given: more spin against each other."""
    torch.set_num_threads(max(1, int(recipe.parallelism.cpus_per_worker)))
    transformers.utils.logging.disable_progress_bar()
