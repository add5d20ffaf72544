"""Adapters side by side in one engine against peft, which serves each by itself; and whether one fits its base."""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from heliostat.generate import Sampling, Token
from heliostat.generate.embedded import PAGE_TOKENS, EmbeddedEngine
from heliostat.models.adapters import FOLDER, Adapter, attach, begin, check_base, read_adapter
from heliostat.recipe import Refused
from tests.generation import GREEDY, answer, generated, model_of, prompts, tiny_tokenizer

RED, BLUE = "red", "blue"
TARGETS = {"llama": {RED: ["q_proj", "v_proj", "down_proj"], BLUE: ["q_proj", "o_proj"]},
           "gpt2": {RED: ["c_attn", "c_fc"], BLUE: ["c_proj"]},
           "mixtral": {RED: ["k_proj"], BLUE: ["o_proj"]}}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def adapted(model: Any, family: str, name: str) -> Any:
    """peft's own, with factors that matter."""
    config = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=TARGETS[family][name], fan_in_fan_out=family == "gpt2", lora_dropout=0.5
    )
    found = peft.get_peft_model(model, config)
    torch.manual_seed(len(name))
    for parameter_name, parameter in found.named_parameters():
        if "lora_" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.3)
    return found.eval()


def bundle_with(folder: Path, family: str, name: str, tokenizer: Any) -> Path:
    """The merged model, with its adapter beside it."""
    found = adapted(model_of(family, tokenizer), family, name)
    found.save_pretrained(folder / FOLDER)
    found.merge_and_unload().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", TARGETS)
def test_answers_of_all_at_once_are_those_of_each_alone(family: str, tokenizer: Any, tmp_path: Path) -> None:
    """Prompts are longer than a page: what one adapter has kept of a prompt is of no use to another."""
    model = model_of(family, tokenizer)
    asked = [[*range(1, PAGE_TOKENS + 8), *prompt] for prompt in prompts(5, 30, len(tokenizer))]
    adapters = {
        name: read_adapter(bundle_with(tmp_path / name, family, name, tokenizer), "field") for name in (RED, BLUE)
    }

    async def ask() -> tuple[dict[str, list[list[Token]]], dict[str, list[Token]]]:
        engine = EmbeddedEngine(model, tokenizer, cache_tokens=8192, threads=1, adapters=adapters)
        models = {"": engine} | {name: engine.adapted(name) for name in adapters}
        try:
            for each in models.values():  # alone first: what they keep is there when the others come
                await answer(each, asked[0], GREEDY)
            drawn = await asyncio.gather(*(answer(each, text, GREEDY) for text in asked for each in models.values()))
            scored = {name: await each.score(asked[0], 3) for name, each in models.items()}
            return {name: drawn[i :: len(models)] for i, name in enumerate(models)}, scored
        finally:
            await asyncio.to_thread(engine.close)

    together, scored = asyncio.run(ask())
    expected = {}
    for name in together:
        theirs = model_of(family, tokenizer) if not name else adapted(model_of(family, tokenizer), family, name)
        expected[name] = [generated(theirs, prompt, GREEDY.max_tokens) for prompt in asked]
        with torch.no_grad():
            logprobs_TV = theirs(torch.tensor([asked[0]])).logits[0].log_softmax(-1)
        found = [token.logprob for token in scored[name][1:]]
        wanted = [float(logprobs_TV[i, token]) for i, token in enumerate(asked[0][1:])]
        assert found == pytest.approx(wanted, abs=1e-4), name
    assert {name: [[token.id for token in one] for one in drawn] for name, drawn in together.items()} == expected
    assert expected[""] != expected[RED] != expected[BLUE] != expected[""]


