"""Changed ONNX graphs against themselves before, computed by ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from heliostat.int8 import graph
from tests.bundles import text_bundle

B, T, K, N = 3, 5, 16, 8
RANDOM = np.random.default_rng(0)
MASK_BT = np.ones((B, T), np.int64)
FIRST = helper.make_node("Gather", ["h", "zero"], ["first"], axis=1)


def model_of(nodes: list[onnx.NodeProto], outputs: list[str], **weights: np.ndarray) -> onnx.ModelProto:
    """From `x`, (B, T, K), and `attention_mask`, which nothing reads."""
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", "tokens", K]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["rows", "tokens"]),
    ]
    made = helper.make_graph(
        nodes,
        "test",
        inputs,
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in {"zero": np.array(0), **weights}.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def run(model: onnx.ModelProto, x_BTK: np.ndarray, *names: str) -> list[np.ndarray]:
    return compute(model, {"x": x_BTK, "attention_mask": MASK_BT}, *names)


def compute(model: onnx.ModelProto, given: dict[str, np.ndarray], *names: str) -> list[np.ndarray]:
    """What a model answers, and behind it the tensors of these names."""
    watched = onnx.ModelProto.FromString(model.SerializeToString())
    watched.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    session = onnxruntime.InferenceSession(watched.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, given)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def test_a_block_whose_first_token_is_read_computes_that_one(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Of a BERT: the answers stay, and behind the last block's keys and values there is one token."""
    from heliostat import int8

    whole = int8.exported(text_bundle(tmp_path_factory.mktemp("narrow")))
    narrowed = onnx.ModelProto.FromString(whole.SerializeToString())
    graph.narrow(narrowed)
    (gathered,) = [
        node.input[0]
        for node in whole.graph.node
        if node.op_type == "Gather" and node.input[0].startswith("layer_norm")
    ]
    blocks = sum(node.op_type == "Softmax" for node in whole.graph.node)
    lengths, answers = [], []
    ids_BT, mask_BT = RANDOM.integers(1, 20, (4, 12)), np.ones((4, 12), np.int64)
    mask_BT[1, 7:] = mask_BT[3, 2:] = 0
    for each in (whole, narrowed):
        names = [gathered, *(node.output[0] for node in each.graph.node if node.op_type in ("Softmax", "Gelu"))]
        logits_BC, *found = compute(each, {"input_ids": ids_BT, "attention_mask": mask_BT}, *names)
        answers.append(logits_BC)
        lengths.append([value.shape[-2] for value in found])
    np.testing.assert_allclose(answers[1], answers[0], atol=1e-5)
    assert lengths[0] == [12] * (1 + 2 * blocks)
    # The end, and of the last block what attends and what follows.
    assert sorted(lengths[1]) == [1] * 3 + [12] * (2 * blocks - 2)


def test_what_others_read_stays_whole() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        FIRST,
        helper.make_node("ReduceMax", ["h"], ["most"], keepdims=0),
    ]
    model, x_BTK = model_of(nodes, ["first", "most"], w=normal(K, N)), normal(B, T, K)
    before = run(model, x_BTK)
    graph.narrow(model)
    for one, other in zip(before, run(model, x_BTK), strict=True):
        np.testing.assert_array_equal(one, other)
    assert run(model, x_BTK, "h")[-1].shape == (B, T, N)


@pytest.mark.parametrize(
    ("nodes", "watched", "length"),
    [
        ([helper.make_node("Softmax", ["x"], ["h"], axis=1)], "h", T),
        ([helper.make_node("CumSum", ["x", "one"], ["h"])], "h", T),
        ([helper.make_node("MatMul", ["y", "x"], ["h"])], "h", 1),
        ([helper.make_node("Softmax", ["x"], ["s"], axis=-1), helper.make_node("Add", ["s", "b"], ["h"])], "s", 1),
        ([helper.make_node("Reshape", ["x", "split"], ["r"]), helper.make_node("Tanh", ["r"], ["h"])], "r", 1),
        ([helper.make_node("Reshape", ["x", "mixed"], ["r"]), helper.make_node("Tanh", ["r"], ["h"])], "r", K),
    ],
)
def test_what_mixes_tokens_needs_all_of_them(nodes: list[onnx.NodeProto], watched: str, length: int) -> None:
    shapes = {"split": np.array([0, 0, 4, 4]), "mixed": np.array([0, K, -1])}
    model = model_of([*nodes, FIRST], ["first"], one=np.array(1), b=normal(K), y=normal(1, T, T), **shapes)
    x_BTK = normal(B, T, K)
    (before,) = run(model, x_BTK)
    graph.narrow(model)
    after, found = run(model, x_BTK, watched)
    np.testing.assert_allclose(before, after, rtol=1e-5, atol=1e-6)
    assert found.shape[1] == length


