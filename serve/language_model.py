"""A causal language model behind OpenAI's protocol: `/v1/models`, `/v1/completions`, `/v1/chat/completions`; and
`/predict` and `/healthz`, as every deployment has them.

`serve deploy serve/language_model.yaml` starts it through `build`.
"""

# Annotations are not postponed here: replicas get the class by value, and FastAPI reads its annotations
# there, where a name in a string would find nothing.
import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.serve import metrics
from transformers import AutoConfig

from heliostat import installed
from heliostat.generate import Engine
from heliostat.generate.embedded import EmbeddedEngine
from heliostat.models import bundle as bundles
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
from serve.gate import SPEND
from serve.openai.answer import Answer
from serve.openai.chat import ChatAnswer
from serve.openai.completion import CompletionAnswer
from serve.openai.protocol import HANDLED, ChatRequest, CompletionRequest, Generation, Problem, problem_response
from serve.scaling import QUEUED_TOKENS, WAITED_S, ByTokens


class Loaded:
    """A bundle that answers; as a context, a request that it is busy with."""

    def __init__(self, path: Path, version: str, settings: Deploy) -> None:
        self.predictor = answering(path, settings)
        self.version, self.ongoing, self.retired = version, 0, False
        self.engine = _engine(self.predictor, settings)

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


def _engine(predictor: Predictor, settings: Deploy) -> Engine:
    model, tokenizer = predictor.model, predictor.processor
    tokens, threads = settings.cache_tokens, settings.threads_per_replica
    if settings.engine == "embedded":
        if settings.precision == "bfloat16":  # reading weights is most of what a token costs
            model.to(torch.bfloat16)
        return EmbeddedEngine(model, tokenizer, cache_tokens=tokens, threads=threads)
    # Its packages are an extra.
    from heliostat.generate.llama_cpp import LlamaCppEngine, converted

    dtype = settings.gguf_dtype
    file = converted(predictor.bundle.digest, model, tokenizer, dtype, threads)
    return LlamaCppEngine(file, dtype, model, tokenizer, cache_tokens=tokens, threads=threads)


def _check_engine(path: Path, settings: Deploy) -> None:
    """Raises Refused for a bundle that the engine cannot serve: here, before a replica tries."""
    installed.check_engine(settings.engine)
    if settings.engine == "embedded":
        return
    from heliostat.generate import gguf_file

    if settings.gpus_per_replica:
        raise Refused("deploy.gpus_per_replica", "llama_cpp computes on processors", gguf_file.INSTEAD)
    if settings.precision != "float32":
        raise Refused("deploy.precision", "llama_cpp's is deploy.gguf_dtype", "leave it out")
    gguf_file.check(AutoConfig.from_pretrained(path, trust_remote_code=False))


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

        async def reconfigure(self, config: dict[str, str]) -> None:
            """Serve calls this before a replica is ready, and again for another bundle: the old one answers until the
            new one can, and ends what it has begun."""
            loaded = await asyncio.to_thread(Loaded, Path(config["bundle"]), config["version"], settings)
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
            return {"object": "list", "data": [await self.model(name)]}

        @api.get("/v1/models/{model:path}")
        async def model(self, model: str) -> dict[str, Any]:
            length = self._model(model).engine.max_length
            return {"id": name, "object": "model", "created": 0, "owned_by": "heliostat", "max_model_len": length}

        @api.post("/v1/completions")
        async def completions(self, request: CompletionRequest, sent: Request) -> Response:
            return await self._answer(CompletionAnswer, request, sent)

        @api.post("/v1/chat/completions")
        async def chat(self, request: ChatRequest, sent: Request) -> Response:
            return await self._answer(ChatAnswer, request, sent)

        def _model(self, asked: str) -> Loaded:
            assert self.loaded is not None
            if asked != name:
                raise Problem(404, f"The model `{asked}` does not exist; there is `{name}`", "model", "model_not_found")
            return self.loaded

        async def _answer(self, kind: type[Answer], request: Generation, sent: Request) -> Response:
            with contextlib.ExitStack() as busy:
                loaded = busy.enter_context(self._model(request.model))
                # Templates and grammars take a while: beside the streams that go on.
                answer = await asyncio.to_thread(kind, loaded.engine, request, loaded.digest)
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
                async with contextlib.aclosing(answer.events()) as events:
                    async for event in events:
                        yield event

        @api.post("/predict")
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
            return Health(status="ok", bundle=loaded.digest, version=loaded.version, ongoing=loaded.ongoing)

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
    return scaled(kind, "language_model", bundle_path, version, settings, policy)


def build(args: dict[str, Any]) -> serve.Application:
    """For `serve deploy`: see `arguments`."""
    return application(*arguments(args))
