"""The doctor catches every broken file of the corpus at its line, in the right words, and leaves good ones alone."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from heliostat import card, installed
from heliostat.doctor import Problem, examine
from heliostat.doctor.machine import check_machine
from heliostat.hardware import Machine, gpu_memory_bytes
from heliostat.models.describe import configuration
from heliostat.recipe import override
from pipelines.doctor import main, parse, run
from pipelines.recipes import BUILT_IN, find_recipe

ROOT = Path(__file__).resolve().parents[2]
CORPUS = ROOT / "tests" / "data" / "doctor"
WRONG = re.compile(r"# wrong: (.*)$")
"""On a line of a broken YAML file: what the doctor says of it."""
CLUSTER = str(ROOT / "cluster.yaml")

# JSON has no comments: file → what its wrong line holds, field, and what is said of it.
RECIPES = {
    "recipe_unknown_field": ('"weigth_decay"', "optimizer.weigth_decay", "did you mean optimizer.weight_decay?"),
    "recipe_wrong_values": ('"lr"', "optimizer.lr", "greater than 0"),
    "recipe_workers": ('"parallelism"', "parallelism", "use workers=4"),
    "recipe_search": ('"optimizer.lrr"', "optimizer.lrr", "did you mean optimizer.lr?"),
    "recipe_no_task": ("{", "task", "required"),
    "recipe_newer": ('"version"', "version", "newer Heliostat"),
    "recipe_more_gpus_than_cluster": ('"workers"', "parallelism.workers", "has room for 32 at most"),
    "recipe_above_gpu_memory": ('"parallelism"', "parallelism", "--parallelism.fsdp 8"),
    "recipe_no_model": ('"name": "./no-such-model"', "model.name", "no config.json"),
    "recipe_port": ('"port"', "deploy.port", "head's --dashboard-port"),
    "recipe_not_json": ('"seed"', "", "is not JSON"),
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a token, a bundle, and one that was altered."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("not a secret")
    bundle = tmp_path / "heliostat" / "bundle"
    bundle.mkdir(parents=True)
    (bundle / "config.json").write_text("{}")
    (bundle / card.CARD).write_text(json.dumps({"version": card.BUNDLE_VERSION, "files": card.digests(bundle)}))
    shutil.copytree(bundle, bundle.with_name("altered"))
    (bundle.with_name("altered") / "config.json").write_text("{ }")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.chdir(ROOT)
    return tmp_path


def examined(*names: str, **overrides: Any) -> list[Problem]:
    subjects, _ = parse(list(names))
    return examine(subjects, configuration, overrides, ROOT).problems


def marks() -> Iterator[tuple[str, int, str]]:
    for file in sorted(CORPUS.glob("*.yaml")):
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if found := WRONG.search(line):
                yield file.name, number, found[1]


@pytest.mark.parametrize(("name", "line", "sentence"), marks())
def test_broken_file(name: str, line: int, sentence: str) -> None:
    """With cluster.yaml beside it a Serve config is not checked against the ports of this machine."""
    files = [CLUSTER, str(CORPUS / name)] if name.startswith("serve_") else [str(CORPUS / name)]
    (problem,) = examined(*files)
    assert problem.file == files[-1]
    assert problem.line == line
    assert sentence in f"{problem.field}: {problem.problem} ({problem.fix})"


def test_every_broken_file_says_what_is_wrong() -> None:
    assert {name for name, *_ in marks()} == {file.name for file in CORPUS.glob("*.yaml")}
    assert set(RECIPES) == {file.stem for file in CORPUS.glob("*.json")}


@pytest.mark.parametrize("name", RECIPES)
def test_broken_recipe(name: str) -> None:
    file = CORPUS / f"{name}.json"
    needle, field, sentence = RECIPES[name]
    problem = examined(CLUSTER, str(file))[0]
    assert problem.file == str(file)
    assert problem.field == field
    assert needle in file.read_text().splitlines()[(problem.line or 0) - 1]
    assert sentence in f"{problem.problem} ({problem.fix})"


def test_all_that_is_wrong_with_a_recipe_at_once() -> None:
    assert [each.field for each in examined(str(CORPUS / "recipe_wrong_values.json"))] == [
        "optimizer.lr",
        "training.precision",
    ]


@pytest.mark.parametrize("cluster", [CLUSTER, "cluster.gcp.yaml", "cluster.local.yaml"])
def test_good_files(home: Path, cluster: str) -> None:
    assert examined(cluster, *map(str, (ROOT / "serve").glob("*.yaml"))) == []


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_recipes(name: str) -> None:
    assert examined(name) == []
    assert examined(name, CLUSTER) == []


def test_what_a_recipe_was_saved_as_is_good(tmp_path: Path) -> None:
    find_recipe("tiny_lm").save(tmp_path / "recipe.json")
    assert examined(str(tmp_path / "recipe.json"), CLUSTER) == []


def test_the_proposed_layout_fits() -> None:
    file = str(CORPUS / "recipe_above_gpu_memory.json")
    (problem,) = examined(CLUSTER, file)
    flag, value = problem.fix.split()
    assert examined(CLUSTER, file, **{flag.removeprefix("--"): int(value)}) == []


def test_price() -> None:
    """Head alone, then eight of the largest beside it, by the table."""
    found = examine({CLUSTER: None}, configuration)
    assert found.usd_per_hour == {CLUSTER: {"idle": 0.4032, "most": pytest.approx(0.4032 + 8 * 4.6016)}}


def test_no_price_where_one_is_unknown(tmp_path: Path) -> None:
    for old, new in (("m7i.2xlarge", "m7i.metal"), ("us-west-2", "eu-central-1")):
        (tmp_path / "cluster.yaml").write_text((ROOT / "cluster.yaml").read_text().replace(old, new))
        assert examine({str(tmp_path / "cluster.yaml"): None}, configuration).usd_per_hour == {}


def test_port_that_is_taken_here(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        text = (ROOT / "serve" / "classifier.yaml").read_text().replace("port: 8000", f"port: {port}")
        (tmp_path / "serve.yaml").write_text(text)
        (problem,) = examined(str(tmp_path / "serve.yaml"))
        assert (problem.field, problem.line) == ("http_options.port", 5)
        assert f"127.0.0.1:{port} cannot be used" in problem.problem
    assert examined(str(tmp_path / "serve.yaml")) == []


def test_torch_without_cuda_beside_gpus() -> None:
    """The tests' own torch is of either kind; a machine with a GPU asks for CUDA."""
    import torch

    said = [each.field for each in check_machine(Machine(8, 32 << 30, gpus=1, bfloat16=True))]
    assert ("torch" in said) == (torch.version.cuda is None)


