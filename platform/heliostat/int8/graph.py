"""An encoder as an ONNX graph, changed in place: what nobody reads is not computed, and products become integer ones.

Shapes: B rows, T tokens, K numbers of a token, N columns of a weight.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

Shape = Sequence[int | str]
Range = tuple[np.ndarray, np.ndarray]
"""(K) each: the least and the largest of each of a token's numbers, zero among them."""

LEVELS = 63
"""Of a weight to either side: 7 bits. On processors without VNNI, ONNX Runtime adds two products in 16 bits, which 8
would overflow."""
DOMAIN = "com.microsoft"
"""Of ONNX Runtime's own operators."""
TOKENS = 1
"""The axis of tokens, behind that of rows."""
BY_PLACE = ("Add", "Sub", "Mul", "Div", "Erf", "Gelu", "Relu", "Sigmoid", "Tanh")
"""Operators whose every number is made of those in its own place."""


# -- what nobody reads


def narrow(model: onnx.ModelProto) -> None:
    """Where only a row's first token is read behind the last block, that block computes keys and values of all tokens
    and everything else of the first alone."""
    graph = model.graph
    shapes = _shapes(graph)
    zeros = {
        each.name
        for each in graph.initializer
        if list(each.dims) in ([], [1]) and not numpy_helper.to_array(each).any()
    }
    readers = Counter(name for node in graph.node for name in node.input) + Counter(each.name for each in graph.output)
    # By tensor: along which axis a reader needs the first place only, and which of its inputs that is.
    asked: dict[str, list[tuple[int, onnx.NodeProto, int]]] = defaultdict(list)
    for node in graph.node:
        if node.op_type == "Gather" and _attribute(node, "axis", 0) == TOKENS and node.input[1] in zeros:
            asked[node.input[0]].append((TOKENS, node, 0))
    behind = list[onnx.NodeProto]()  # from the last operator on
    for node in reversed(graph.node):
        wanted, needs = asked.pop(node.output[0], []), None
        axis = wanted[0][0] if wanted else -1
        if wanted and len(wanted) == readers[node.output[0]] and all(each == axis for each, *_ in wanted):
            needs = _needs(node, axis, shapes)  # nobody needs the rest
        if needs is None:
            behind += [_first(node.output[0], *each, graph) for each in wanted]
        else:
            for place, along in needs:
                asked[node.input[place]].append((along, node, place))
            if node.op_type == "Reshape":
                _copy_shape(node, axis, shapes[node.output[0]], graph)
        behind.append(node)
    behind += [_first(name, *each, graph) for name, wanted in asked.items() for each in wanted]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(reversed(behind))


def _shapes(graph: onnx.GraphProto) -> dict[str, Shape]:
    """As far as they are known; sizes that change from one call to the next by their names."""
    found: dict[str, Shape] = {each.name: list(each.dims) for each in graph.initializer}
    for each in (*graph.value_info, *graph.input, *graph.output):
        sizes = [size.dim_param or size.dim_value for size in each.type.tensor_type.shape.dim]
        if all(sizes):
            found[each.name] = sizes
    return found


def _needs(node: onnx.NodeProto, axis: int, shapes: Mapping[str, Shape]) -> list[tuple[int, int]] | None:
    """Of which of its inputs, along which axis, an operator needs the first place only, where that is so along `axis`
    of its output. None: it needs more, or is not known well enough."""
    if len(node.output) > 1 or not {*node.input, *node.output} <= shapes.keys():
        return None
    shape, inputs = shapes[node.output[0]], [shapes[name] for name in node.input]
    rank, first = len(shape), inputs[0]
    if node.op_type in BY_PLACE:
        axes = [(place, axis - rank + len(each)) for place, each in enumerate(inputs)]
        return [(place, each) for place, each in axes if each >= 0 and inputs[place][each] != 1]
    if node.op_type in ("LayerNormalization", "Softmax"):
        return [(0, axis)] if _attribute(node, "axis", -1) in (-1, rank - 1) and axis < rank - 1 else None
    if node.op_type == "MatMul":
        return [(0, axis)] if len(first) == rank and axis == rank - 2 else None
    if node.op_type == "Transpose":
        return [(0, _attribute(node, "perm", range(rank)[::-1])[axis])]
    if node.op_type == "Reshape":
        unknown = sum(isinstance(size, str) for size in shape[axis + 1 :])
        return [(0, axis)] if list(first[: axis + 1]) == list(shape[: axis + 1]) and unknown <= 1 else None
    return None


