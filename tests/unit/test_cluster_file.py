"""cluster.yaml against Ray's own schema and validation."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def schema() -> dict[str, object]:
    import ray.autoscaler

    return json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())


def test_cluster_file_is_valid(schema: dict[str, object]) -> None:
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    jsonschema.validate(config, schema)
    assert config["head_node_type"] in config["available_node_types"]
    for name in ("requirements.lock", "requirements-data.lock"):
        assert any(name in command for command in config["setup_commands"])
        assert (ROOT / name).is_file()


def test_a_mistake_is_caught(schema: dict[str, object]) -> None:
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    config["max_workerz"] = 3
    with pytest.raises(jsonschema.ValidationError, match="max_workerz"):
        jsonschema.validate(config, schema)
