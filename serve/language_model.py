"""A causal language model behind OpenAI's protocol, adapters of it beside it: `/v1/models`, `/v1/completions`,
`/v1/chat/completions`; and `/predict` and `/healthz`, as every deployment has them.

`serve deploy serve/language_model.yaml` starts it through `build`.
"""

# Annotations are not postponed here: replicas get the class by value, and FastAPI reads its annotations
# there, where a name in a string would find nothing.
import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.serve import metrics
from transformers import AutoConfig

from heliostat import installed
from heliostat.generate import Engine, vllm
from heliostat.generate.embedded import EmbeddedEngine
from heliostat.models import bundle as bundles
from heliostat.models.adapters import FOLDER, Adapter, check_base, read_adapter
from heliostat.predictor import Predictor
from heliostat.recipe import Deploy, Refused
from serve.application import (
    LATENCIES_S,
    Forwarded,
    Health,
    Question,
    answering,
    arguments,
    http,
    inputs_of,
    page,
    scaled,
)
from serve.application import Answer as Predictions
from serve.forms import OPENAPI
from serve.gate import SPEND
from serve.openai.answer import Answer, sampling_defaults
from serve.openai.chat import ChatAnswer
from serve.openai.completion import CompletionAnswer
from serve.openai.protocol import (
    HANDLED,
    ChatRequest,
    CompletionRequest,
    Generation,
    model_card,
    no_such_model,
    problem_response,
)
from serve.scaling import QUEUED_TOKENS, WAITED_S, ByTokens


@dataclass(frozen=True)
class Served:
    """What a model's name means: an engine, and what answers call the bundle."""

    engine: Engine
    fingerprint: str


class Loaded:
    """A bundle that answers; as a context, a request that it is busy with."""

    def __init__(self, name: str, config: dict[str, Any], settings: Deploy) -> None:
        """`config`: as Serve gives it to `reconfigure`. `name`: what clients call the model."""
        alone: dict[str, dict[str, float]] = {
            "vllm": {"gpus_per_replica": 0.0},  # on its GPU: `/predict` does without
            # OpenMP's threads hardly wait for each other where a process has more of them than there are processors,
            # and those of torch count even while they rest.
            "llama_cpp": {"threads_per_replica": 1},
        }
        self.predictor = answering(Path(config["bundle"]), settings.model_copy(update=alone.get(settings.engine)))
        self.defaults = sampling_defaults(self.predictor.model, settings.sampling)
        self.version, self.ongoing, self.retired = config["version"], 0, False
        found = {each: bundles.read(Path(path), verify_files=False) for each, (path, _) in config["adapters"].items()}
        for bundle in found.values():
            bundles.verify(bundle, FOLDER)  # what else is in it, the merged weights first of all, is not read
        adapters = {each: read_adapter(bundle.path, f"deploy.adapters.{each}") for each, bundle in found.items()}
        self.engine = _engine(self.predictor, settings, adapters)
        self.models = {name: Served(self.engine, self.digest)}
        for each, bundle in found.items():
            assert isinstance(self.engine, EmbeddedEngine)
            self.models[f"{name}:{each}"] = Served(self.engine.adapted(each), bundle.digest[:12])

    @property
    def digest(self) -> str:
        return self.predictor.bundle.digest[:12]

    def __enter__(self) -> "Loaded":
        self.ongoing += 1
        return self

    def __exit__(self, *error: object) -> None:
        self.ongoing -= 1
        self._close_if_done()

    def retire(self) -> None:
        """What it has begun is done; then its engine ends."""
        self.retired = True
        self._close_if_done()

    def _close_if_done(self) -> None:
        if self.retired and not self.ongoing:
            asyncio.get_running_loop().run_in_executor(None, self.engine.close)


