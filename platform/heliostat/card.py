"""A bundle's card, `card.json`: what the bundle is and which files belong to it. Read without the libraries that its
model needs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from heliostat.recipe import Refused

BUNDLE_VERSION = 1
CARD = "card.json"
PICKLES = {".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"}
"""Suffixes of files that may hold a pickle, which can run any code when it is read."""
INDEX = "model.safetensors.index.json"


def read(path: Path) -> dict[str, Any]:
    """The card of the bundle at `path`. Raises Refused for what is none."""
    card_path = path / CARD
    if not card_path.is_file():
        raise Refused("bundle", f"{path} is not a bundle: it has no {CARD}", "name the folder that training wrote")
    try:
        card = json.loads(card_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Refused("bundle", f"{card_path} is not JSON: {error}") from error
    if not isinstance(card, dict) or not isinstance(card.get("version"), int):
        raise Refused("bundle", f"{card_path} is not a bundle's card")
    if card["version"] > BUNDLE_VERSION:
        raise Refused("bundle", f"{path} was written by a newer Heliostat", "upgrade this one")
    if not isinstance(card.get("files"), dict):
        raise Refused("bundle", f"{card_path} lists no files", "restore it, or train again")
    return card


def verify(path: Path, card: dict[str, Any], folder: str = "") -> None:
    """Raise Refused naming the first file that is missing, changed or not listed, or that may be a pickle. `folder`: of
    the bundle, where no other files are looked at."""
    listed = card["files"].items()
    files = {name: digest for name, digest in listed if not folder or Path(name).is_relative_to(folder)}
    for name in files:
        if Path(name).suffix in PICKLES:
            raise Refused("bundle", f"{path}: {name} may be a pickle", "keep weights in safetensors")
    found = digests(path, folder)
    for name, digest in files.items():
        if name not in found:
            raise Refused("bundle", f"{path}: {name} is missing", "restore it, or train again")
        if found[name] != digest:
            raise Refused(
                "bundle", f"{path}: {name} was changed after the bundle was written", "restore it, or train again"
            )
    if extra := set(found) - set(files):
        raise Refused("bundle", f"{path}: {min(extra)} is not part of the bundle", "remove it")
    for name in _shards(path / folder):
        if name not in card["files"] or not name.endswith(".safetensors"):
            raise Refused("bundle", f"{path}: {INDEX} names {name}, which is none of its weights", "restore it")


def _shards(path: Path) -> set[str]:
    """The files that hold the weights of a bundle, where there are several."""
    if not (path / INDEX).is_file():
        return set()
    try:
        return {str(name) for name in json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused("bundle", f"{path}: {INDEX} is no index of weights", "restore it") from error


def digests(path: Path, folder: str = "") -> dict[str, str]:
    """SHA-256 of every file but the card, by relative name. `folder`: of those that are in it."""
    found = {}
    for file in sorted((path / folder).rglob("*")):
        if file.is_file() and file != path / CARD:
            with file.open("rb") as stream:
                found[str(file.relative_to(path))] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found