def test_tokens_of_any_adapters_in_one_pass() -> None:
    """Against each token's own sum of weights, for all sets of adapters. Their ranks, scales and modules differ."""
    torch.manual_seed(0)
    sizes = {"0": (5, 7), "1": (7, 6)}
    model = torch.nn.Sequential(*(torch.nn.Linear(k, n, bias=False) for k, n in sizes.values())).double()
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in sizes}

    def factors(rank: int, k: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(rank, k).double(), torch.randn(n, rank).double()

    adapters = [
        Adapter({name: factors(rank, *sizes[name]) for name in names}, 0.3 * rank, transposed=False)
        for rank, names in enumerate(["01", "1", "0", "01"], start=1)
    ]
    attach(model, adapters)
    sets = [each for size in range(5) for each in itertools.permutations([None, *adapters], size + 1)]
    for chosen in sets:
        spans = [(adapter, 1 + i) for i, adapter in enumerate(chosen)]
        x_TK = torch.randn(sum(length for _, length in spans), 5).double()
        begin(spans)
        with torch.inference_mode():
            found = model(x_TK)
        begin([])
        expected = []
        for (adapter, _), x in zip(spans, x_TK.split([length for _, length in spans]), strict=True):
            for name, weight in weights.items():
                x = x @ (weight + adapter.delta(name) if adapter and name in adapter.factors else weight).T
            expected.append(x)
        torch.testing.assert_close(found, torch.cat(expected))


def test_a_model_that_was_given_adapters_is_itself_elsewhere(tokenizer: Any, tmp_path: Path) -> None:
    """As `/predict` uses it, also while answers are drawn."""
    model, ids = model_of("llama", tokenizer), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = model(ids).logits
    adapter = read_adapter(bundle_with(tmp_path / RED, "llama", RED, tokenizer), "field")

    async def ask() -> torch.Tensor:
        engine = EmbeddedEngine(model, tokenizer, cache_tokens=1024, threads=1, adapters={RED: adapter})
        try:
            sampling = Sampling(200, temperature=0, ignore_end=True)
            task = asyncio.create_task(answer(engine.adapted(RED), [1, 2], sampling))
            await asyncio.sleep(0.05)
            with torch.no_grad():
                found = model(ids).logits
            assert len(await task) == 200
            return found
        finally:
            await asyncio.to_thread(engine.close)

    assert torch.equal(asyncio.run(ask()), before)


@pytest.fixture
def base(tokenizer: Any, tmp_path: Path) -> Path:
    model_of("llama", tokenizer).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("family", TARGETS)
def test_what_was_trained_on_a_base_fits_it(family: str, tokenizer: Any, tmp_path: Path) -> None:
    model_of(family, tokenizer).save_pretrained(tmp_path / "base")
    for name in (RED, BLUE):
        check_base(tmp_path / "base", bundle_with(tmp_path / name, family, name, tokenizer), "field")


def test_what_was_trained_on_another_base_is_refused(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    """By a weight that adapters leave alone, by one that they change, by the architecture's fields."""
    path = bundle_with(tmp_path / RED, "llama", RED, tokenizer)
    for name, parameter in (("k_proj", "self_attn.k_proj.weight"), ("q_proj", "self_attn.q_proj.weight")):
        other = model_of("llama", tokenizer)
        with torch.no_grad():
            other.get_parameter(f"model.layers.1.{parameter}")[0, 0] += 0.01
        other.save_pretrained(tmp_path / name)
        with pytest.raises(Refused, match=rf"trained on other weights than .*{name}\.weight") as caught:
            check_base(tmp_path / name, path, "deploy.adapters.red")
        assert caught.value.field == "deploy.adapters.red"
    model_of("llama", tokenizer, rms_norm_eps=1e-3).save_pretrained(tmp_path / "eps")
    with pytest.raises(Refused, match="another configuration"):
        check_base(tmp_path / "eps", path, "field")


def test_what_is_more_than_an_adapter_is_refused(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="was not trained with an adapter"):
        check_base(base, base, "field")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    peft.get_peft_model(model_of("llama", tokenizer), config).save_pretrained(tmp_path / "more" / FOLDER)
    with pytest.raises(Refused, match="also trained lm_head"):
        read_adapter(tmp_path / "more", "field")
    # What is scaled otherwise does not give the merged weights.
    path = bundle_with(tmp_path / RED, "llama", RED, tokenizer)
    file = path / FOLDER / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 8}))
    with pytest.raises(Refused, match="other weights"):
        check_base(base, path, "field")
