"""Versions of models in a real SQLite store, and through a server."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from heliostat import registry, tracking
from heliostat.hardware import free_port
from heliostat.models import bundle as bundles
from heliostat.models.bundle import Bundle
from heliostat.recipe import Recipe, Refused, override
from heliostat.train.loop import train
from tests.recipes import prepared, tiny_bert


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return tiny_bert(tmp_path_factory.mktemp("registry"), **{"schedule.max_steps": 2})


def train_bundle(recipe: Recipe, name: str) -> Bundle:
    outcome = train(recipe, prepared(recipe).folder, recipe.storage_path / "runs" / name)
    return bundles.read(Path(outcome["bundle"]))


@pytest.fixture(scope="module")
def first(recipe: Recipe) -> Bundle:
    return train_bundle(recipe, "first")


@pytest.fixture(scope="module")
def second(recipe: Recipe) -> Bundle:
    return train_bundle(override(recipe, {"seed": 1}), "second")


def named(recipe: Recipe, name: str) -> Recipe:
    """Another registered model in the module's one store (making its tables takes seconds)."""
    return override(recipe, {"name": name})


def test_a_version_outlives_its_run(recipe: Recipe, first: Bundle, tmp_path: Path) -> None:
    recipe = named(recipe, "outlives")
    copy = Bundle(tmp_path / "bundle", first.card)
    shutil.copytree(first.path, copy.path)
    version = registry.register(recipe, copy, None, {"gate": "passed"})
    assert (version.name, version.version) == ("outlives", 1)
    assert version.path == recipe.storage_path / "registry" / "outlives" / first.digest[:12]
    assert version.metrics == first.card["metrics"]
    assert version.tags == {"gate": "passed", "promoted": "false", registry.DIGEST_TAG: first.digest}
    with tracking.client(recipe) as mlflow:
        assert mlflow.get_model_version("outlives", "1").source == str(version.path)
    shutil.rmtree(copy.path)
    assert bundles.read(registry.get(recipe, 1).path).digest == first.digest
    assert [path.name for path in version.path.parent.iterdir() if path.is_dir()] == [first.digest[:12]]


def test_the_same_files_are_one_version(recipe: Recipe, first: Bundle, second: Bundle) -> None:
    recipe, other = named(recipe, "same"), named(recipe, "same-elsewhere")
    version = registry.register(recipe, first, None)
    assert registry.register(recipe, first, None, {"again": "yes"}) == version
    assert registry.register(recipe, second, None).version == 2
    assert registry.register(other, first, None).version == 1
    # The copy is made again where it was lost.
    shutil.rmtree(version.path)
    with pytest.raises(Refused, match="is not at"):
        registry.get(recipe, 1)
    assert registry.register(recipe, first, None) == version
    assert bundles.read(version.path).digest == first.digest


def test_promotion(recipe: Recipe, first: Bundle, second: Bundle) -> None:
    recipe = named(recipe, "promotion")
    assert registry.champion(recipe) is None
    one = registry.register(recipe, first, None)
    assert registry.champion(recipe) is None
    assert registry.promote(recipe, one).tags["promoted"] == "true"
    two = registry.register(recipe, second, None)
    champion = registry.champion(recipe)
    assert champion is not None
    assert champion.version == 1
    assert registry.get(recipe, 2).tags["promoted"] == "false"
    registry.promote(recipe, two.version)
    assert registry.champion(recipe) == registry.get(recipe, "champion") == registry.get(recipe, "2")
    assert registry.get(recipe, "champion").version == 2


def test_what_does_not_exist_is_refused(recipe: Recipe, first: Bundle) -> None:
    recipe = named(recipe, "refused")
    with pytest.raises(Refused, match="no version of refused is registered"):
        registry.get(recipe, "champion")
    registry.register(recipe, first, None)
    with pytest.raises(Refused, match=r"no alias 'champion' \(there are: 1\)"):
        registry.get(recipe, "champion")
    registry.promote(recipe, 1)
    with pytest.raises(Refused, match=r"no version '7' \(there are: 1, champion\)"):
        registry.get(recipe, 7)
    with pytest.raises(Refused, match="no version '7'"):
        registry.promote(recipe, 7)


def test_a_changed_bundle_is_refused(recipe: Recipe, first: Bundle, tmp_path: Path) -> None:
    recipe = named(recipe, "changed")
    copy = Bundle(tmp_path / "bundle", first.card)
    shutil.copytree(first.path, copy.path)
    with (copy.path / "config.json").open("a") as stream:
        stream.write(" ")
    with pytest.raises(Refused, match=r"config\.json was changed"):
        registry.register(recipe, copy, None)
    assert [path for path in (recipe.storage_path / "registry" / "changed").iterdir() if path.is_dir()] == []
    with pytest.raises(Refused, match="no version of changed"):
        registry.get(recipe, 1)


def test_through_a_server(recipe: Recipe, first: Bundle, second: Bundle, tmp_path: Path) -> None:
    port = free_port()
    # Servers refuse places with links in them.
    link = tmp_path / "link"
    link.symlink_to(recipe.storage_path)
    remote = override(
        named(recipe, "remote"),
        {
            "tracking.uri": f"http://127.0.0.1:{port}",
            "storage": str(link),
        },
    )
    with pytest.raises(tracking.Away, match="does not answer"):
        registry.register(remote, first, None)
    server = tracking.start_server(remote, port)
    try:
        run_id = tracking.log_run(remote, first.path.parent, metrics={})
        version = registry.register(remote, first, run_id)
        assert version.version == 1
        assert registry.register(remote, first, run_id) == version
        assert registry.register(remote, second, None).version == 2
        registry.promote(remote, 1)
        assert registry.get(remote, "champion").path == link / "registry" / "remote" / first.digest[:12]
        with tracking.client(remote) as mlflow:
            assert mlflow.get_model_version("remote", "1").run_id == run_id
    finally:
        tracking.stop_server(server)
    # The same store without the server.
    assert registry.get(named(recipe, "remote"), "champion").version == 1