def integers(model: onnx.ModelProto, x_BTK: np.ndarray) -> tuple[np.ndarray, int]:
    """What a graph answers once its products are integer ones, and how many are."""
    made = onnx.ModelProto.FromString(model.SerializeToString())
    found = graph.quantise(made, graph.ranges(made, [{"x": x_BTK, "attention_mask": MASK_BT}]))
    return run(made, x_BTK)[0], found


def test_products_are_nearly_those_of_float32() -> None:
    """Of one tensor with two weights, one of them with a bias, one of them read twice: the closed form of the error is
    that of rounding to half a step, 1/255 of the range and 1/126 of a column's."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"]),
        helper.make_node("Add", ["p", "b"], ["q"]),
        helper.make_node("MatMul", ["x", "v"], ["r"]),
        helper.make_node("Add", ["r", "b"], ["s"]),
        helper.make_node("Mul", ["s", "r"], ["u"]),
        helper.make_node("Add", ["q", "u"], ["y"]),
    ]
    w_KN, v_KN, b_N, x_BTK = normal(K, N), normal(K, N), normal(N), normal(B, T, K)
    model = model_of(nodes, ["y", "q", "r"], w=w_KN, v=v_KN, b=b_N)
    made = onnx.ModelProto.FromString(model.SerializeToString())
    assert graph.quantise(made, graph.ranges(made, [{"x": x_BTK, "attention_mask": MASK_BT}])) == 2
    y, q, r = run(made, x_BTK)
    step_x, size_x = (x_BTK.max() - x_BTK.min()) / 255, np.abs(x_BTK).sum(-1, keepdims=True)
    for found, weight_KN, bias_N in ((q, w_KN, b_N), (r, v_KN, 0)):
        step_N = np.abs(weight_KN).max(0) / 63
        bound = step_x / 2 * np.abs(weight_KN).sum(0) + size_x * step_N / 2 + K * step_x * step_N / 4
        assert (np.abs(found - (x_BTK @ weight_KN + bias_N)) <= bound + 1e-5).all()
        assert np.abs(found - (x_BTK @ weight_KN + bias_N)).max() > 1e-3  # they are integers
    np.testing.assert_allclose(y, q + (r + b_N) * r, rtol=1e-5, atol=1e-5)


def test_a_few_large_numbers_behind_a_normalisation_do_not_spoil_the_others() -> None:
    """One number of each token is 1000 times as large as the others, and its row of the weight as much smaller."""
    scale_K = np.ones(K, np.float32)
    scale_K[3] = 1000
    w_KN, x_BTK = normal(K, N) / scale_K[:, None], normal(B, T, K)
    product = helper.make_node("MatMul", ["h", "w"], ["y"])
    errors = []
    for nodes in (
        [helper.make_node("LayerNormalization", ["x", "scale"], ["h"], axis=-1), product],
        [helper.make_node("Mul", ["x", "scale"], ["h"]), product],
    ):
        model = model_of(nodes, ["y"], w=w_KN, scale=scale_K)
        (exact,), (rounded, count) = run(model, x_BTK), integers(model, x_BTK)
        assert count == 1
        errors.append(np.abs(rounded - exact).mean() / np.abs(exact).mean())
    assert errors[0] < 0.02
    assert errors[1] > 0.2  # without


def test_padding_does_not_count() -> None:
    model, x_BTK = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], ["y"], w=normal(K, N)), normal(B, T, K)
    mask_BT = MASK_BT.copy()
    mask_BT[:, 3:] = 0
    (found,) = graph.ranges(model, [{"x": x_BTK, "attention_mask": mask_BT}]).values()
    low_K, high_K = x_BTK[:, :3].min((0, 1)), x_BTK[:, :3].max((0, 1))
    np.testing.assert_array_equal(found, (np.minimum(low_K, 0), np.maximum(high_K, 0)))
    x_BTK[:, 3:] *= 100
    (again,) = graph.ranges(model, [{"x": x_BTK, "attention_mask": mask_BT}]).values()
    np.testing.assert_array_equal(again, found)
