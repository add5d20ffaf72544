"""The user's own proof that a parallel layout trains like one process: a small model of the same kind, the real loop,
gloo processes on this machine, ten steps, compared with a single process.

The proof is fixed, so that it means something: AdamW at 1e-3, weight decay 0.1, clipping at 1.0, no dropout, float32,
one thread a rank, documents of uneven length, and a last batch that leaves ranks without rows. Splitting a batch alone
moves losses by about 1e-7 there.
"""

from __future__ import annotations

import json
import math
import multiprocessing as mp
import os
import resource
import tempfile
import traceback
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
import transformers
from transformers.models.auto import modeling_auto

from heliostat.curves import METRICS_FILE, read_metrics
from heliostat.data.prepare import PREPARED_VERSION, read_prepared
from heliostat.models.load import transformers_config
from heliostat.parallel.context import positions
from heliostat.parallel.parallelize import Parallel
from heliostat.parallel.router_balance import chosen_experts, routers, valid_tokens
from heliostat.recipe import SHARD_AXES, SHARD_OPTIONS, Parallelism, PipelineSchedule, Recipe, Refused, build, nearest
from heliostat.train.loop import Run, prepare_process

STEPS = 10
LOSS_TOLERANCE = 1e-5
GRAD_NORM_TOLERANCE = 1e-4
LENGTH = 32
VOCABULARY = 256
IMAGE = [3, 16, 16]
PROFILED_STEP = 3
KEYS = ("replicate", *SHARD_AXES, "schedule", "micro_batches", "recompute", *SHARD_OPTIONS)
WORDS = ("schedule", "recompute")
"""Keys whose values are no numbers."""


@dataclass
class Verdict:
    layout: str
    status: str
    """`equal`, `different` or `refused`."""
    loss_difference: float | None = None
    """Worst relative difference of a step's loss."""
    grad_norm_difference: float | None = None
    routing_agreement: float | None = None
    """Of a mixture of experts: the fraction of the last step's (layer, token, expert) that the single process chose,
    too."""
    peak_bytes: list[int] = field(default_factory=list)
    """Largest resident memory of each rank's process."""
    bytes_by_collective: dict[str, int] = field(default_factory=dict)
    """What all ranks together hand to each kind of collective in one step."""
    reason: str = ""


