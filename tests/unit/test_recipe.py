"""The recipe: what it accepts, what it refuses, and in which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from heliostat.recipe import RECIPE_VERSION, Recipe, Refused, build, load, override

BASE: dict[str, Any] = {"name": "r", "task": "text_classification"}


def refused(tree: dict[str, Any]) -> Refused:
    with pytest.raises(Refused) as caught:
        build(BASE | tree)
    return caught.value


def test_json_round_trip(tmp_path: Path) -> None:
    recipe = build(
        BASE
        | {
            "seed": 7,
            "model": {"config": {"model_type": "bert", "hidden_size": 32}, "dropout": 0.2},
            "optimizer": {"lr": 3e-4, "clip_norm": None},
            "parallelism": {"workers": 4, "fsdp": 2},
            "tune": {
                "space": {
                    "optimizer.lr": {"kind": "log_uniform", "low": 1e-5, "high": 1e-3},
                    "model.dropout": {"kind": "choice", "values": [0.0, 0.1]},
                    "seed": {"kind": "int", "low": 0, "high": 9},
                }
            },
        }
    )
    recipe.save(tmp_path / "recipe.json")
    loaded = load(tmp_path / "recipe.json")
    assert loaded == recipe
    assert loaded.digest() == recipe.digest()
    stored = json.loads((tmp_path / "recipe.json").read_text())
    assert stored["optimizer"]["lr"] == 3e-4
    assert stored["tune"]["space"]["model.dropout"]["values"] == [0.0, 0.1]
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.json"]


def test_digest_covers_the_named_sections_only() -> None:
    one = build(BASE)
    other = override(one, {"optimizer.lr": 1.0})
    assert one.digest("data", "model") == other.digest("data", "model")
    assert one.digest("optimizer") != other.digest("optimizer")
    assert one.digest() != other.digest()


@pytest.mark.parametrize(
    ("tree", "field", "suggestion"),
    [
        ({"optimizer": {"learning_rat": 1}}, "optimizer.learning_rat", ""),
        ({"optimizer": {"weight_decy": 1}}, "optimizer.weight_decy", "did you mean optimizer.weight_decay?"),
        (
            {"training": {"global_batchsize": 8}},
            "training.global_batchsize",
            "did you mean training.global_batch_size?",
        ),
        ({"sed": 8}, "sed", "did you mean seed?"),
    ],
)
def test_unknown_field_names_it_and_the_nearest(tree: dict[str, Any], field: str, suggestion: str) -> None:
    error = refused(tree)
    assert error.field == field
    if suggestion:
        assert error.suggestion == suggestion


@pytest.mark.parametrize(
    ("tree", "field"),
    [
        ({"optimizer": {"lr": "fast"}}, "optimizer.lr"),
        ({"optimizer": {"lr": -1e-3}}, "optimizer.lr"),
        ({"optimizer": {"lr": float("nan")}}, "optimizer.lr"),
        ({"training": {"micro_batch_size": 0}}, "training.micro_batch_size"),
        ({"training": {"micro_batch_size": 1.5}}, "training.micro_batch_size"),
        ({"training": {"precision": "float8"}}, "training.precision"),
        ({"model": {"dropout": 1.0}}, "model.dropout"),
        ({"data": ["a"]}, "data"),
        ({"seed": -1}, "seed"),
    ],
)
def test_wrong_value_names_the_field(tree: dict[str, Any], field: str) -> None:
    error = refused(tree)
    assert error.field == field
    assert error.reason


def test_missing_field_is_named() -> None:
    with pytest.raises(Refused) as caught:
        build({"name": "r"})
    assert caught.value.field == "task"


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", ""])
def test_name_must_be_a_folder_name(name: str) -> None:
    assert "folder" in str(refused({"name": name}))


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "uniform", "low": 1.0, "high": 1.0},
        {"kind": "log_uniform", "low": 1e-2, "high": 1e-3},
        {"kind": "int", "low": 3, "high": 2},
    ],
)
def test_empty_search_range(spec: dict[str, Any]) -> None:
    error = refused({"tune": {"space": {"optimizer.lr": spec}}})
    assert error.field == "tune"
    assert "optimizer.lr is empty" in error.reason


def test_search_over_an_unknown_field() -> None:
    error = refused({"tune": {"space": {"optimizer.lrr": {"kind": "uniform", "low": 1e-4, "high": 1e-3}}}})
    assert error.field == "optimizer.lrr"
    assert error.suggestion == "did you mean optimizer.lr?"


def test_search_range_that_reaches_values_the_field_refuses() -> None:
    error = refused({"tune": {"space": {"model.dropout": {"kind": "uniform", "low": 0.0, "high": 2.0}}}})
    assert error.field == "model.dropout"


@pytest.mark.parametrize("axes", [(3, 2, 1, 1, 1), (6, 2, 1, 2, 1), (2, 1, 1, 1, 4), (6, 1, 4, 1, 1)])
def test_workers_must_be_a_multiple(axes: tuple[int, ...]) -> None:
    parallelism = dict(zip(("workers", "fsdp", "context", "tensor", "pipeline"), axes, strict=True))
    error = refused({"parallelism": parallelism})
    assert error.field == "parallelism"
    proposed = int(str(error).split("use workers=")[1].split(")")[0].split(",")[0])
    build(BASE | {"training": {"global_batch_size": 64}, "parallelism": parallelism | {"workers": proposed}})


def test_fewer_micro_batches_than_stages() -> None:
    tree = {"parallelism": {"workers": 4, "pipeline": 4}, "training": {"global_batch_size": 8, "micro_batch_size": 4}}
    assert refused(tree).field == "training.global_batch_size"
    build(BASE | tree | {"training": {"global_batch_size": 16, "micro_batch_size": 4}})


def test_micro_batches_that_interleaved_rounds_cannot_share() -> None:
    parallelism = {"workers": 4, "pipeline": 2, "schedule": "interleaved"}

    def tree(rows: int, schedule: str = "interleaved") -> dict[str, Any]:
        training = {"global_batch_size": rows, "micro_batch_size": 2}
        return {"parallelism": parallelism | {"schedule": schedule}, "training": training}

    error = refused(tree(20))
    assert error.field == "training.global_batch_size"
    assert "5 micro-batches" in error.reason
    assert "2 rounds" in error.reason
    assert error.suggestion == "use 16 or 24"
    for rows in (8, 12, 16, 24):  # two, three (one round of all), four, six
        build(BASE | tree(rows))
    build(BASE | tree(20, "zbv"))


def test_zbv_does_not_go_with_compile() -> None:
    parallelism = {"workers": 2, "pipeline": 2, "schedule": "zbv"}
    tree = {"parallelism": parallelism, "training": {"global_batch_size": 64, "compile": True}}
    assert refused(tree).field == "training.compile"
    build(BASE | tree | {"parallelism": parallelism | {"schedule": "interleaved"}})


def test_override_by_dotted_path() -> None:
    recipe = build(BASE)
    changed = override(recipe, {"optimizer.lr": 5e-4, "data.train": "x.csv", "seed": 3})
    assert (changed.optimizer.lr, changed.data.train, changed.seed) == (5e-4, "x.csv", 3)
    assert recipe.optimizer.lr == Recipe(**BASE).optimizer.lr != 5e-4
    assert override(changed, {"optimizer.lr": recipe.optimizer.lr, "data.train": "", "seed": 0}) == recipe


@pytest.mark.parametrize(
    ("path", "suggestion"),
    [
        ("optimizer.rl", "did you mean optimizer.lr?"),
        ("lr", "did you mean optimizer.lr?"),
        ("optimizer", None),
    ],
)
def test_override_of_an_unknown_path(path: str, suggestion: str | None) -> None:
    with pytest.raises(Refused) as caught:
        override(build(BASE), {path: 1})
    assert caught.value.field == path
    if suggestion:
        assert caught.value.suggestion == suggestion


def test_override_is_validated() -> None:
    with pytest.raises(Refused) as caught:
        override(build(BASE), {"schedule.epochs": 0})
    assert caught.value.field == "schedule.epochs"


@pytest.mark.parametrize(
    ("text", "field"),
    [
        (json.dumps(BASE | {"version": RECIPE_VERSION + 1}), "version"),
        (json.dumps(BASE | {"version": "next"}), "version"),
        ("{", "recipe"),
        ("[]", "recipe"),
    ],
)
def test_unreadable_files(text: str, field: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(Refused) as caught:
        load(tmp_path / "recipe.json")
    assert caught.value.field == field


def test_newer_version_says_so(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(BASE | {"version": 2, "field_of_the_future": 1}))
    with pytest.raises(Refused, match="newer Heliostat"):
        load(tmp_path / "recipe.json")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="cannot read"):
        load(tmp_path / "absent.json")