def _engine(predictor: Predictor, settings: Deploy, adapters: dict[str, Adapter]) -> Engine:
    model, tokenizer = predictor.model, predictor.processor
    tokens, threads = settings.cache_tokens, settings.threads_per_replica
    if settings.engine == "embedded":
        if settings.precision == "bfloat16":  # reading weights is most of what a token costs
            model.to(torch.bfloat16)
        return EmbeddedEngine(model, tokenizer, cache_tokens=tokens, threads=threads, adapters=adapters)
    if settings.engine == "vllm":
        assert settings.precision != "int8"  # refused before
        return vllm.VllmEngine(
            installed.llm_environment(settings),
            predictor.bundle.path,
            model,
            tokenizer,
            cache_tokens=tokens,
            precision=settings.precision,
            on_gpu=settings.gpus_per_replica > 0,
            threads=threads,
        )
    # Its packages are an extra.
    from heliostat.generate.llama_cpp import LlamaCppEngine, converted

    dtype = settings.gguf_dtype
    file = converted(predictor.bundle.digest, model, tokenizer, dtype, threads)
    return LlamaCppEngine(file, dtype, model, tokenizer, cache_tokens=tokens, threads=threads)


def _check_engine(path: Path, settings: Deploy) -> None:
    """Raises Refused for a bundle that the engine cannot serve: here, before a replica tries."""
    installed.check_engine(settings)
    if settings.engine == "embedded":
        return
    if settings.adapters:
        raise Refused("deploy.adapters", f"{settings.engine} has none", "use deploy.engine=embedded")
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if settings.engine == "vllm":
        vllm.check_model(config, settings.gpus_per_replica > 0)
        return
    from heliostat.generate import gguf_file

    if settings.gpus_per_replica:
        raise Refused("deploy.gpus_per_replica", "llama_cpp computes on processors", gguf_file.INSTEAD)
    if settings.precision != "float32":
        raise Refused("deploy.precision", "llama_cpp's is deploy.gguf_dtype", "leave it out")
    gguf_file.check(config)


def _check_adapters(path: Path, settings: Deploy) -> dict[str, list[str]]:
    """The path and the digest of each one's bundle. Raises Refused for one that cannot be served beside the bundle at
    `path`."""
    found = {}
    for name, given in settings.adapters.items():
        adapted = bundles.read(Path(given).expanduser().absolute())
        check_base(path, adapted.path, f"deploy.adapters.{name}")
        found[name] = [str(adapted.path), adapted.digest]
    return found


def _api(settings: Deploy) -> FastAPI:
    api = http(settings, ("/predict", "/v1/completions", "/v1/chat/completions"))
    for kind in HANDLED:
        api.add_exception_handler(kind, problem_response)
    return api