def parse_layouts(text: str, workers: int) -> list[tuple[str, dict[str, Any]]]:
    """`fsdp=2,tensor=2;pipeline=2,schedule=gpipe` as recipe overrides, each filled up to `workers` by replication."""
    layouts = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        given: dict[str, Any] = {}
        for item in part.split(","):
            key, _, value = item.strip().partition("=")
            if key not in KEYS:
                raise Refused("layouts", f"{key!r} in {part!r} is no axis of a layout", nearest(key, list(KEYS)))
            if key in SHARD_OPTIONS:
                if value != "true":
                    raise Refused("layouts", f"{key}={value!r} in {part!r} is not true", "leave it out for false")
                given[key] = True
                continue
            if key not in WORDS and not value.isdecimal():
                raise Refused("layouts", f"{key}={value!r} in {part!r} is not a number")
            if key == "schedule" and value not in (known := list(get_args(PipelineSchedule))):
                hint = nearest(value, known) or f"one of {', '.join(known)}"
                raise Refused("layouts", f"{value!r} in {part!r} is no pipeline schedule", hint)
            given[key] = value if key in WORDS else int(value)
        shards = math.prod(given.get(axis, 1) for axis in SHARD_AXES)
        if workers % shards:
            raise Refused("layouts", f"{part!r} takes {shards} processes, which do not divide --workers {workers}")
        if given.setdefault("replicate", workers // shards) * shards != workers:
            raise Refused("layouts", f"{part!r} takes {given['replicate'] * shards} processes of --workers {workers}")
        layouts.append((part, given))
    if not layouts:
        raise Refused("layouts", "no layout is named", 'e.g. --layouts "fsdp=2;tensor=2"')
    return layouts


def shrink(config: transformers.PretrainedConfig) -> dict[str, Any]:
    """Fields for a model of the same kind, small enough for a laptop: the ratio of query to key-value heads, ties,
    biases, norms and rotary settings stay."""
    # Enough heads that two key-value heads remain, which two tensor ranks can share.
    if not getattr(config, "num_attention_heads", None):
        raise Refused("recipe", f"{config.model_type} has no attention heads", "only transformers can be proven so far")
    ratio = int(config.num_attention_heads) // int(
        getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    )
    heads = min(int(config.num_attention_heads), max(4, 2 * ratio))
    small: dict[str, Any] = {"hidden_size": 16 * heads, "num_hidden_layers": 4, "num_attention_heads": heads}
    if (groups := getattr(config, "num_key_value_heads", None)) is not None:
        small["num_key_value_heads"] = max(1, heads * int(groups) // int(config.num_attention_heads))
    optional = {
        "intermediate_size": 32 * heads, "moe_intermediate_size": 16 * heads, "head_dim": 16, "vocab_size": VOCABULARY,
        "max_position_embeddings": 2 * LENGTH, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
        "sliding_window": None, "max_window_layers": 4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "layer_types": None, "image_size": IMAGE[1], "patch_size": 4, "num_channels": IMAGE[0],
    }  # fmt: skip
    small |= {key: value for key, value in optional.items() if getattr(config, key, None) is not None}
    return {config.attribute_map.get(key, key): value for key, value in small.items()}


def proof_task(config: transformers.PretrainedConfig) -> str:
    """What a model of this kind is trained to do."""
    kind = config.model_type
    if kind in modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        return "image_classification"
    # Encoders can also be made decoders, which nobody means by them.
    encoder = kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not encoder:
        return "language_model"
    if kind in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        return "text_classification"
    raise Refused("recipe", f"{kind} is no language model, and classifies neither texts nor images")


def proof_recipe(recipe: Recipe, storage: Path) -> Recipe:
    """The fixed proof of a recipe's model: only its architecture and its adapters are taken."""
    base = transformers_config(recipe.model)
    own = {"model_type": base.model_type} | {
        key: value
        for key, value in base.to_diff_dict().items()
        if key not in ("model_type", "architectures", "dtype")
        and not key.startswith(("transformers_", "_", "id2label", "label2id"))
    }
    return build({
        "name": "proof", "task": proof_task(base), "storage": str(storage),
        "model": {"config": own | shrink(base), "dropout": 0.0,
                  "lora": recipe.model.lora.model_dump() | {"dropout": 0.0}},
        "data": {"train": "made here", "pack": False, "sequence_length": LENGTH},
        "optimizer": {"lr": 1e-3, "weight_decay": 0.1, "clip_norm": 1.0},
        "schedule": {"max_steps": STEPS},
        "training": {"global_batch_size": 16, "micro_batch_size": 2, "keep_best": False,
                     "evaluate_every_steps": 1 << 30},
        "checkpoint": {"every_steps": 1 << 30},
    })  # fmt: skip


def make_data(folder: Path) -> None:
    """Random documents of uneven length, random images, and a label for each: 49 rows in batches of 16, so that an
    epoch's last batch has one row. Each task finds its own columns."""
    random = np.random.default_rng(0)
    for split, rows in (("train", 49), ("validation", 4), ("test", 4)):
        lengths = random.integers(2, LENGTH + 1, rows)
        documents = [random.integers(3, VOCABULARY, length).tolist() for length in lengths]
        table = pa.table({
            "input_ids": pa.array(documents, pa.list_(pa.int32())), "length": pa.array(lengths.astype(np.int32)),
            "sample_id": pa.array(range(rows), pa.int64()), "label": pa.array(random.integers(0, 3, rows), pa.int64()),
            "pixels": pa.array(random.integers(0, 256, (rows, math.prod(IMAGE)), np.uint8).tolist(),
                               pa.list_(pa.uint8(), math.prod(IMAGE))),
        })  # fmt: skip
        (folder / split).mkdir(parents=True)
        pq.write_table(table, folder / split / "part.parquet")
    facts = {
        "padding_id": 0,
        "vocab_size": VOCABULARY,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "labels": ["a", "b", "c"],
        "image_shape": IMAGE,
        "mean": [0.5] * IMAGE[0],
        "std": [0.3] * IMAGE[0],
    }
    meta = {"version": PREPARED_VERSION, "fingerprint": "proof", "recipe": "proof", "facts": facts, "rows": {}}
    (folder / "meta.json").write_text(json.dumps(meta))


def prove(source: Recipe, layouts: list[tuple[str, dict[str, Any]]], workers: int) -> list[Verdict]:
    """Run every layout and the single process; one verdict a layout. A layout that is refused is said to be."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = proof_recipe(source, folder / "storage")
        make_data(folder / "data")
        return [
            _verdict(recipe, label, given, workers, folder, number) for number, (label, given) in enumerate(layouts)
        ]


def _verdict(recipe: Recipe, label: str, given: dict[str, Any], workers: int, folder: Path, number: int) -> Verdict:
    axes = {axis: given.get(axis, 1) for axis in SHARD_AXES}
    tree = recipe.model_dump(mode="json")
    flags = {flag: given.get(flag, False) for flag in SHARD_OPTIONS}
    tree["parallelism"] |= axes | flags | {"workers": workers, "schedule": given.get("schedule", "1f1b")}
    tree["training"]["recompute"] = given.get("recompute", "none")
    if "micro_batches" in given:
        rows = recipe.training.global_batch_size // Parallelism(**axes, workers=workers).data_parallel
        tree["training"]["micro_batch_size"] = max(1, rows // given["micro_batches"])
    try:
        _run(build(tree), workers, folder, f"layout-{number}")
    except Refused as error:
        return Verdict(
            label, "refused", reason=f"{error.reason}" + (f" ({error.suggestion})" if error.suggestion else "")
        )
    if not (folder / "one").exists():  # not before something is there to be compared: refusals are said at once
        _run(recipe, 1, folder, "one")
    expected, got = _figures(folder / "one"), _figures(folder / f"layout-{number}")
    loss, norm = (float(np.max(np.abs(got[:, i] / expected[:, i] - 1))) for i in (0, 1))
    ranks = [json.loads((folder / f"layout-{number}" / f"rank-{rank}.json").read_text()) for rank in range(workers)]
    bytes_sent: dict[str, int] = defaultdict(int)
    for rank in ranks:
        for kind, count in rank["bytes_by_collective"].items():
            bytes_sent[kind] += count
    equal = loss <= LOSS_TOLERANCE and norm <= GRAD_NORM_TOLERANCE
    agreement = routing_agreement(folder / "one", folder / f"layout-{number}")
    peaks = [rank["peak_bytes"] for rank in ranks]
    return Verdict(label, "equal" if equal else "different", loss, norm, agreement, peaks, dict(bytes_sent))


def routing_agreement(expected: Path, got: Path) -> float | None:
    """The share of choices that two runs have in common; None where neither has experts."""
    ours, theirs = (
        {tuple(choice) for path in folder.glob("rank-*.json") for choice in json.loads(path.read_text())["routing"]}
        for folder in (expected, got)
    )
    # Tensor peers that disagree among themselves make more choices than one process.
    most = max(len(ours), len(theirs))
    return len(ours & theirs) / most if most else None


def _figures(run_dir: Path) -> np.ndarray:
    return np.array([(r["loss"], r["grad_norm"]) for r in read_metrics(run_dir / METRICS_FILE) if "loss" in r])


def _run(recipe: Recipe, workers: int, folder: Path, name: str) -> None:
    """Train on `workers` new processes. Raises Refused as the ranks did, RuntimeError with their tracebacks."""
    run_dir = folder / name
    run_dir.mkdir()
    # Ranks are forked from a process that has imported everything and run nothing: no five seconds a rank.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    # One thread a rank, from its first import on.
    kept = {key: os.environ.get(key) for key in ("OMP_NUM_THREADS",)}
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        processes = [
            context.Process(target=_rank, args=(rank, workers, recipe.model_dump(mode="json"), folder, run_dir))
            for rank in range(workers)
        ]
        for process in processes:
            process.start()
    finally:
        for key, value in kept.items():
            if value is None:
                os.environ.pop(key)
            else:
                os.environ[key] = value
    for process in processes:
        process.join()
    errors = [json.loads(path.read_text()) for path in sorted(run_dir.glob("error-*.json"))]
    for error in errors:
        if "field" in error:
            raise Refused(**error)
    # One that a signal ended leaves no word; its peers then lost their connection, which says nothing of the cause.
    ended = [f"{name}: rank {rank} ended with {each.exitcode}" for rank, each in enumerate(processes) if each.exitcode]
    if errors or ended:
        raise RuntimeError("\n".join([*(error.get("traceback", "") for error in errors), *ended]))


def _rank(rank: int, workers: int, recipe: dict[str, Any], folder: Path, run_dir: Path) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    try:
        if workers > 1:
            dist.init_process_group(
                "gloo", init_method=f"file://{run_dir}/rendezvous", rank=rank, world_size=workers,
                timeout=timedelta(seconds=120),
            )  # fmt: skip
        bytes_sent = _Bytes()
        built = build(recipe)
        prepare_process(built)
        data = read_prepared(folder / "data")
        attempt = Run(built, data, run_dir, should_stop=bytes_sent.at_each_step, write_bundle=False)
        routing = _Routing(attempt.parallel, bytes_sent)
        attempt.train()
        found = {
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "bytes_by_collective": bytes_sent.by_collective,
            "routing": sorted(routing.chosen),
        }
        (run_dir / f"rank-{rank}.json").write_text(json.dumps(found))
    except Refused as error:
        _write_error(run_dir, rank, {"field": error.field, "reason": error.reason, "suggestion": error.suggestion})
    except Exception:  # noqa: BLE001 - the parent says it
        _write_error(run_dir, rank, {"traceback": f"rank {rank}:\n{traceback.format_exc()}"})
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _write_error(run_dir: Path, rank: int, error: dict[str, str]) -> None:
    (run_dir / f"error-{rank}.json").write_text(json.dumps(error))


class _Bytes:
    """What this rank hands to collectives in one step, read from PyTorch's own profile of it."""

    def __init__(self) -> None:
        self.step = 0
        self.by_collective: dict[str, int] = {}
        self._profile: Any = None

    def at_each_step(self) -> bool:
        self.step += 1
        if self.step == PROFILED_STEP and dist.is_initialized():
            self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True)
            self._profile.start()
        elif self._profile is not None:
            self._profile.stop()
            self.by_collective = self._sum()
            self._profile = None
        return False

    def _sum(self) -> dict[str, int]:
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            self._profile.export_chrome_trace(file.name)
            events = json.loads(Path(file.name).read_text())["traceEvents"]
        total: dict[str, int] = defaultdict(int)
        for event in events:
            kind, argument = COLLECTIVES.get(event.get("name", ""), ("", 0))
            if kind:
                shapes = event["args"]["Input Dims"][argument]
                tensors = shapes if shapes and isinstance(shapes[0], list) else [shapes]
                total[kind] += sum(math.prod(shape) for shape in tensors) * FLOAT32_BYTES
        return dict(total)


