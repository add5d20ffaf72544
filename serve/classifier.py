"""One Ray Serve deployment for any task: HTTP in front of a bundle. Another bundle is swapped into running replicas,
which go on answering.

`serve deploy serve/classifier.yaml` starts it through `build`.
"""

# Annotations are not postponed here: replicas get the class by value, and FastAPI reads its annotations
# there, where a name in a string would find nothing.
import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from ray import serve
from ray.serve import metrics

from heliostat.monitor.served import Sampler
from heliostat.predictor import Predictor
from heliostat.recipe import Deploy, Refused
from serve.application import (
    Answer,
    Body,
    Forwarded,
    Health,
    Input,
    Question,
    answering,
    arguments,
    check_served,
    http,
    inputs_of,
    page,
    scaled,
)
from serve.forms import OPENAPI

Rows = Callable[[], pa.Table]
"""Makes prepared rows of what was asked."""
BATCH_SIZES = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0]
"""Upper bounds of what a histogram counts."""


class Problem(Body):
    detail: str
    """What is wrong, as `field: reason`."""


async def refused(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, 422)


async def malformed(request: Request, error: Exception) -> JSONResponse:
    """Pydantic's first complaint in words, in the form of every other refusal."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    field = next((part for part in first["loc"][1:] if isinstance(part, str)), "body")
    reason = first["msg"]
    if field == "inputs" and first["type"] != "missing":
        reason = "one input as an object, or a list of at least one"
    return JSONResponse({"detail": f"{field}: {reason}"}, 422)


def predicting(api: FastAPI, settings: Deploy) -> type:
    """What answers for any task, to be the ingress of `api`, or the base of what answers more. The class is made here
    because routes and batching take their limits when they are declared."""

    class Predicting(Forwarded):
        def __init__(self) -> None:
            self.predictor: Predictor | None = None
            self.version = ""
            self.ongoing = 0
            self.queue = metrics.Gauge("heliostat_serve_queue", "Requests that a replica has begun and not answered")
            self.batch_size = metrics.Histogram("heliostat_serve_batch_size", "Inputs of a forward pass", BATCH_SIZES)
            # One: models and tokenizers are not for sharing, and a second would only contend for processors.
            self.thread = ThreadPoolExecutor(1, "predict")
            self.samples = metrics.Counter("heliostat_serve_samples", "Inputs kept for `drift`, dropped", ("outcome",))
            self.sampler: Sampler | None = None
            if settings.sample_share:
                self.sampler = Sampler(settings, lambda outcome, rows: self.samples.inc(rows, {"outcome": outcome}))

        async def __del__(self) -> None:
            """Serve calls and awaits this when it stops a replica."""
            if self.sampler is not None:
                await asyncio.to_thread(self.sampler.close)

        async def reconfigure(self, config: dict[str, str]) -> None:
            """Serve calls this before a replica is ready, and again for another bundle: the old one answers
            until the new one has. Serve stops a replica that raises here."""
            predictor = await asyncio.to_thread(answering, Path(config["bundle"]), settings)
            self.predictor, self.version = predictor, config["version"]

        async def in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
            return await asyncio.get_running_loop().run_in_executor(self.thread, function, *arguments)

        @api.post("/predict", responses={413: {"model": Problem}, 422: {"model": Problem}}, openapi_extra=OPENAPI)
        async def predict(self, question: Question) -> Answer:
            """Predict for one input or several."""
            inputs = inputs_of(question, settings)
            # Taken once: all of a request's answers come from one bundle, whatever is swapped meanwhile.
            predictor, version = self.predictor, self.version
            assert predictor is not None
            predictions = await self.answers(predictor, partial(predictor.rows, inputs), len(inputs))
            if self.sampler is not None:
                self.sampler.offer(predictor.bundle, version, inputs, predictions)
            return Answer(predictions=predictions, bundle=predictor.bundle.digest[:12], version=version)

        async def answers(self, predictor: Predictor, rows: Rows, count: int) -> list[dict[str, Any]]:
            """One for each of the `count` rows, in their order."""
            self.ongoing += 1
            self.queue.set(self.ongoing)
            try:
                return await self._answers(predictor, rows, count)
            finally:
                self.ongoing -= 1
                self.queue.set(self.ongoing)

        async def _answers(self, predictor: Predictor, rows: Rows, count: int) -> list[dict[str, Any]]:
            if self.ongoing == 1 and count <= settings.max_batch_size:
                # Alone: no wait for others to share a batch.
                predictions: list[dict[str, Any]] = await self.in_thread(lambda: predictor.predict_rows(rows()))
                self.batch_size.observe(count)
                return predictions
            # Prepared before they are batched: a refusal names the input by its place in its own request, and
            # touches no other request.
            table = await self.in_thread(rows)
            return await asyncio.gather(*(self.predict_row((predictor, table.slice(i, 1))) for i in range(count)))

        @serve.batch(max_batch_size=settings.max_batch_size, batch_wait_timeout_s=settings.batch_wait_s)
        async def predict_row(self, rows: list[tuple[Predictor, pa.Table]]) -> list[dict[str, Any]]:
            predictions: list[dict[str, Any]] = [{}] * len(rows)
            for predictor in {id(each): each for each, _ in rows}.values():  # two while a bundle is swapped
                places = [i for i, (each, _) in enumerate(rows) if each is predictor]
                table = pa.concat_tables([rows[i][1] for i in places])
                found = await self.in_thread(predictor.predict_rows, table)
                self.batch_size.observe(len(places))
                for i, prediction in zip(places, found, strict=True):
                    predictions[i] = prediction
            return predictions

        @api.get("/", include_in_schema=False)
        async def try_it(self) -> HTMLResponse:
            assert self.predictor is not None
            example, name = self.predictor.task.example(), self.predictor.bundle.recipe.name
            return page(self.page_kind(example), name, example)

        def page_kind(self, example: Input) -> Any:
            """Of the page to try the task on, by what it is asked."""
            return next(iter(example)) if set(example) in ({"text"}, {"image"}) else "row"

        @api.get("/healthz")
        async def healthz(self) -> Health:
            """Answers once the model has."""
            assert self.predictor is not None
            digest = self.predictor.bundle.digest[:12]
            version, precision = self.version, settings.precision
            return Health(status="ok", bundle=digest, version=version, precision=precision, ongoing=self.ongoing)

    return Predicting


def application(bundle_path: Path, version: str, settings: Deploy) -> serve.Application:
    """The deployment with a bundle, not yet running. `version`: what answers call it. Raises Refused for a
    bundle that is not whole."""
    answering(bundle_path)  # it must answer here first: Serve would stop every replica that cannot load it
    check_served(bundle_path, settings)
    api = http(settings, ("/predict",))
    api.add_exception_handler(Refused, refused)
    api.add_exception_handler(RequestValidationError, malformed)
    kind = serve.ingress(api)(predicting(api, settings))
    return scaled(kind, "classifier", bundle_path, version, settings)


def build(args: dict[str, Any]) -> serve.Application:
    """For `serve deploy`: see `arguments`."""
    return application(*arguments(args))