def _language_model(settings: Deploy, name: str) -> type:
    """The class is made here because routes take their limits when they are declared. `name`: of the model."""
    api = _api(settings)

    @serve.ingress(api)
    class LanguageModel(Forwarded):
        def __init__(self) -> None:
            self.loaded: Loaded | None = None
            self.answers: set[Answer] = set()
            self.tokens = metrics.Counter("heliostat_serve_tokens", "By kind: of prompts, of completions", ("kind",))
            self.first_token = metrics.Histogram(
                "heliostat_serve_first_token_s", "From a request to the first token of its answer", LATENCIES_S
            )

        async def reconfigure(self, config: dict[str, Any]) -> None:
            """Serve calls this before a replica is ready, and again for another bundle: the old one answers until the
            new one can, and ends what it has begun."""
            loaded = await asyncio.to_thread(Loaded, name, config, settings)
            before, self.loaded = self.loaded, loaded
            if before is not None:
                before.retire()

        async def record_autoscaling_stats(self) -> dict[str, float]:
            """What `ByTokens` hears."""
            waiting = [answer for answer in self.answers if answer.first_token_s is None]
            return {
                QUEUED_TOKENS: sum(answer.usage()["prompt_tokens"] for answer in waiting),
                WAITED_S: max((time.perf_counter() - answer.begun for answer in waiting), default=0.0),
            }

        def check_health(self) -> None:
            """Serve replaces a replica where this raises."""
            if self.loaded is not None:
                self.loaded.engine.check()

        @api.get("/", include_in_schema=False)
        async def try_it(self) -> Response:
            assert self.loaded is not None
            return page("chat" if self.loaded.engine.tokenizer.chat_template else "completion", name)

        @api.get("/v1/models")
        async def models(self) -> dict[str, Any]:
            assert self.loaded is not None
            return {"object": "list", "data": [await self.model(each) for each in self.loaded.models]}

        @api.get("/v1/models/{model:path}")
        async def model(self, model: str) -> dict[str, Any]:
            return model_card(model, self._model(model)[1].engine.max_length)

        @api.post("/v1/completions")
        async def completions(self, request: CompletionRequest, sent: Request) -> Response:
            return await self._answer(CompletionAnswer, request, sent)

        @api.post("/v1/chat/completions")
        async def chat(self, request: ChatRequest, sent: Request) -> Response:
            return await self._answer(ChatAnswer, request, sent)

        def _model(self, asked: str) -> tuple[Loaded, Served]:
            assert self.loaded is not None
            if asked not in self.loaded.models:
                raise no_such_model(asked, self.loaded.models)
            return self.loaded, self.loaded.models[asked]

        async def _answer(self, kind: type[Answer], request: Generation, sent: Request) -> Response:
            with contextlib.ExitStack() as busy:
                loaded, served = self._model(request.model)
                busy.enter_context(loaded)
                # Templates and grammars take a while: beside the streams that go on.
                answer = await asyncio.to_thread(kind, served.engine, request, served.fingerprint, loaded.defaults)
                self.answers.add(answer)
                busy.callback(self._count, answer, sent.scope.get(SPEND))
                if not request.stream:
                    return JSONResponse(await answer.whole())
                events = self._events(busy.pop_all(), answer)
                return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})

        def _count(self, answer: Answer, spend: Callable[[int], None] | None) -> None:
            """Once it has ended, or was given up. An answer of which nothing was drawn has no time."""
            self.answers.discard(answer)
            usage = answer.usage()
            if spend is not None:
                spend(usage["total_tokens"])
            for kind in ("prompt", "completion"):
                if tokens := usage[f"{kind}_tokens"]:
                    self.tokens.inc(tokens, {"kind": kind})
            if answer.first_token_s is not None:
                self.first_token.observe(answer.first_token_s)

        async def _events(self, busy: contextlib.ExitStack, answer: Answer) -> AsyncIterator[str]:
            with busy:
                async with contextlib.aclosing(answer.events(settings.stream_interval_s)) as events:
                    async for event in events:
                        yield event

        @api.post("/predict", openapi_extra=OPENAPI)
        async def predict(self, question: Question) -> Predictions:
            """How well the model expects each text."""
            assert self.loaded is not None
            with self.loaded as loaded:
                found = await asyncio.to_thread(loaded.predictor.predict, inputs_of(question, settings))
                return Predictions(predictions=found, bundle=loaded.digest, version=loaded.version)

        @api.get("/healthz")
        async def healthz(self) -> Health:
            """Answers once the model has."""
            assert self.loaded is not None
            loaded = self.loaded
            loaded.engine.check()
            precision = settings.gguf_dtype if settings.engine == "llama_cpp" else settings.precision
            return Health(
                status="ok",
                bundle=loaded.digest,
                version=loaded.version,
                precision=precision,
                ongoing=loaded.ongoing,
            )

    return LanguageModel


def application(bundle_path: Path, version: str, settings: Deploy) -> serve.Application:
    """The deployment with a bundle, not yet running. `version`: what answers call it. Clients name the model as the
    bundle's recipe is named. Raises Refused for a bundle that is not whole, or that the engine cannot serve."""
    bundle = bundles.read(bundle_path)
    _check_engine(bundle_path, settings)
    kind = _language_model(settings, bundle.recipe.name)
    policy = {
        "policy_function": f"{ByTokens.__module__}:{ByTokens.__name__}",
        "policy_kwargs": {
            "ongoing_requests": settings.target_ongoing_requests,
            "queued_tokens": settings.target_queued_tokens,
            "first_token_s": settings.target_first_token_s,
        },
    }
    adapters = _check_adapters(bundle_path, settings)
    return scaled(kind, "language_model", bundle_path, version, settings, policy, adapters=adapters)


def build(args: dict[str, Any]) -> serve.Application:
    """For `serve deploy`: see `arguments`."""
    return application(*arguments(args))