class _Routing:
    """Which experts this rank's tokens went to in the last step: (layer, sample, position, expert)."""

    def __init__(self, parallel: Parallel, steps: _Bytes) -> None:
        self.parallel, self.steps = parallel, steps
        self.chosen: set[tuple[str, int, int, int]] = set()
        for name, (router, index) in routers(parallel.model).items():
            router.register_forward_hook(partial(self._record, name, index))

    def _record(self, name: str, index: int, router: Any, args: Any, output: Any) -> None:
        batch, layout = self.parallel.batch, self.parallel.layout
        if batch is None or not router.training or self.steps.step != STEPS:
            return
        outputs = output if isinstance(output, tuple) else (output,)
        top_k = self.parallel.model.config.get_text_config().num_experts_per_tok  # type: ignore[union-attr, operator]
        experts_NK = chosen_experts(outputs, index, top_k)
        valid_Bt = valid_tokens(batch, layout, len(experts_NK))
        length, degree = valid_Bt.shape[1], layout.parallelism.context
        position_t = positions(length * degree, degree, layout.context_rank) if degree > 1 else torch.arange(length)
        tokens = valid_Bt.nonzero().tolist()
        for (row, column), experts in zip(tokens, experts_NK[valid_Bt.flatten()].tolist(), strict=True):
            token = (name, int(batch.sample_ids[row]), int(position_t[column]))
            self.chosen |= {(*token, expert) for expert in experts}


FLOAT32_BYTES = 4
"""The proof runs in float32; the five float64 sums of a step are counted as if they were, too."""
COLLECTIVES = {
    "c10d::allreduce_": ("all_reduce", 0),
    "c10d::allgather_": ("all_gather", 1),
    "c10d::_allgather_base_": ("all_gather", 1),
    "c10d::allgather_into_tensor_coalesced_": ("all_gather", 1),
    "c10d::reduce_scatter_": ("reduce_scatter", 1),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "c10d::alltoall_": ("all_to_all", 1),
    "c10d::alltoall_base_": ("all_to_all", 1),
    "c10d::broadcast_": ("broadcast", 0),
    "c10d::send": ("send", 0),
}
"""PyTorch's operators, what people call them, and which argument holds what a rank hands over."""


def as_json(verdicts: list[Verdict]) -> dict[str, Any]:
    return {
        "tolerance": {"loss": LOSS_TOLERANCE, "grad_norm": GRAD_NORM_TOLERANCE},
        "layouts": [asdict(verdict) for verdict in verdicts],
    }
