"""An encoder of texts behind OpenAI's protocol: `/v1/models`, `/v1/embeddings`; and all that `serve/classifier.py` has.

`serve deploy serve/embeddings.yaml` starts it through `build`.
"""

# Annotations are not postponed here: replicas get the class by value, and FastAPI reads its annotations
# there, where a name in a string would find nothing.
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from ray import serve
from ray.serve import metrics
from starlette.exceptions import HTTPException

from heliostat.models import bundle as bundles
from heliostat.recipe import Deploy, Refused
from heliostat.tasks.text_embedding import rows_of
from serve.application import Input, answering, arguments, http, scaled
from serve.classifier import malformed, predicting, refused
from serve.gate import SPEND, path_of
from serve.openai.embedding import tokens_of, whole
from serve.openai.protocol import HANDLED, EmbeddingRequest, model_card, no_such_model, problem_response


async def _problem(request: Request, error: Exception) -> Response:
    """In the form of the protocol that the path belongs to."""
    if path_of(request.scope).startswith("/v1/"):
        return await problem_response(request, error)
    match error:
        case Refused():
            return await refused(request, error)
        case RequestValidationError():
            return await malformed(request, error)
        case HTTPException():
            return await http_exception_handler(request, error)
    return JSONResponse({"detail": "the server failed; its log says why"}, 500)


def _embeddings(settings: Deploy, name: str) -> type:
    """`name`: of the model."""
    api: FastAPI = http(settings, ("/predict", "/v1/embeddings"))
    for kind in HANDLED:
        api.add_exception_handler(kind, _problem)
    base: Any = predicting(api, settings)

    @serve.ingress(api)
    class Embeddings(base):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = metrics.Counter("heliostat_serve_tokens", "By kind: of prompts, of completions", ("kind",))

        def page_kind(self, example: Input) -> Any:
            return "texts"

        @api.get("/v1/models")
        async def models(self) -> dict[str, Any]:
            return {"object": "list", "data": [await self.model(name)]}

        @api.get("/v1/models/{model:path}")
        async def model(self, model: str) -> dict[str, Any]:
            if model != name:
                raise no_such_model(model, [name])
            return model_card(name, self.predictor.bundle.recipe.model.max_length)

        @api.post("/v1/embeddings")
        async def embeddings(self, request: EmbeddingRequest, sent: Request) -> JSONResponse:
            if request.model != name:
                raise no_such_model(request.model, [name])
            predictor = self.predictor  # taken once, whatever is swapped meanwhile
            ids = await self.in_thread(tokens_of, request, predictor, settings.max_inputs)
            found = await self.answers(predictor, partial(rows_of, ids), len(ids))
            num_tokens = sum(map(len, ids))
            self.tokens.inc(num_tokens, {"kind": "prompt"})
            if (spend := sent.scope.get(SPEND)) is not None:
                spend(num_tokens)
            return JSONResponse(whole(request, [each["embedding"] for each in found], num_tokens))

    return Embeddings


def application(bundle_path: Path, version: str, settings: Deploy) -> serve.Application:
    """The deployment with a bundle, not yet running. `version`: what answers call it. Clients name the model as the
    bundle's recipe is named. Raises Refused for a bundle that is not whole."""
    answering(bundle_path)  # as in serve/classifier.py
    name = bundles.read(bundle_path, verify_files=False).recipe.name
    return scaled(_embeddings(settings, name), "embeddings", bundle_path, version, settings)


def build(args: dict[str, Any]) -> serve.Application:
    """For `serve deploy`: see `arguments`."""
    return application(*arguments(args))
