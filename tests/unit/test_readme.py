"""Every command that README.md and docs/ show is one that would be accepted, and the example task loads."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from heliostat.recipe import Recipe, field_paths, override
from heliostat.tasks import get_task
from pipelines import doctor, keys, monitor, report, schedule, simulate
from pipelines.job import parse
from pipelines.recipes import BUILT_IN, find_recipe
from serve.openai.protocol import ChatRequest
from tests.kustomize import render

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
HEADS = ("make ", "python -m ", "ray ")
OWN_ARGUMENTS: dict[str, Any] = {each.__name__: each for each in (keys, monitor, report, schedule, simulate)}
"""Jobs without a recipe, which read their words themselves."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands() -> Iterator[tuple[str, str]]:
    """(page, command): the lines of shell blocks, and commands within a sentence."""
    for page in PAGES:
        for block in blocks(page, "sh"):
            yield from ((page.name, line) for line in block.replace("\\\n", " ").splitlines() if line.strip())
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        yield from ((page.name, span) for span in re.findall(r"`([^`\n]+)`", prose) if span.startswith(HEADS))


@pytest.fixture
def own_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder one is in after following docs/own_task.md."""
    (source,) = blocks(ROOT / "docs" / "own_task.md", "python")
    (tmp_path / "mine.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # which restores sys.path in the end
    yield tmp_path
    sys.modules.pop("mine", None)


def test_fields_that_pages_name_exist() -> None:
    sections = {path.partition(".")[0] for path in field_paths()}
    named = {
        span
        for page in PAGES
        for span in re.findall(r"`([a-z_]+\.[a-z_0-9.]+)`", page.read_text())
        if span.partition(".")[0] in sections
    }
    assert len(named) > 10
    assert named <= set(field_paths())


def check(words: list[str]) -> None:
    match words:
        case ["make", target, *variables]:
            makefile = (ROOT / "Makefile").read_text()
            assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), f"no {target}"
            for variable in variables:
                name, _, value = variable.partition("=")
                if (target, name) == ("llm", "LLM"):
                    assert f"{value}==" in (ROOT / "requirements-llm.txt").read_text()
                    continue
                assert (target, name) == ("run", "ARGS"), variable
                parse(["sentiment", *shlex.split(value)])
        case ["python", "-m", module, *arguments] if module.startswith("bench."):
            usage = subprocess.check_output([sys.executable, "-m", module, "--help"], cwd=ROOT, text=True)
            assert {word for word in arguments if word.startswith("--")} <= set(re.findall(r"--[a-z-]+", usage))
        case ["python", "-m", "pipelines.doctor", *arguments]:
            subjects, overrides = doctor.parse(arguments)
            for name, recipe in subjects.items():
                assert recipe or (ROOT / name).is_file()
                assert not recipe or override(recipe, overrides)
        case ["python", "-m", module, *arguments] if module in OWN_ARGUMENTS:
            assert OWN_ARGUMENTS[module].parse(arguments)
        case ["python", "-m", module, *arguments]:
            assert module.startswith("pipelines.")
            assert importlib.util.find_spec(module), f"no {module}"
            parse(arguments)
        case ["ray", "job", "submit", *rest]:
            options, job = rest[: rest.index("--")], rest[rest.index("--") + 1 :]
            assert options[::2] == ["--runtime-env", "--working-dir"]
            assert all((ROOT / name).exists() for name in options[1::2])
            check(job)
        case ["ray", "up" | "down", file]:
            assert (ROOT / file).is_file()
        case ["ray", command, *arguments]:
            from ray.scripts.scripts import cli

            assert command in cli.commands
            if arguments:  # a sentence may name the command alone
                cli.commands[command].make_context(command, arguments)  # raises for what it does not know
            assert all((ROOT / word).is_file() for word in arguments if word.endswith(".yaml"))
        case ["curl", "-s", address, "-H", "content-type: application/json", "-d", body]:
            url, asked = urlsplit(f"http://{address}"), json.loads(body)
            recipe = find_recipe(asked.get("model", "sentiment"))
            assert (url.hostname, url.port) == (recipe.deploy.host, recipe.deploy.port)
            if url.path == "/predict":
                get_task(recipe).parse(asked["inputs"])
            else:
                assert url.path == "/v1/chat/completions"
                ChatRequest.model_validate(asked)
        case ["curl", "-s", address, "-F", part]:
            url, settings = urlsplit(f"http://{address}"), find_recipe("digits").deploy
            assert (url.hostname, url.port, url.path) == (settings.host, settings.port, "/predict")
            assert re.fullmatch(r"image=@\w+\.png", part)
        case ["docker", "build", "-f", file, "-t", image, "."]:
            assert (ROOT / file).is_file()
            check(["docker", "push", image])
        case ["docker", "push", image]:
            (known,) = yaml.safe_load((KUBERNETES / "base" / "kustomization.yaml").read_text())["images"]
            assert image == f"{known['newName']}:{known['newTag']}"
        case ["kubectl", "apply", "-f", file]:
            assert list(yaml.safe_load_all((ROOT / file).read_text()))
        case ["kubectl", "apply", "-k", folder]:
            assert render(ROOT / folder)
        case ["kubectl", "-n", namespace, *rest]:
            assert ("Namespace", namespace) in {(kind, name) for kind, name, _ in deployed()}
            check_kubectl(rest)
        case ["export", *variables]:
            assert all(re.fullmatch(r"\w+=.+", variable) for variable in variables)
            for inner in re.findall(r"\$\((kubectl [^|)]*)", " ".join(variables)):
                check(shlex.split(inner))
        case _:
            pytest.fail(f"nothing here knows how to check: {shlex.join(words)}")


@cache
def deployed() -> list[tuple[str, str, str]]:
    """(kind, name, all of it, in JSON) of each object that an overlay of deploy/kubernetes has."""
    objects = [each for folder in (KUBERNETES / "overlays").iterdir() for each in render(folder)]
    return [(each["kind"], each["metadata"]["name"], json.dumps(each, sort_keys=True)) for each in objects]


def check_kubectl(words: list[str]) -> None:
    match words:
        case ["create", "secret", "generic", name, literal]:
            key = literal.removeprefix("--from-literal=").partition("=")[0]
            reference = json.dumps({"key": key, "name": name})
            by_ray = f'"secretName": "{name}"'  # which takes the key `auth_token`
            assert any(reference in text or (key == "auth_token" and by_ray in text) for _, _, text in deployed())
        case ["get", "secret", name, "-o", key]:
            assert key.startswith("jsonpath={.data.")
            check_kubectl(["create", "secret", "generic", name, f"--from-literal={key[len('jsonpath={.data.') : -1]}="])
        case ["get", kind, name]:
            assert (kind, name) in {(each.lower(), name) for each, name, _ in deployed()}
        case ["port-forward", service, ports]:
            kind, suffix, port = {
                "8265:8265": ("RayCluster", "head-svc", "dashboard"),
                "8000:8000": ("RayService", "serve-svc", "serve"),
            }[ports]
            ((name, text),) = [(name, text) for each, name, text in deployed() if each == kind]
            assert service == f"service/{name}-{suffix}"  # as KubeRay calls them
            assert json.dumps({"containerPort": int(ports[:4]), "name": port}) in text
        case _:
            pytest.fail(f"nothing here knows how to check: kubectl {shlex.join(words)}")


@pytest.mark.parametrize(("page", "command"), commands())
@pytest.mark.usefixtures("own_task")
def test_command(page: str, command: str) -> None:
    check(shlex.split(command, comments=True))


@pytest.mark.usefixtures("own_task")
def test_own_task() -> None:
    recipe = find_recipe("mine:recipe")
    assert isinstance(recipe, Recipe)
    task = get_task(recipe, {"labels": ["0", "1"]})
    assert type(task).__name__ == "Lowercase"
    task.check()
    assert task.parse([{"text": "LOUD"}]).column("text").to_pylist() == ["loud"]


def test_recipes_are_those_listed() -> None:
    """The README's list is the built-in one."""
    (listed,) = re.findall(r"^Recipes: `([^`]+)`", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert listed.split() == list(BUILT_IN)


@pytest.mark.parametrize(
    "command",
    [
        "make nothing",
        "python -m pipelines.trian sentiment",
        "python -m pipelines.train sentiment --lr 1",
        "git pull",
        "kubectl apply -k deploy/kubernetes/overlays/jobs",
        "kubectl -n default get rayjob train",
        "kubectl -n heliostat create secret generic heliostat-redis --from-literal=pasword=1",
        "docker push heliostat:latest",
    ],
)
def test_a_wrong_command_is_found(command: str) -> None:
    with pytest.raises((AssertionError, ValueError, OSError, pytest.fail.Exception)):
        check(command.split())


def test_no_command_is_overlooked() -> None:
    found = [command for _, command in commands()]
    assert {command.split()[0] for command in found} == {"make", "python", "ray", "curl", "docker", "kubectl", "export"}