def _first(name: str, axis: int, reader: onnx.NodeProto, place: int, graph: onnx.GraphProto) -> onnx.NodeProto:
    """An operator that gives a reader the first place along an axis."""
    out = f"{name}.first.{reader.output[0]}.{place}"
    ends = {f"{out}.{key}": np.array([value]) for key, value in {"start": 0, "end": 1, "axis": axis}.items()}
    graph.initializer.extend(numpy_helper.from_array(value, key) for key, value in ends.items())
    reader.input[place] = out
    return helper.make_node("Slice", [name, *ends], [out])


def _copy_shape(node: onnx.NodeProto, axis: int, shape: Shape, graph: onnx.GraphProto) -> None:
    """Up to an axis, a Reshape leaves its input's sizes as they are."""
    sizes = [0] * (axis + 1) + [size if isinstance(size, int) else -1 for size in shape[axis + 1 :]]
    node.input[1] = f"{node.output[0]}.shape"
    graph.initializer.append(numpy_helper.from_array(np.array(sizes), node.input[1]))
    del node.attribute[:]  # a zero would be a size


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(each) for each in node.attribute if each.name == name), default)


# -- integers


def products(graph: onnx.GraphProto) -> dict[str, tuple[str, str]]:
    """By what they give: the tokens and the weight of all products of the one with the other. What is computed once for
    a text, as poolers and heads are, is none."""
    weights = {each.name for each in graph.initializer if len(each.dims) == 2}
    return {
        node.output[0]: (node.input[0], node.input[1])
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in weights
    }


def ranges(model: onnx.ModelProto, batches: Iterable[dict[str, np.ndarray]]) -> dict[str, Range]:
    """Of what is multiplied with a weight, by tensor, in these batches of a model's inputs; padding left out."""
    names = sorted({tokens for tokens, _ in products(model.graph).values()})
    watched = onnx.ModelProto.FromString(model.SerializeToString())
    watched.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    session = onnxruntime.InferenceSession(watched.SerializeToString(), providers=["CPUExecutionProvider"])
    found = dict[str, Range]()
    for batch in batches:
        mask_BT = batch["attention_mask"].astype(bool)
        for name, values in zip(names, session.run(names, batch), strict=True):
            # What is computed of the first token alone has no padding.
            real_XK = values[mask_BT] if values.shape[:2] == mask_BT.shape else values.reshape(-1, values.shape[-1])
            low_K, high_K = found.get(name, (0.0, 0.0))
            found[name] = np.minimum(low_K, real_XK.min(0)), np.maximum(high_K, real_XK.max(0))
    return found


