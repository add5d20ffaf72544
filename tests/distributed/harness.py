"""Runs a function on gloo processes, as torchrun would, one thread a rank."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

_context = mp.get_context("forkserver")
# Imported once; every rank is then forked from a process that has run nothing yet.
_context.set_forkserver_preload(["torch", "transformers", "heliostat.train.loop", "tests.distributed.harness"])


def _rank(
    rank: int, world: int, rendezvous: str, function: Callable[..., Any], args: tuple[Any, ...], results: Any
) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    try:
        if world > 1:
            dist.init_process_group(
                "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world, timeout=timedelta(seconds=120)
            )
        results.put((rank, function(*args), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_until_killed(world: int, rendezvous: Path, function: Callable[..., Any], *args: Any) -> None:
    """Runs ranks until the first has killed itself; then the others die, too, as when their node is lost."""
    results = _context.Queue()
    processes = [
        _context.Process(target=_rank, args=(rank, world, str(rendezvous), function, args, results))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    processes[0].join(timeout=120)
    for process in processes:
        process.kill()
        process.join(timeout=10)
    assert processes[0].exitcode == -signal.SIGKILL


def run(world: int, function: Callable[..., Any], *args: Any, timeout_s: float = 240) -> list[Any]:
    """The function's results by rank; an error of any rank is raised here."""
    results = _context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = str(Path(folder) / "rendezvous")
        processes = [
            _context.Process(target=_rank, args=(rank, world, rendezvous, function, args, results))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        collected: dict[int, Any] = {}
        errors: list[str] = []
        try:
            for _ in range(world):
                rank, value, error = results.get(timeout=timeout_s)
                if error:
                    errors.append(f"rank {rank} of {world} failed:\n{error}")
                collected[rank] = value
            # The first to fail takes its peers with it: the cause is among the errors, not always in front.
            if errors:
                raise RuntimeError("\n".join(errors))
        finally:
            for process in processes:
                process.join(timeout=10)
                if process.is_alive():
                    process.kill()
    return [collected[rank] for rank in range(world)]
