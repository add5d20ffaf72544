"""What our parallel training costs over hand-written PyTorch of the same layout: FSDP2, tensor and pipeline (1F1B)
training of one Llama on two gloo processes, one thread each, float32. Both start from the same weights, take the same
batches in the same processes, and must show the same losses at first; their blocks of steps alternate (A B A B …), the
first of each being warm-up. Prints the ratios of wall and of CPU seconds (of both processes), paired by block, for each
layout.

    python -m bench.parallel_overhead [--pairs 5] [--steps 10] [--model 17M]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

from bench.train_overhead import SIZES, batches, recipe_for, spread
from heliostat.curves import METRICS_FILE, read_metrics
from heliostat.data.prepare import Prepared, prepare, read_prepared
from heliostat.models.load import build_model
from heliostat.recipe import Recipe, build, override
from heliostat.train.loop import train
from heliostat.train.optim import lr_factor

RANKS = 2
MICRO_BATCHES = 4
"""Of a step, under pipeline parallelism: one row each."""
CLIP_NORM = 1.0
LOSS_TOLERANCE = 1e-4
COMPARED_STEPS = 20
"""Later ones differ by what training makes of the last bits of the first."""

LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp": {"parallelism.fsdp": RANKS, "training.micro_batch_size": 2},
    "tensor": {"parallelism.tensor": RANKS, "training.micro_batch_size": 4},
    "pipeline": {"parallelism.pipeline": RANKS, "training.micro_batch_size": 1},
}
"""Ours, as fields of the recipe. Every step has four rows."""

Pass = Callable[[Tensor, Tensor], Tensor | None]
"""Token ids and labels (B, T) → this rank's loss, after the backward pass."""


def cross_entropy(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten())


