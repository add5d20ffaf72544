"""The sections of a recipe about its model, its data and their training. Every default lives in a section, and nowhere
else."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from heliostat.recipe.base import Count, Fraction, Refused, Section, no_password

PipelineSchedule = Literal["gpipe", "1f1b", "interleaved", "zbv"]


class Lora(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685), trained in place of the model's own weights."""

    rank: Count = 0
    """0: off, the model's own weights are trained."""
    alpha: PositiveFloat = 16.0
    """What adapters give is multiplied by alpha / rank."""
    dropout: Fraction = 0.0
    """Of what adapters take in."""
    targets: list[str] = []
    """Linear modules of the blocks that get adapters, e.g. q_proj. Empty: all of them."""


class Model(Section):
    name: str = ""
    """A hub id, a directory in Hugging Face format, a bundle, or `packaged:NAME`. Empty: built from `config`."""
    config: dict[str, Any] = {}
    """Fields laid over the transformers configuration; needs `model_type` where `name` is empty. JSON."""
    pretrained: bool = True
    """False: take the architecture of `name`, not its weights."""
    tokenizer: str = ""
    """Where the tokenizer comes from, if not from `name`: as `name`, or `train:SIZE` (a BPE of that size)."""
    max_length: PositiveInt = 256
    """Tokens of a text that the model sees."""
    image_size: PositiveInt | None = None
    """Images are resized to this height and width. None: as they come."""
    truncation: Literal["head", "head_tail"] = "head"
    """What is kept of a longer text: its beginning, or its beginning and its end, half each."""
    freeze_layers: Count = 0
    """The embeddings and this many of the lowest blocks are not trained."""
    lora: Lora = Lora()
    dropout: Fraction | None = None
    """Overrides every dropout rate of the configuration."""
    sync_batch_norm: bool = True
    """Batch normalisation over the global batch (all ranks) instead of each rank's own rows."""


class MixtureSource(Section):
    source: str
    """As `data.train`."""
    weight: PositiveFloat
    """Its share of training rows, relative to the weights of the others."""


class Data(Section):
    train: str = ""
    """`packaged:NAME/SPLIT`, `hf://USER/NAME/SPLIT`, or a Parquet, CSV, JSONL or Arrow file, folder or glob,
    local or on `s3://` or `gs://`."""
    mixture: Annotated[dict[str, MixtureSource], Field(max_length=256)] = {}
    """Several named training sources with weights, in place of `train`. JSON."""
    validation: str = ""
    """Empty: `validation_fraction` of the training rows, chosen by `seed`."""
    test: str = ""
    """Empty: `test_fraction` of the training rows, chosen by `seed`."""
    validation_fraction: Fraction = 0.1
    test_fraction: Fraction = 0.1
    text_column: str = "text"
    label_column: str = "label"
    image_column: str = "image"
    feature_columns: list[str] = []
    """Of a table of numbers. Empty: every column of numbers but the label."""
    limit: PositiveInt | None = None
    """Train on this many rows (a fixed random choice, of each source in proportion): short trials, smoke tests."""
    validation_limit: PositiveInt | None = None
    """Evaluate on so many of the validation rows while training (a fixed random choice)."""
    sequence_length: PositiveInt = 512
    """Tokens a row of a language model's training data holds."""
    bucket_batches: Count = 0
    """Sort by length within windows of this many global batches, so that rows of like length meet. 0: off."""
    augment: Literal["none", "crop", "crop_flip"] = "none"
    """Random shifts by up to an eighth of the image, and left-right flips."""
    pack: bool = True
    """Language models: fill rows with consecutive documents. False: one document a row, cut to length."""
    isolate_documents: bool = False
    """Packed documents see only themselves, and their positions start anew (block-diagonal attention). What a row cuts
    off a document is a document of its own in the next."""
    prefetch: Count = 2
    """Steps whose rows are read and collated in advance, on a thread. 0: off."""
    log_samples: bool = False
    """Keep which rows each step was fed, and write them to `samples.parquet` in the run's folder at its end."""

    @model_validator(mode="after")
    def _one_source(self) -> Data:
        if self.train and self.mixture:
            raise Refused("data.mixture", "data.train names a source, too", "use one of the two")
        if "" in self.mixture:
            raise Refused("data.mixture", "a source has no name", "name it")
        return self


