"""Writing checkpoints while training goes on."""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from heliostat.place import Place
from heliostat.record import say
from heliostat.train.checkpoint.find import MANIFEST, PREFIX, VERSION, complete, folder_name
from heliostat.train.checkpoint.stage import Stage
from heliostat.train.checkpoint.state import alone_is_fine, capture
from heliostat.train.checkpoint.streams import Streams
from heliostat.train.errors import DiskFull
from heliostat.train.optim import MovingAverage

NICENESS = 10
"""Of the thread that writes: on a busy machine the step goes first."""

logger = logging.getLogger("heliostat")


class Writer:
    """Writes one checkpoint at a time. Collective: every rank makes one and calls its methods, in the same order."""

    def __init__(
        self,
        folder: Place,
        keep: int,
        asynchronous: bool = True,
        missed: Callable[[int, str], None] = lambda step, reason: None,
    ) -> None:
        """`keep`: how many complete ones stay. `asynchronous`: `save` returns once the state is copied, and a thread
        does the rest. `missed` is told of a checkpoint that found no room, on rank 0."""
        self.folder, self.keep, self.missed = folder, keep, missed
        self.first = not dist.is_initialized() or dist.get_rank() == 0
        # The thread must not meet the collectives of a step that runs meanwhile.
        self.group = dist.new_group(backend="gloo") if asynchronous and dist.is_initialized() else None
        self.stage = Stage() if asynchronous else None
        self.write_s = 0.0
        """What the last one took to write, while training went on."""
        self.completed = time.time()
        """When the last one was complete (Unix time); before there was one, when this writer was made."""
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        step: int,
        trainer: dict[str, Any],
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        average: MovingAverage | None = None,
    ) -> None:
        """Begin a checkpoint; it exists once its manifest does. Waits for the last one, and raises what that met; but
        where that found the disk full, training has gone on without it, and this is another try."""
        try:
            self.settle()
        except DiskFull as error:
            logger.warning("%s; training goes on", error)
        state = capture(model, optimizer, average)
        if self.stage is None:
            self._write(step, trainer, state)
            if not isinstance(self._error, DiskFull):
                self.settle()
            return
        staged = self.stage.copy(state)
        # A daemon: a write that hangs does not keep a process that is to end.
        self._thread = threading.Thread(
            target=self._write, args=(step, trainer, staged), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def settle(self) -> None:
        """Wait, and raise what was met, DiskFull above all."""
        self.wait()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write(self, step: int, trainer: dict[str, Any], state: dict[str, Any]) -> None:
        begun = time.perf_counter()
        try:
            if self.stage is not None:
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
            try:
                self._publish(step, trainer, state)
            except DiskFull:
                self._together(lambda: self._tidy(1))
                self._publish(step, trainer, state)
            self.completed = time.time()
            if self.first:
                say("checkpoint", step=step, folder=str(self.folder), seconds=round(time.perf_counter() - begun, 3))
            self._together(lambda: self._tidy(self.keep))
        except DiskFull as error:
            self._error = error
            if self.first:
                reason = str(error)
                _quietly(lambda: self.missed(step, reason))  # which may want to write on the same disk
        except BaseException as error:  # noqa: BLE001 - raised in the thread that trains
            self._error = error
        self.write_s = time.perf_counter() - begun

    def _publish(self, step: int, trainer: dict[str, Any], state: dict[str, Any]) -> None:
        place = self.folder / folder_name(step)
        writer = dcp.FileSystemWriter(place.path, sync_files=place.local)
        writer.fs, writer.path = streams, _ = Streams(place), place.path
        try:
            self._together(place.remove)  # what an earlier attempt left half-written
            self._together(place.make)
            with alone_is_fine():
                dcp.save(state, storage_writer=writer, process_group=self.group, no_dist=not dist.is_initialized())
            files = self._gather(streams.written)
            manifest = json.dumps({"version": VERSION, "step": step, "trainer": trainer, "files": files})
            self._together(lambda: place.publish(MANIFEST, manifest))
        except BaseException as error:
            if self.first:
                _quietly(place.remove)
            if disk_full(error):
                raise DiskFull(f"no room in {self.folder} for a checkpoint of step {step}") from error
            raise

    def _tidy(self, keep: int) -> None:
        """Remove all but the newest complete ones, and what is half-written."""
        stay = {found.place.path for found in complete(self.folder)[-keep:]}
        for name, files in self.folder.folders().items():
            place = self.folder / name
            if name.startswith(PREFIX) and place.path not in stay:
                if MANIFEST in files:
                    place.filesystem.delete_file(f"{place.path}/{MANIFEST}")  # first, so that no one trusts the rest
                place.remove()

    def _together(self, act: Callable[[], Any]) -> None:
        """Rank 0 acts; its error is every rank's."""
        error: BaseException | None = None
        if self.first:
            try:
                act()
            except BaseException as met:  # noqa: BLE001 - raised below, on every rank
                error = met
        if dist.is_initialized():
            said: list[Any] = [None if error is None else (str(error), disk_full(error))]
            dist.broadcast_object_list(said, src=0, group=self.group)
            if error is None and said[0] is not None:
                words, full = said[0]
                error = OSError(errno.ENOSPC, words) if full else RuntimeError(words)
        if error is not None:
            raise error

    def _gather(self, written: dict[str, Any]) -> dict[str, Any]:
        """Every rank's, on rank 0."""
        if not dist.is_initialized():
            return written
        gathered: list[Any] | None = [None] * dist.get_world_size() if self.first else None
        dist.gather_object(written, gathered, dst=0, group=self.group)
        return {name: said for each in gathered or [] for name, said in sorted(each.items())}


def save(
    folder: Path,
    step: int,
    trainer: dict[str, Any],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    average: MovingAverage | None,
    keep: int = 1 << 30,
) -> None:
    """Write a checkpoint, and return when it is there. On an error nothing of it is left.

    Collective: every rank must call it, in the same order."""
    writer = Writer(Place.at(folder), keep, asynchronous=False)
    writer.save(step, trainer, model, optimizer, average)
    writer.settle()


def disk_full(error: BaseException | None) -> bool:
    """Whether an error, its causes or its ranks' errors (checkpointing gathers them) are about a full disk."""
    if error is None:
        return False
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    inner = [wrapped[0] for wrapped in getattr(error, "failures", {}).values()]
    # torch's zip writer raises RuntimeErrors that carry the system's words only.
    words = str(error)
    return (
        "No space left on device" in words
        or "file write failed" in words
        or "unexpected pos" in words
        or any(disk_full(each) for each in inner)
        or disk_full(error.__cause__)
    )


def _quietly(act: Callable[[], Any]) -> None:
    try:
        act()
    except OSError as error:
        logger.warning("%s", error)
