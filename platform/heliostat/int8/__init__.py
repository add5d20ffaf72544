"""A classifier of texts with its matrix products in 8-bit integers: the bundle as an ONNX file, which ONNX Runtime
computes. Each column of a weight has a scale of its own. What is multiplied with it has one that was found beforehand,
on rows of the bundle's training: no answer depends on the texts or the padding that share its batch.

Shapes: B rows, T tokens, C classes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pyarrow as pa
import torch
import transformers
from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput

from heliostat.evaluate import batches, prepared_rows, row_sums
from heliostat.int8 import graph
from heliostat.models.bundle import Bundle
from heliostat.recipe import Deploy, Refused
from heliostat.tasks import Task

VERSION = 2
"""Of what is written: another one where files written before are no longer right."""
INSTEAD = "use deploy.precision=float32"
INPUTS = ("input_ids", "attention_mask")
CALIBRATION_ROWS = 64
"""Of the training's, which say how large numbers become."""
BATCH_ROWS = 16
"""Of these, computed at once."""
MAX_ROWS = 1000
"""Of the validation rows: a random choice where there are more."""
MAX_BYTES = 2**31
"""An ONNX file, as written first in float32, holds no more."""
FOUND = "heliostat"
"""The key of what was found, in the file's own metadata."""


@dataclass(frozen=True)
class Found:
    """How an int8 model answered the bundle's validation rows beside the bundle in float32."""

    rows: int
    float32: float
    """Accuracy."""
    int8: float
    disagreement: float
    """The share of rows with another label."""


