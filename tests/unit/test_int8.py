"""A tiny BERT in 8-bit integers against itself in float32; what is refused, and the file in the cache."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pytest
import torch

from heliostat import installed, int8
from heliostat.data.loader import open_split
from heliostat.models.bundle import Bundle
from heliostat.predictor import Predictor, loading
from heliostat.recipe import Deploy, Refused, override
from tests.bundles import TEXT_ROWS, image_bundle, reweighted, text_bundle
from tests.recipes import tiny_bert, tiny_llama

INT8 = Deploy(precision="int8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("int8")


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    return text_bundle(folder)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "heliostat" / "int8"


@pytest.fixture(scope="module")
def graph(bundle: Bundle) -> bytes:
    """In float32. Exporting is what takes seconds."""
    return int8.exported(bundle).SerializeToString()


@pytest.fixture(scope="module")
def predictor(folder: Path, bundle: Bundle, graph: bytes) -> Predictor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "exported", lambda bundle: onnx.ModelProto.FromString(graph))
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return Predictor(bundle, threads=1, load=loading(INT8))


@pytest.fixture(scope="module")
def rows(bundle: Bundle) -> pa.Table:
    return open_split(Path(bundle.card["data"]["folder"]), "test")


def scores(predictions: list[dict[str, Any]]) -> np.ndarray:
    return np.array([list(each["scores"].values()) for each in predictions])


# -- answers


def test_answers_are_nearly_those_of_float32(bundle: Bundle, predictor: Predictor, rows: pa.Table) -> None:
    """On rows that neither training nor the gate has seen."""
    exact = scores(Predictor(bundle, threads=1).predict_rows(rows))
    rounded = scores(predictor.predict_rows(rows))
    labels = rows.column("label").to_numpy()
    assert (exact.argmax(1) == labels).mean() > 0.9  # otherwise agreeing says little
    assert (exact.argmax(1) == rounded.argmax(1)).mean() >= 0.98
    difference = np.abs(exact - rounded)
    assert 0 < difference.max() < 0.1
    assert difference.mean() < 0.01


def test_a_text_is_answered_alike_whatever_shares_its_batch(predictor: Predictor, rows: pa.Table) -> None:
    """Alone, beside texts of other lengths, and padded far beyond all of them."""
    rows = rows.slice(0, 32)
    alone = scores([predictor.predict_rows(rows.slice(i, 1))[0] for i in range(rows.num_rows)])
    assert np.abs(scores(predictor.predict_rows(rows)) - alone).max() < 1e-5
    lengths = rows.column("length").to_numpy()
    assert lengths.min() < 8 < 24 < lengths.max()
    ids_BT, mask_BT = torch.zeros(32, 48, dtype=torch.int64), torch.zeros(32, 48, dtype=torch.int64)
    for i, ids in enumerate(rows.column("input_ids").to_pylist()):
        ids_BT[i, : len(ids)], mask_BT[i, : len(ids)] = torch.tensor(ids), 1
    padded = predictor.model(input_ids=ids_BT, attention_mask=mask_BT).logits.softmax(-1).numpy()
    assert np.abs(padded - alone).max() < 1e-5


def test_weights_are_integers(bundle: Bundle, predictor: Predictor) -> None:
    """All that each token is multiplied with; what is done once for a text stays as it is."""
    graph = onnx.load(predictor.model.session._model_path).graph
    integers = sum(np.prod(each.dims) for each in graph.initializer if each.data_type == onnx.TensorProto.INT8)
    products = [each for each in bundle.model().bert.encoder.modules() if isinstance(each, torch.nn.Linear)]
    assert integers == sum(each.weight.numel() for each in products)


def test_embeddings_are_those_of_float32(bundle: Bundle, predictor: Predictor, rows: pa.Table) -> None:
    """`drift` compares them."""
    exact, found = Predictor(bundle).embeddings(rows), predictor.embeddings(rows)
    assert exact is not None
    assert found is not None
    assert np.array_equal(exact, found)


# -- the gate


def broken(bundle: Bundle, path: Path) -> Bundle:
    """The same function in float32, which integers cannot hold: of what attention gathers, every other number is 10⁵
    times as large and its weight behind as much smaller, so that these weights and the numbers between are rounded to
    nothing."""
    state = bundle.model().state_dict()
    scale_H = torch.ones(32)
    scale_H[::2] = 1e5
    for name in [each for each in state if ".attention.self.value." in each]:
        state[name] = state[name] * (scale_H[:, None] if state[name].ndim == 2 else scale_H)
    for name in [each for each in state if each.endswith(".attention.output.dense.weight")]:
        state[name] = state[name] / scale_H
    return reweighted(bundle, path, state)


def test_a_model_that_int8_breaks_is_refused_with_both_numbers(
    tmp_path: Path, cache: Path, bundle: Bundle, rows: pa.Table
) -> None:
    harmed = broken(bundle, tmp_path / "broken")
    one, other = (scores(Predictor(each).predict_rows(rows)) for each in (bundle, harmed))
    assert np.abs(one - other).max() < 1e-3  # float32 does not mind
    with pytest.raises(Refused, match="int8 does not answer as the bundle does") as error:
        loading(INT8)(harmed)
    assert error.value.field == "deploy.precision"
    found = re.search(r"on (\d+) validation rows its accuracy is ([\d.]+), float32's ([\d.]+)", error.value.reason)
    assert found
    assert int(found[1]) == TEXT_ROWS
    assert float(found[3]) - float(found[2]) > 0.2
    # What was found is kept: other settings are judged by it, and nothing is converted again.
    (file,) = cache.iterdir()
    written = file.stat().st_mtime_ns
    lenient = Deploy(precision="int8", int8_loss=0.9, int8_disagreement=0.9)
    assert loading(lenient)(harmed).found.rows == TEXT_ROWS
    assert file.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("changed", "passes"),
    [
        ({}, True),
        ({"int8": 0.89}, True),
        ({"int8": 0.88}, False),
        ({"int8": 0.95}, True),
        ({"disagreement": 0.03}, False),
        ({"float32": float("nan")}, False),
    ],
)
def test_what_is_lost_is_compared_with_what_is_allowed(changed: dict[str, float], passes: bool) -> None:
    found = dataclasses.replace(int8.Found(rows=1000, float32=0.895, int8=0.895, disagreement=0.02), **changed)
    if passes:
        int8.check(found, INT8)
        return
    with pytest.raises(Refused, match="allowed"):
        int8.check(found, INT8)


def test_rows_that_are_gone_or_too_few(tmp_path: Path, cache: Path, bundle: Bundle) -> None:
    with pytest.raises(Refused, match=r"on 200 validation rows a loss of 0\.001 cannot be seen; 1000 are needed"):
        loading(Deploy(precision="int8", int8_loss=0.001))(bundle)
    data = {name: value for name, value in bundle.card["data"].items() if name != "fingerprint"}
    with pytest.raises(Refused, match=r"int8 is compared .* but .* does not say on what it was validated") as error:
        loading(INT8)(Bundle(bundle.path, bundle.card | {"data": data}))
    assert error.value.field == "deploy.precision"
    assert not cache.exists()


# -- the file in the cache


def test_the_file_is_used_again_and_a_stale_one_is_not(
    cache: Path, bundle: Bundle, graph: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "exported", lambda bundle: onnx.ModelProto.FromString(graph))
    loading(INT8)(bundle)
    (first,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(int8, "exported", lambda bundle: pytest.fail("it is there"))
        loading(INT8)(bundle)
    monkeypatch.setattr(int8, "VERSION", int8.VERSION + 1)
    loading(INT8)(bundle)
    assert len(set(cache.iterdir()) - {first}) == 1
    other = Bundle(bundle.path, bundle.card | {"digest": "0" * 64})
    loading(INT8)(other)
    assert len(list(cache.iterdir())) == 3


def test_what_fails_leaves_nothing(cache: Path, bundle: Bundle, graph: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "exported", lambda bundle: onnx.ModelProto.FromString(graph))

    def fails(*_: object) -> None:
        (beside,) = cache.iterdir()
        assert beside.name.startswith(f".{os.getpid()}-")
        raise KeyboardInterrupt

    monkeypatch.setattr(int8, "compare", fails)
    with pytest.raises(KeyboardInterrupt):
        loading(INT8)(bundle)
    assert list(cache.iterdir()) == []


# -- refused before anything is done


def test_other_tasks_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="int8 is for text_classification, not for language_model") as error:
        tiny_llama(tmp_path, **{"deploy.precision": "int8"})
    assert error.value.field == "deploy.precision"
    from serve.application import application

    with pytest.raises(Refused, match="not for image_classification"):
        application(image_bundle(tmp_path), "1", INT8)


def test_gpus_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="int8 is for processors") as error:
        override(tiny_bert(tmp_path), {"deploy.precision": "int8", "deploy.gpus_per_replica": 1.0})
    assert error.value.field == "deploy.gpus_per_replica"


def test_a_model_that_is_too_large_for_a_file(cache: Path, bundle: Bundle) -> None:
    large = Bundle(bundle.path, bundle.card | {"num_parameters": 600_000_000})
    with pytest.raises(Refused, match="600,000,000 parameters are more than an ONNX file holds"):
        loading(INT8)(large)


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    loading(INT8)
    monkeypatch.setitem(installed.PRECISIONS, "int8", ("no-such-package",))
    with pytest.raises(Refused, match=r"no-such-package.*extra `edge`") as error:
        loading(INT8)
    assert error.value.field == "deploy.precision"
