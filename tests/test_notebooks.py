"""Every notebook runs from top to bottom, and is committed without outputs."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def outputs(notebook: NotebookNode, kind: str) -> list[str]:
    """What the notebook shows of a MIME type, in order."""
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output.data[kind] for output in shown if kind in output.get("data", {})]


def check_first_model(notebook: NotebookNode) -> None:
    assert len(outputs(notebook, "image/png")) == 2
    (metrics,) = [ast.literal_eval(text) for text in outputs(notebook, "text/plain") if "'test.accuracy'" in text]
    assert metrics["test.accuracy.ci95"][0] > 0.1, "no better than chance"


CHECKS: dict[str, Callable[[NotebookNode], None]] = {"01_first_model": check_first_model}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.slow
def test_notebook(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells), "clear its outputs"
    # The kernel is this environment's, whatever kernels the user has installed.
    write_kernel_spec(tmp_path / "jupyter" / "kernels" / "here")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    client = NotebookClient(notebook, kernel_name="here", timeout=300, resources={"metadata": {"path": str(ROOT)}})
    client.execute()
    CHECKS[path.stem](notebook)


def test_every_notebook_is_checked() -> None:
    assert [path.stem for path in NOTEBOOKS] == list(CHECKS)