class Int8Model(torch.nn.Module):
    """In a bundle's model's place: it takes what that takes, and gives its logits."""

    def __init__(self, bundle: Bundle, file: Path, threads: int | None = None) -> None:
        """`file`: see `model`. `threads`: processors of one forward pass (None: all)."""
        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads or 0, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # replicas share processors
        self.bundle = bundle
        # As one operator, a sum and its normalisation take five times as long as each for itself.
        apart = ["SkipLayerNormFusion"]
        self.session = onnxruntime.InferenceSession(
            file, options, providers=["CPUExecutionProvider"], disabled_optimizers=apart
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
        """(B, T) each; logits: (B, C)."""
        given = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        return SequenceClassifierOutput(logits=torch.from_numpy(self.session.run(None, given)[0]))

    @property
    def found(self) -> Found:
        return Found(**json.loads(self.session.get_modelmeta().custom_metadata_map[FOUND]))

    @cached_property
    def base_model(self) -> Any:
        """In float32: what embeddings are made of."""
        return self.bundle.model().base_model


def model(bundle: Bundle, settings: Deploy) -> Int8Model:
    """As a replica computes, from the file of a bundle of which `verify` found nothing wrong: it is kept in the user's
    cache, and written where it is not there. Raises Refused for a model that is not converted, for validation rows that
    cannot be had or are too few, and for one that loses more of float32's answers than the settings allow."""
    file = _cache_folder() / f"{bundle.digest[:32]}-{_versions()}.onnx"
    if not file.is_file():  # it is written also where it will be refused: other settings may allow it
        _write(file, bundle, _rows(bundle, settings.int8_loss), _chosen(bundle, "train", CALIBRATION_ROWS))
    loaded = Int8Model(bundle, file, settings.threads_per_replica)
    check(loaded.found, settings)
    return loaded


def _write(file: Path, bundle: Bundle, rows: pa.Table, seen: pa.Table) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{os.getpid()}-{file.name}")
    try:
        made = converted(bundle, seen)
        onnx.save(made, beside)
        found = compare(bundle, Int8Model(bundle, beside), rows)
        onnx.helper.set_model_props(made, {FOUND: json.dumps(dataclasses.asdict(found))})
        onnx.save(made, beside)
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


def converted(bundle: Bundle, rows: pa.Table) -> onnx.ModelProto:
    """The bundle's model in integers, with scales that fit what these prepared rows make of it. Raises Refused for one
    that cannot be."""
    made = exported(bundle)
    graph.narrow(made)
    given = [
        {name: batch.inputs[name].numpy() for name in INPUTS} for _, batch in batches(bundle.task(), rows, BATCH_ROWS)
    ]
    if not graph.quantise(made, graph.ranges(made, given)):
        raise Refused("deploy.precision", "of the model's matrix products, none could be in int8", INSTEAD)
    return made


def exported(bundle: Bundle) -> onnx.ModelProto:
    """The bundle's model in float32, for any number of rows of any length. Raises Refused for one that cannot be."""
    if 4 * bundle.card["num_parameters"] > MAX_BYTES:
        reason = f"{bundle.card['num_parameters']:,} parameters are more than an ONNX file holds"
        raise Refused("deploy.precision", reason, INSTEAD)
    model: Any = bundle.model()
    model.set_attn_implementation("eager")  # the fused ones become more operators
    ids_BT, mask_BT = (
        torch.ones(2, 16, dtype=torch.int64),
        torch.ones(2, 16, dtype=torch.int64),
    )  # one would be one input
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns of its own parts
            program = torch.onnx.export(
                _Logits(model).eval(),
                (ids_BT, mask_BT),
                input_names=INPUTS,
                output_names=["logits"],
                dynamic_shapes=(sizes, sizes),
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = f"a {model.config.model_type} cannot be written as ONNX: {str(error).strip().splitlines()[0]}"
        raise Refused("deploy.precision", reason, INSTEAD) from error
    assert program is not None
    return program.model_proto


class _Logits(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def compare(bundle: Bundle, int8: Int8Model, rows: pa.Table) -> Found:
    """On prepared rows with labels."""
    task: Task = bundle.task()
    (exact, exact_logits), (rounded, logits) = (row_sums(each, task, rows) for each in (bundle.model(), int8))
    assert exact_logits is not None
    assert logits is not None
    other = (exact_logits.argmax(-1) != logits.argmax(-1)).double().mean()
    return Found(rows.num_rows, float(exact["accuracy"].mean()), float(rounded["accuracy"].mean()), float(other))


def check(found: Found, settings: Deploy) -> None:
    """Raises Refused for a model that loses more of float32's answers than the settings allow."""
    loss, rounding = found.float32 - found.int8, 1e-9
    # What is no number is not allowed, either.
    if not (loss <= settings.int8_loss + rounding and found.disagreement <= settings.int8_disagreement + rounding):
        raise Refused(
            "deploy.precision",
            f"int8 does not answer as the bundle does: on {found.rows} validation rows its accuracy is "
            f"{found.int8:.4f}, float32's {found.float32:.4f} (allowed: {settings.int8_loss:g} less), and it gives "
            f"another label to {found.disagreement:.2%} of them (allowed: {settings.int8_disagreement:.2%})",
            INSTEAD,
        )


def _rows(bundle: Bundle, loss: float) -> pa.Table:
    """Of the bundle's validation rows, those that are compared."""
    rows = _chosen(bundle, "validation", MAX_ROWS)
    needed = math.ceil(1 / loss)
    if rows.num_rows < needed:
        reason = f"on {rows.num_rows} validation rows a loss of {loss:g} cannot be seen; {needed} are needed"
        raise Refused("deploy.precision", reason, INSTEAD)
    return rows


def _chosen(bundle: Bundle, split: str, count: int) -> pa.Table:
    """At random, and so many at most."""
    try:
        rows = prepared_rows(bundle, bundle.recipe.storage, split)
    except Refused as error:
        reason = f"int8 is compared with float32 on the bundle's validation rows, but {error.reason}"
        raise Refused("deploy.precision", reason, INSTEAD) from error
    chosen = np.random.default_rng(bundle.recipe.seed).permutation(rows.num_rows)[:count]
    return rows.take(pa.array(np.sort(chosen)))


def _versions() -> str:
    """A short hash of what a file depends on beside the bundle."""
    made_by = (VERSION, torch.__version__, transformers.__version__, onnxruntime.__version__)
    return hashlib.sha256(repr(made_by).encode()).hexdigest()[:12]


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "heliostat" / "int8"
