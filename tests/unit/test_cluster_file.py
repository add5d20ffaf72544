"""cluster.yaml and its siblings against Ray's own schema and validation."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[2]


FILES = ["cluster.yaml", "cluster.gcp.yaml", "cluster.local.yaml"]
SHARED = [
    "cluster_name", "file_mounts", "rsync_exclude", "setup_commands", "head_start_ray_commands",
    "worker_start_ray_commands",
]  # fmt: skip
"""What every cluster has, whoever owns its machines."""


def read(file: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / file).read_text())


@pytest.fixture(scope="module")
def schema() -> dict[str, object]:
    import ray.autoscaler

    return json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())


@pytest.mark.parametrize("file", FILES)
def test_cluster_file_is_valid(schema: dict[str, object], file: str) -> None:
    jsonschema.validate(read(file), schema)
    # Machines that are there have no types: Ray makes one of them all.
    config = prepare_config(read(file))
    validate_config(config)
    assert config["head_node_type"] in config["available_node_types"]
    for name in ("requirements.lock", "requirements-data.lock"):
        assert any(name in command for command in config["setup_commands"])
        assert (ROOT / name).is_file()


@pytest.mark.parametrize("file", FILES[1:])
def test_siblings_share_what_can_be_shared(file: str) -> None:
    first, sibling = read(FILES[0]), read(file)
    if file == "cluster.local.yaml":
        for role, extra in (
            ("head", "RAY_enable_autoscaler_v2=0 AUTOSCALER_NODE_START_WAIT_S=2592000 "),
            ("worker", " || true"),
        ):
            commands = sibling[f"{role}_start_ray_commands"]
            commands[-1] = commands[-1].replace(extra, "")
    assert {key: sibling[key] for key in SHARED} == {key: first[key] for key in SHARED}
    own = {"provider", "auth", "head_setup_commands"}
    if "available_node_types" in sibling:
        assert {key: value for key, value in sibling.items() if key not in own} == sibling_of(first, sibling)


def sibling_of(first: dict[str, Any], sibling: dict[str, Any]) -> dict[str, Any]:
    """The first file, as it would be with the sibling's kinds of machines."""
    types = {
        name: body | {"node_config": sibling["available_node_types"][name]["node_config"]}
        for name, body in first["available_node_types"].items()
    }
    return {key: value for key, value in first.items() if key not in ("provider", "auth")} | {
        "available_node_types": types
    }


def test_the_shell_finds_the_environment(tmp_path: Path) -> None:
    """The last setup command, twice as when a node starts again: `python`, `ray` and the token's mode in a shell."""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "ray").touch(mode=0o755)
    command = read("cluster.yaml")["setup_commands"][-1]
    for _ in range(2):
        subprocess.run(["bash", "-c", command], env={"HOME": str(tmp_path)}, check=True)
    assert len((tmp_path / ".bashrc").read_text().splitlines()) == 1
    asked = "source ~/.bashrc; command -v ray; echo $RAY_AUTH_MODE"
    said = subprocess.run(
        ["bash", "-c", asked], env={"HOME": str(tmp_path)}, check=True, capture_output=True, text=True
    )
    assert said.stdout.split() == [str(tmp_path / "venv" / "bin" / "ray"), "token"]


def test_a_mistake_is_caught(schema: dict[str, object]) -> None:
    config = read("cluster.yaml")
    config["max_workerz"] = 3
    with pytest.raises(jsonschema.ValidationError, match="max_workerz"):
        jsonschema.validate(config, schema)