def quantise(model: onnx.ModelProto, ranges: Mapping[str, Range]) -> int:
    """Products with weights become integer ones; returns how many. What lies beyond its range is cut off."""
    graph = model.graph
    found, normed = products(graph), _normed(graph)
    weights = {each.name: numpy_helper.to_array(each) for each in graph.initializer if len(each.dims) == 2}
    sharing: dict[str, list[str]] = defaultdict(list)
    for tokens, weight in found.values():
        sharing[tokens].append(weight)
    added = _added(graph, found)
    sums = {add.output[0] for add in added.values()}
    nodes, made = list[onnx.NodeProto](), dict[str, Any]()
    rounded = set[str]()
    for node in graph.node:
        if node.output[0] in sums:
            continue  # its product adds it
        if node.output[0] not in found:
            nodes.append(node)
            continue
        tokens, weight = found[node.output[0]]
        if tokens not in rounded:  # queries, keys and values share theirs
            rounded.add(tokens)
            low_K, high_K = ranges[tokens]
            even_K, source = None, tokens
            if tokens in normed:
                even_K, source = _evening(low_K, high_K, [weights[each] for each in sharing[tokens]]), f"{tokens}.even"
                made[f"{tokens}.shrink"] = 1 / even_K
                nodes.append(helper.make_node("Mul", [tokens, f"{tokens}.shrink"], [source]))
                low_K, high_K = low_K / even_K, high_K / even_K
            made |= _token_scale(tokens, float(low_K.min()), float(high_K.max()))
            made |= {k: v for each in sharing[tokens] for k, v in _rounded(each, tokens, weights[each], even_K).items()}
            scaled = [source, f"{tokens}.scale", f"{tokens}.zero"]
            nodes.append(helper.make_node("QuantizeLinear", scaled, [f"{tokens}.int8"]))
        factor = f"{weight}.{tokens}"
        inputs = [f"{tokens}.int8", f"{factor}.int8", f"{tokens}.scale", f"{factor}.scale", f"{tokens}.zero"]
        add = added.get(node.output[0])
        outputs, bias = (node.output, []) if add is None else (add.output, ["", add.input[1]])
        nodes.append(helper.make_node("MatMulIntegerToFloat", inputs + bias, outputs, domain=DOMAIN))
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in made.items())
    used = {name for node in nodes for name in node.input}
    kept = [each for each in graph.initializer if each.name in used]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return len(found)


def _added(graph: onnx.GraphProto, found: Mapping[str, Any]) -> dict[str, onnx.NodeProto]:
    """By product: what adds a bias to it, where nothing else reads it."""
    readers = Counter(name for node in graph.node for name in node.input)
    vectors = {each.name for each in graph.initializer if len(each.dims) == 1}
    return {
        node.input[0]: node
        for node in graph.node
        if node.op_type == "Add" and node.input[0] in found and node.input[1] in vectors and readers[node.input[0]] == 1
    }


def _normed(graph: onnx.GraphProto) -> set[str]:
    """What normalisations give, and parts of it."""
    names = set[str]()
    for node in graph.node:
        if node.op_type == "LayerNormalization" or (node.op_type == "Slice" and node.input[0] in names):
            names.add(node.output[0])
    return names


def _evening(low_K: np.ndarray, high_K: np.ndarray, weights: list[np.ndarray]) -> np.ndarray:
    """By what each of a token's numbers is divided, and its row of the weights multiplied. Behind a normalisation a few
    of them are many times as large as the others, which one scale would round to nothing: SmoothQuant (Xiao and others
    2023, equation 4, with alpha = 0.5)."""
    tokens_K = np.maximum(np.maximum(high_K, -low_K), 1e-5)
    weights_K = np.maximum(np.max([np.abs(each_KN).max(1) for each_KN in weights], 0), 1e-5)
    return np.sqrt(tokens_K / weights_K).astype(np.float32)


def _token_scale(name: str, low: float, high: float) -> dict[str, np.ndarray]:
    """Of integers from 0 to 255, of which one stands for zero."""
    scale = max(high - low, 1e-30) / 255
    return {f"{name}.scale": np.array(scale, np.float32), f"{name}.zero": np.array(round(-low / scale), np.uint8)}


def _rounded(name: str, tokens: str, weight_KN: np.ndarray, even_K: np.ndarray | None) -> dict[str, np.ndarray]:
    """With a scale for each column."""
    if even_K is not None:
        weight_KN = weight_KN * even_K[:, None]
    scale_N = np.maximum(np.abs(weight_KN).max(0), 1e-30) / LEVELS
    rounded_KN = np.rint(weight_KN / scale_N).astype(np.int8)
    return {f"{name}.{tokens}.int8": rounded_KN, f"{name}.{tokens}.scale": scale_N.astype(np.float32)}
