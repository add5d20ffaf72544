"""The figures that a benchmark prints mean what it says of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from bench.gpu_throughput import PRESETS, block_weights, flops_per_token, layers_that_fit, main
from bench.turns import compared, in_turn
from heliostat.recipe import Refused


def config_of(name: str) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(**PRESETS[name].config)


def test_flops_are_those_that_pytorch_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--preset", "tiny", "--steps", "1", "--no-compile"]) == 0
    answer = json.loads(capsys.readouterr().out)
    preset = PRESETS["tiny"]
    # Attention as plain matrix products, which are counted as they are.
    model = transformers.LlamaForCausalLM._from_config(config_of("tiny"), attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        ids_BT = torch.zeros(preset.rows, preset.sequence_length, dtype=torch.int64)
        model(input_ids=ids_BT).logits.sum().backward()
    assert answer["flops_per_token"] * ids_BT.numel() == counter.get_total_flops()
    assert answer["parameters"] == model.num_parameters()
    assert answer["layers"] == 2
    assert answer["tokens_per_s"] > 0


def test_published_mfu_is_that_of_published_throughput() -> None:
    """Two laboratories' figures agree with our count of FLOPs on an H100: whole attention, head, no embedding."""
    config = config_of("llama3-8b")
    for other in PRESETS["llama3-8b"].published:
        mfu = other.tokens_per_s * flops_per_token(config, 8192) / 989e12
        assert mfu == pytest.approx(other.mfu, abs=0.01)
    # MPT's block has two matrices of 4 × its width instead of Llama's three, and as many key as query heads.
    (mpt,) = PRESETS["llama-1b"].published
    shape = {"hidden_size": 2048, "num_attention_heads": 16, "num_hidden_layers": 24, "vocab_size": 50432}
    config = transformers.LlamaConfig(**shape, intermediate_size=8 * 2048 // 3, num_key_value_heads=16, head_dim=128)
    assert mpt.tokens_per_s * flops_per_token(config, 2048) / 989e12 == pytest.approx(mpt.mfu, abs=0.01)


def test_layers_that_fit() -> None:
    preset, config = PRESETS["llama3-8b"], config_of("llama3-8b")
    layers = layers_that_fit(preset, 80 * 10**9)
    # Weights, gradients and Adam's moments alone, in float32.
    states = 16 * (layers * block_weights(config) + 2 * config.vocab_size * config.hidden_size)
    assert 1 < layers < 32
    assert states < 80 * 10**9
    assert layers_that_fit(preset, 10**12) == 32
    with pytest.raises(Refused, match="one layer does not fit"):
        layers_that_fit(preset, 8 * 10**9)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--preset", "llama3-8b"]) == 2
    assert "needs a GPU" in capsys.readouterr().err


def test_steps_are_made_in_turn_and_each_is_timed_for_itself() -> None:
    made: list[tuple[str, int]] = []

    def loop(name: str, cpu_s: float) -> Callable[[Callable[[], None]], None]:
        def steps(begin: Callable[[], None]) -> None:
            for step in range(12):
                begin()
                made.append((name, step))
                end = time.process_time() + cpu_s
                while time.process_time() < end:
                    pass

        return steps

    seconds = in_turn({"long": loop("long", 0.03), "short": loop("short", 0.01)})
    assert made == [(name, step) for step in range(12) for name in ("long", "short")]
    assert [len(values) for values in seconds.values()] == [8, 8]
    assert min(seconds["long"]) >= 0.03
    found = compared(seconds, "long", "short")
    assert found["median"] == pytest.approx(3, rel=0.2)
    assert found["added_ms"] == pytest.approx(20, rel=0.2)


def test_the_first_of_several_steps_a_turn_is_not_counted() -> None:
    made: list[str] = []

    def loop(name: str) -> Callable[[Callable[[], None]], None]:
        def steps(begin: Callable[[], None]) -> None:
            for step in range(15):
                begin()
                made.append(name)
                end = time.process_time() + (0.05 if step % 3 == 0 else 0.01)
                while time.process_time() < end:
                    pass

        return steps

    seconds = in_turn({"one": loop("one"), "other": loop("other")}, steps=3)
    assert made == 5 * [*3 * ["one"], *3 * ["other"]]
    assert [len(values) for values in seconds.values()] == [1, 1]
    assert seconds["one"] == pytest.approx([0.01], rel=0.2)


def test_a_loop_that_fails_keeps_nobody_waiting() -> None:
    def fails(begin: Callable[[], None]) -> None:
        begin()
        raise ValueError("no more")

    def goes_on(begin: Callable[[], None]) -> None:
        for _ in range(5):
            begin()

    with pytest.raises(ValueError, match="no more"):
        in_turn({"fails": fails, "goes on": goes_on})
