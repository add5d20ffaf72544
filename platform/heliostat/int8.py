"""A classifier of texts with its matrix products in 8-bit integers: the bundle as an ONNX file, which ONNX Runtime
computes. Each column of a weight has a scale of its own, and so has each token's vector, as it is multiplied: no answer
depends on the texts or the padding that share its batch.

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

from heliostat.evaluate import row_sums, validation_rows
from heliostat.models.bundle import Bundle
from heliostat.recipe import Deploy, Refused
from heliostat.tasks import Task

VERSION = 1
"""Of what is written: another one where files written before are no longer right."""
INSTEAD = "use deploy.precision=float32"
INPUTS = ("input_ids", "attention_mask")
LEVELS = 63
"""Of a weight to either side: 7 bits. On processors without VNNI, ONNX Runtime adds two products in 16 bits, which 8
would overflow."""
DOMAIN = "com.microsoft"
"""Of ONNX Runtime's own operators."""
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
        self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

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
        _write(file, bundle, _rows(bundle, settings.int8_loss))
    loaded = Int8Model(bundle, file, settings.threads_per_replica)
    check(loaded.found, settings)
    return loaded


def _write(file: Path, bundle: Bundle, rows: pa.Table) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{os.getpid()}-{file.name}")
    try:
        graph = exported(bundle)
        quantise(graph)
        onnx.save(graph, beside)
        found = compare(bundle, Int8Model(bundle, beside), rows)
        onnx.helper.set_model_props(graph, {FOUND: json.dumps(dataclasses.asdict(found))})
        onnx.save(graph, beside)
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


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


def quantise(model: onnx.ModelProto) -> None:
    """Products with weights become integer ones, in place. What is computed once for a text (pooler and head) is no
    `MatMul` there and stays in float32. Raises Refused for a model that has none."""
    graph = model.graph
    weights = {each.name: each for each in graph.initializer if len(each.dims) == 2}
    nodes, rounded = list[onnx.NodeProto](), set[str]()
    for node in graph.node:
        if node.op_type != "MatMul" or node.input[1] not in weights:
            nodes.append(node)
            continue
        tokens, weight = node.input
        if tokens not in rounded:  # queries, keys and values share theirs
            rounded.add(tokens)
            nodes += _rounded_tokens(tokens)
        if weight not in rounded:
            rounded.add(weight)
            graph.initializer.extend(_rounded_weight(weight, onnx.numpy_helper.to_array(weights[weight])))
        product, (out,) = f"{node.output[0]}.product", node.output
        factors = [f"{tokens}.int8", f"{weight}.int8", "int8.one", f"{weight}.scale", "int8.middle"]
        nodes += [
            onnx.helper.make_node("MatMulIntegerToFloat", factors, [product], domain=DOMAIN),
            onnx.helper.make_node("Mul", [product, f"{tokens}.scale"], [out]),
        ]
    if not rounded:
        raise Refused("deploy.precision", "of the model's matrix products, none could be in int8", INSTEAD)
    constants = {"one": np.float32(1), "middle": np.uint8(128), "last": np.array([-1]), "least": np.float32(1e-30)}
    constants["step"] = np.float32(1 / 127)
    graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(v), f"int8.{k}") for k, v in constants.items())
    used = {name for node in nodes for name in node.input}
    kept = [each for each in graph.initializer if each.name in used]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
    model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))


def _rounded_tokens(name: str) -> list[onnx.NodeProto]:
    """Each token's vector as integers around 128, and what it is to be multiplied with again."""
    steps = [
        ("ReduceMax", [name, "int8.last"], "highest"),
        ("ReduceMin", [name, "int8.last"], "lowest"),
        ("Neg", [f"{name}.lowest"], "deepest"),
        ("Max", [f"{name}.highest", f"{name}.deepest", "int8.least"], "farthest"),
        ("Mul", [f"{name}.farthest", "int8.step"], "scale"),
        ("Reciprocal", [f"{name}.scale"], "inverse"),
        ("Mul", [name, f"{name}.inverse"], "scaled"),
        ("QuantizeLinear", [f"{name}.scaled", "int8.one", "int8.middle"], "int8"),
    ]
    return [onnx.helper.make_node(kind, inputs, [f"{name}.{output}"]) for kind, inputs, output in steps]


def _rounded_weight(name: str, weight_KN: np.ndarray) -> list[onnx.TensorProto]:
    """With a scale for each column."""
    scale_N = np.maximum(np.abs(weight_KN).max(0), 1e-30) / LEVELS
    return [
        onnx.numpy_helper.from_array(np.rint(weight_KN / scale_N).astype(np.int8), f"{name}.int8"),
        onnx.numpy_helper.from_array(scale_N.astype(np.float32), f"{name}.scale"),
    ]


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
    try:
        rows = validation_rows(bundle, bundle.recipe.storage)
    except Refused as error:
        reason = f"int8 is compared with float32 on the bundle's validation rows, but {error.reason}"
        raise Refused("deploy.precision", reason, INSTEAD) from error
    needed = math.ceil(1 / loss)
    if rows.num_rows < needed:
        reason = f"on {rows.num_rows} validation rows a loss of {loss:g} cannot be seen; {needed} are needed"
        raise Refused("deploy.precision", reason, INSTEAD)
    chosen = np.random.default_rng(bundle.recipe.seed).permutation(rows.num_rows)[:MAX_ROWS]
    return rows.take(pa.array(np.sort(chosen)))


def _versions() -> str:
    """A short hash of what a file depends on beside the bundle."""
    made_by = (VERSION, torch.__version__, transformers.__version__, onnxruntime.__version__)
    return hashlib.sha256(repr(made_by).encode()).hexdigest()[:12]


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "heliostat" / "int8"