class Optimizer(Section):
    lr: PositiveFloat = 1e-4
    head_lr_scale: PositiveFloat = 1.0
    """Learning rate of newly made parameters (the head), as a multiple of `lr`."""
    layer_lr_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Each block's learning rate is this multiple of the one above it."""
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip_norm: PositiveFloat | None = 1.0


class Schedule(Section):
    epochs: PositiveFloat = 1.0
    max_steps: PositiveInt | None = None
    """Overrides `epochs`."""
    shape: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_fraction: Fraction = 0.1
    min_lr_fraction: Fraction = 0.0


class Training(Section):
    global_batch_size: PositiveInt = 16
    """Rows per optimizer step over all workers; the rest follows by gradient accumulation."""
    micro_batch_size: PositiveInt = 16
    """Rows per forward pass of one worker."""
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    """Of matrix products; `auto` is bfloat16 where all workers' devices have instructions for it, else float32."""
    compile: bool = False
    recompute: Literal["none", "full", "selective"] = "none"
    """What a block computed in the forward pass and computes again for the backward pass, to save memory: nothing,
    all, or all but attention and every second matrix product."""
    label_smoothing: Fraction = 0.0
    ema_decay: Fraction = 0.0
    """Evaluate and keep an exponential moving average of the weights. 0: off."""
    evaluate_every_steps: Count = 0
    """0: once an epoch."""
    early_stopping_patience: Count = 0
    """Stop after this many evaluations without a better validation metric. 0: off."""
    keep_best: bool = True
    """The bundle holds the weights of the best evaluation, not the last."""


SHARD_AXES = ("fsdp", "expert", "context", "tensor", "pipeline")
"""The axes that split a model; what they leave of the workers holds copies of it."""
SHARD_OPTIONS = {"sequence_parallel": "tensor", "loss_parallel": "tensor", "cpu_offload": "fsdp"}
"""Options that only have a meaning along an axis, and that axis."""


class Parallelism(Section):
    workers: PositiveInt = 1
    min_workers: PositiveInt | None = None
    """The run starts, and goes on when nodes are lost, with as few workers as this, and grows back to `workers` when it
    can. The global batch stays what it is. None: it waits for all of them."""
    fsdp: PositiveInt = 1
    """Workers that share one copy of the parameters (FSDP2)."""
    reshard_after_forward: bool = True
    """Free each block's gathered parameters after its forward pass and gather them again for the backward pass
    (ZeRO-3). False: keep them in between (ZeRO-2): more memory, less traffic."""
    cpu_offload: bool = False
    """FSDP keeps parameters, gradients and optimizer state in the CPU's memory, where the optimizer's step is made, and
    brings a block's parameters to the GPU while it runs: less GPU memory, slower."""
    expert: PositiveInt = 1
    """Workers that share one copy of the experts of a mixture-of-experts model; its other parameters are sharded over
    fsdp × expert workers."""
    context: PositiveInt = 1
    """Workers that share each sequence: each holds some of its positions."""
    tensor: PositiveInt = 1
    """Workers that share each block's matrices."""
    sequence_parallel: bool = False
    """Between these matrices, each tensor peer holds a share of the positions instead of a copy: less memory, and no
    more traffic."""
    loss_parallel: bool = False
    """The logits stay split over the vocabulary among tensor peers, and the loss is computed from their shares."""
    pipeline: PositiveInt = 1
    schedule: PipelineSchedule = "1f1b"
    """`interleaved` and `zbv` give each pipeline rank two stages; the others, one."""
    cpus_per_worker: PositiveFloat = 1.0
    use_gpu: bool | None = None
    """None: use GPUs where the cluster has enough of them."""

    @property
    def replicate(self) -> int:
        return self.workers // self.shards

    @property
    def data_parallel(self) -> int:
        """Workers with rows of their own."""
        return self.replicate * self.fsdp * self.expert

    @property
    def shards(self) -> int:
        """Workers that hold one copy of the model."""
        return math.prod(getattr(self, axis) for axis in SHARD_AXES)

    def worker_resources(self, use_gpu: bool) -> dict[str, float]:
        """What each worker takes of a cluster, by Ray's names."""
        return {"CPU": self.cpus_per_worker} | ({"GPU": 1.0} if use_gpu else {})

    @model_validator(mode="after")
    def _divides(self) -> Parallelism:
        if self.workers % self.shards:
            raise ValueError(
                f"workers={self.workers} is not a multiple of {' × '.join(SHARD_AXES)} = {self.shards}; "
                f"use workers={self.shards * max(1, round(self.workers / self.shards))}"
            )
        if self.min_workers is not None and self.min_workers > self.workers:
            raise Refused("parallelism.min_workers", f"{self.min_workers} is above workers={self.workers}", "lower it")
        if self.min_workers is not None and self.shards > 1:
            raise Refused(
                "parallelism.min_workers",
                f"a copy of the model takes {self.shards} workers, and workers come and go one by one",
                f"leave it out, or set {', '.join(SHARD_AXES)} to 1",
            )
        for name, axis in SHARD_OPTIONS.items():
            if getattr(self, name) and getattr(self, axis) == 1:
                raise Refused(
                    f"parallelism.{name}",
                    f"with {axis}=1 there is no peer to share with",
                    f"set it false, or use {axis} ≥ 2",
                )
        return self