def fsdp(model: Any) -> tuple[Any, Pass, Callable[[], Any]]:
    mesh = init_device_mesh("cpu", (RANKS,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    mine = slice(dist.get_rank(), None, RANKS)

    def forward_backward(ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
        loss = cross_entropy(model(input_ids=ids_BT[mine]).logits, labels_BT[mine])
        loss.backward()
        return loss.detach()

    return model, forward_backward, partial(clip_grad_norm_, list(model.parameters()), CLIP_NORM, foreach=True)


def tensor(model: Any) -> tuple[Any, Pass, Callable[[], Any]]:
    block = {
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(),
    }
    plan = {f"model.layers.*.{name}": style for name, style in block.items()}
    plan["lm_head"] = ColwiseParallel(output_layouts=Replicate())
    parallelize_module(model, init_device_mesh("cpu", (RANKS,)), plan)
    # One kernel takes sharded tensors or plain ones.
    kinds = [[p for p in model.parameters() if isinstance(p, DTensor) == sharded] for sharded in (True, False)]

    def forward_backward(ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
        loss = cross_entropy(model(input_ids=ids_BT).logits, labels_BT)
        loss.backward()
        return loss.detach()

    def clip() -> None:
        norms: list[Any] = [get_total_norm([p.grad for p in kind], foreach=True) for kind in kinds]
        norm = torch.hypot(norms[0].full_tensor(), norms[1])
        for kind in kinds:
            clip_grads_with_norm_(kind, CLIP_NORM, norm, foreach=True)

    return model, forward_backward, clip


class Half(nn.Module):
    """A Llama's lower blocks under its embedding, or its upper ones under its norm and head."""

    def __init__(self, model: Any, rank: int) -> None:
        super().__init__()
        middle = len(model.model.layers) // 2
        self.blocks = model.model.layers[:middle] if rank == 0 else model.model.layers[middle:]
        self.bottom = model.model.embed_tokens if rank == 0 else nn.Identity()
        self.top = nn.Identity() if rank == 0 else nn.Sequential(model.model.norm, model.lm_head)
        self.rotary = model.model.rotary_emb

    def forward(self, x: Tensor) -> Tensor:
        x_BTD = self.bottom(x)
        angles = self.rotary(x_BTD, torch.arange(x_BTD.shape[1])[None])
        for block in self.blocks:
            x_BTD = block(x_BTD, position_embeddings=angles)
        return self.top(x_BTD)


def pipeline(model: Any) -> tuple[Any, Pass, Callable[[], Any]]:
    rank = dist.get_rank()
    half = Half(model, rank)
    stage = PipelineStage(half, rank, RANKS, torch.device("cpu"))
    schedule = Schedule1F1B(stage, MICRO_BATCHES, loss_fn=cross_entropy)
    parameters = list(half.parameters())

    def forward_backward(ids_BT: Tensor, labels_BT: Tensor) -> Tensor | None:
        if rank == 0:
            schedule.step(ids_BT)
            return None
        losses: list[Tensor] = []
        schedule.step(target=labels_BT, losses=losses, return_outputs=False)
        return torch.stack(losses).detach().mean()

    def clip() -> None:
        square = get_total_norm([p.grad for p in parameters if p.grad is not None]).square()
        dist.all_reduce(square)
        clip_grads_with_norm_(parameters, CLIP_NORM, square.sqrt())

    return half, forward_backward, clip


PEERS = {"fsdp": fsdp, "tensor": tensor, "pipeline": pipeline}


class Peer:
    """The hand-written loop of a layout."""

    def __init__(self, layout: str, recipe: Recipe, data: Prepared) -> None:
        self.batches = iter(batches(recipe, data))
        model, self.forward_backward, self.clip = PEERS[layout](build_model(data.task(recipe)).train())
        options = recipe.optimizer
        groups: dict[tuple[bool, bool], list[Tensor]] = {}
        for parameter in model.parameters():
            groups.setdefault((parameter.ndim >= 2, isinstance(parameter, DTensor)), []).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": parameters, "weight_decay": options.weight_decay if matrices else 0.0}
                for (matrices, _), parameters in groups.items()
            ],
            lr=options.lr,
            betas=(options.beta1, options.beta2),
            fused=True,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: lr_factor(recipe.schedule, step, recipe.schedule.max_steps or 0)
        )

    def step(self) -> Tensor | None:
        batch = next(self.batches)
        loss = self.forward_backward(batch["input_ids"], batch["labels"])
        self.clip()
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return loss


def now() -> np.ndarray:
    """Wall and CPU seconds, once every rank is here."""
    dist.barrier()
    return np.array([time.perf_counter(), time.process_time()])


def worker(layout: str, trees: tuple[Any, Any], data: Path, run_dir: Path, steps: int, rank: int) -> dict[str, Any]:
    """`trees`: the recipe of one process, which has every batch whole, and that of the layout. Our loop runs as it is;
    whenever it has made `steps` more of them, the hand-written one makes as many."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    dist.init_process_group("gloo", init_method=f"file://{run_dir}/rendezvous", rank=rank, world_size=RANKS)
    whole, ours = (build(tree) for tree in trees)
    peer = Peer(layout, whole, read_prepared(data))
    # [block, ours or the peer's, wall or CPU]
    blocks: list[list[np.ndarray]] = []
    losses: list[Tensor | None] = []
    count, started = 0, now()

    def at_each_step() -> bool:
        nonlocal count, started
        if count % steps == 0:
            before = now()
            if count:
                losses.extend(peer.step() for _ in range(steps))
                after = now()
                blocks.append([before - started, after - before])
            started = now()
        count += 1
        return False

    train(ours, data, run_dir, should_stop=at_each_step, write_bundle=False)
    dist.destroy_process_group()
    return {"blocks": np.array(blocks), "losses": [float(loss) for loss in losses if loss is not None]}


def measure(layout: str, recipe: Recipe, data: Path, run_dir: Path, pairs: int, steps: int) -> dict[str, Any]:
    run_dir.mkdir()
    ours = override(recipe, {"parallelism.workers": RANKS, "optimizer.clip_norm": CLIP_NORM, **LAYOUTS[layout]})
    trees = recipe.model_dump(mode="json"), ours.model_dump(mode="json")
    with ProcessPoolExecutor(RANKS, multiprocessing.get_context("spawn")) as pool:
        ranks = list(pool.map(partial(worker, layout, trees, data, run_dir, steps), range(RANKS)))
    expected = np.mean([rank["losses"] for rank in ranks if rank["losses"]], axis=0)
    losses = [record["loss"] for record in read_metrics(run_dir / METRICS_FILE) if "loss" in record]
    np.testing.assert_allclose(losses[:COMPARED_STEPS], expected[:COMPARED_STEPS], rtol=LOSS_TOLERANCE)
    wall = ranks[0]["blocks"][1:, :, 0] / steps
    cpu = sum(rank["blocks"] for rank in ranks)[1:, :, 1]
    return {
        "wall": spread([a / b for a, b in wall.tolist()]),
        "cpu": spread([a / b for a, b in cpu.tolist()]),
        "ours_s": round(statistics.median(wall[:, 0].tolist()), 4),
        "peer_s": round(statistics.median(wall[:, 1].tolist()), 4),
        "pairs": pairs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="of one block")
    parser.add_argument("--model", choices=list(SIZES), default="17M")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # A block of warm-up, and the step at which the last block is seen to have ended.
        recipe = recipe_for(options.model, folder / "storage", (options.pairs + 1) * options.steps + 1)
        data, _ = prepare(recipe)
        answer = {
            layout: measure(layout, recipe, data.folder, folder / layout, options.pairs, options.steps)
            for layout in LAYOUTS
        }
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