def test_memory_of_the_smallest_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 81559\necho 40960\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert gpu_memory_bytes() == 40960 << 20


def test_memory_of_this_machine() -> None:
    """A recipe that no worker's share of this machine could hold."""
    recipe = override(find_recipe("tiny_lm"), {"model.config": {"model_type": "llama", "hidden_size": 32768}})
    (problem,) = examine({"large": recipe}, configuration).problems
    assert problem.field == "parallelism"
    assert "a worker's share of this machine" in problem.problem


def test_a_file_that_is_not_there() -> None:
    (problem,) = examined("no-such.yaml")
    assert "cannot be read" in problem.problem


def test_an_engine_whose_package_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(["tiny_lm", "--deploy.engine", "llama_cpp"])["problems"] == []
    monkeypatch.setitem(installed.ENGINES, "llama_cpp", ("no-such-package",))
    (found,) = run(["tiny_lm", "--deploy.engine", "llama_cpp"])["problems"]
    assert (found["field"], found["fix"]) == ("deploy.engine", "install the extra `llm`")


def test_overrides() -> None:
    answer = run(["tiny_lm", CLUSTER, "--parallelism.workers", "64", "--parallelism.use-gpu", "True"])
    assert [each["field"] for each in answer["problems"]] == ["parallelism.workers"]
    answer = run(["tiny_lm", "--parallelism.worker=64"])
    assert answer["problems"][0]["fix"] == "did you mean parallelism.workers?"


def test_answer(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["tiny_lm", CLUSTER]) == 0
    good = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert (good["job"], good["status"], good["problems"]) == ("doctor", "done", [])
    assert main([str(CORPUS / "twice.yaml")]) == 2
    out, err = capfd.readouterr()
    (line,) = out.splitlines()
    (problem,) = json.loads(line)["problems"]
    assert set(problem) == {"file", "line", "field", "problem", "fix"}
    assert "a second time" in re.sub(r"\s+", " ", err.replace("│", " "))
    assert main(["sentimant"]) == 2
    assert json.loads(capfd.readouterr().out)["suggestion"] == "did you mean sentiment?"


def spent_s() -> float:
    """By the processes that have ended: what else runs on the machine does not count."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_it_answers_at_once_and_loads_nothing_heavy() -> None:
    """All of it in one process: a cluster, a Serve config, a recipe with a model, and this machine."""
    code = (
        "import sys; from pipelines.doctor import main; "
        f"main([{CLUSTER!r}, 'serve/classifier.yaml', 'tiny_lm', 'sentiment']); main([]); "
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    begun = spent_s()
    env = os.environ | {"PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert spent_s() - begun < 2
    loaded = set(done.stdout.splitlines()[-1].split())
    assert loaded & {"ray", "torch", "transformers", "tyro", "mlflow", "pandas", "numpy"} == set()