class Checkpoint(Section):
    every_steps: Count = 0
    """0: as `every_s` says."""
    every_s: PositiveFloat | Literal["auto"] = "auto"
    """Seconds between checkpoints where `every_steps` is 0. `auto`: what loses the least time, by what a checkpoint was
    measured to cost and how often the run failed (Daly's formula), and half an hour at most."""
    worker_mtbf_h: PositiveFloat = 50_000.0
    """Hours between failures of one worker, for `auto` until the run has had some. 16,384 GPUs that trained Llama 3 had
    419 in 54 days (arXiv:2407.21783): 50,000 each."""
    storage: str = ""
    """Where they lie: a folder, or an object store's address (`s3://BUCKET/FOLDER`, `gs://…`), below which each run has
    a folder of its name. Empty: in the run's own folder."""
    asynchronous: bool = True
    """Training goes on once the state is copied to the CPU's memory, and a thread writes it. False: it waits, and needs
    no room for the copy."""
    keep: PositiveInt = 2
    max_failures: Count = 3
    """How often a failed run is started again from its last checkpoint."""


class Recovery(Section):
    hang_timeout_s: PositiveFloat = 600.0
    """Of a step, a batch of an evaluation, or a checkpoint. One that takes longer hangs: the stacks of every worker are
    saved in the run's folder `stacks`, and the run starts again from its last checkpoint."""
    spike_factor: Annotated[float, Field(gt=1.0)] | None = None
    """A loss above this multiple of the median of the last 32 steps is a spike, and its step a bad one, as is one whose
    loss or gradient is not finite. None: losses may rise as they like."""
    bad_step: Literal["skip", "restart", "stop"] = "skip"
    """A bad step is made once more. One that is good then was the hardware's fault, and counts. One that is bad again
    is its batch's: leave the weights as they were, or start again from the last checkpoint and leave the batch out
    there, or stop the run."""
    max_bad_steps: Count = 8
    """With more of them the run stops."""
    grow_every_s: PositiveFloat = 60.0
    """How often a run with fewer than `parallelism.workers` looks whether there are more again."""


class Energy(Section):
    """What energy is estimated from. Its defaults are Green Algorithms' for hardware that it does not know."""

    cpu_watts: PositiveFloat = 12.0
    """Of one busy processor core: the published power of the package by its cores."""
    gpu_watts: PositiveFloat = 200.0
    """Of one GPU that a run holds."""


class Record(Section):
    storage: str = ""
    """Where a job's record is shipped to as it grows, besides its run's own folder: another folder, or an object
    store's address, below which each run has a folder of its name. Empty: where `checkpoint.storage` says, if that is
    an object store."""
    max_bytes: Count = 256 << 20
    """Of the logs of a job: then the oldest go, and the record says so. 0: nothing is recorded."""

    @model_validator(mode="after")
    def _address(self) -> Record:
        no_password("record.storage", self.storage, "the credentials of the environment")
        return self


class Tracking(Section):
    uri: str = ""
    """An MLflow server's address. Empty: a SQLite file in the storage folder. Its password comes from
    MLFLOW_TRACKING_PASSWORD."""
    experiment: str = ""
    """Empty: the recipe's name."""

    @model_validator(mode="after")
    def _address(self) -> Tracking:
        no_password("tracking.uri", self.uri, "MLFLOW_TRACKING_PASSWORD")
        return self
