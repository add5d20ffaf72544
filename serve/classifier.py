"""One Ray Serve deployment for any task: HTTP in front of a bundle.

`deploy` starts it from Python, and swaps another bundle into running replicas, which go on answering.
`serve deploy serve/classifier.yaml` starts it through `build`.
"""

# Annotations are not postponed here: replicas get the class by value, and FastAPI reads its annotations
# there, where a name in a string would find nothing.
import asyncio
import hashlib
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import metrics
from ray.serve.context import _get_global_client

import heliostat
from heliostat.models import bundle as bundles
from heliostat.predictor import Predictor
from heliostat.recipe import Deploy, Refused, nearest

Input = dict[str, Any]
LATENCIES_S = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0]
BATCH_SIZES = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0]
"""Upper bounds of what histograms count."""


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Question(Body):
    inputs: Annotated[
        Input | Annotated[list[Input], Field(min_length=1)],
        Field(examples=[[{"text": "a short text"}, {"text": "another"}]]),
    ]
    """One input or several, as the task defines them: `{"text": "…"}`, or `{"image": "…"}` in base64."""


class Answer(Body):
    predictions: Annotated[
        list[dict[str, Any]],
        Field(examples=[[{"label": "bright", "score": 0.9, "scores": {"bright": 0.9, "dark": 0.1}}]]),
    ]
    """One for each input, in their order. Classifiers: `label`, `score` and the `scores` of all labels."""
    bundle: str
    """The first 12 digits of the digest of the bundle that made all of them."""
    version: str


class Health(Body):
    status: str
    bundle: str
    version: str


class Problem(Body):
    detail: str
    """What is wrong, as `field: reason`."""


class BodyLimit:
    """Stops reading a request's body once it is longer than `max_body_bytes`: 413."""

    def __init__(self, app: Any, max_body_bytes: int) -> None:
        self.app, self.max_body_bytes = app, max_body_bytes

    async def __call__(self, scope: dict[str, Any], receive: Callable[[], Any], send: Any) -> None:
        read = 0

        async def counted() -> dict[str, Any]:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.max_body_bytes:
                raise HTTPException(413, f"body: more than {self.max_body_bytes} bytes")
            return message

        await self.app(scope, counted, send)


class Measured:
    """What Ray exports to Prometheus of the requests of one path, each name with `ray_` before it. It is made in the
    replica, with the first request."""

    def __init__(self, app: Any, path: str) -> None:
        self.app, self.path = app, path
        self.requests = metrics.Counter(
            "heliostat_serve_requests", "Requests by outcome: answered, refused (4xx), failed", ("outcome",)
        )
        self.latency = metrics.Histogram("heliostat_serve_latency_s", "Of requests that were answered", LATENCIES_S)

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Callable[[Any], Any]) -> None:
        if scope["type"] != "http" or not scope["path"].endswith(self.path):
            await self.app(scope, receive, send)
            return
        begun, status = time.perf_counter(), 500  # which an exception becomes

        async def noted(message: dict[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            outcome = "answered" if status < 400 else "refused" if status < 500 else "failed"
            self.requests.inc(1, {"outcome": outcome})
            if outcome == "answered":
                self.latency.observe(time.perf_counter() - begun)


async def _refused(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, 422)


async def _malformed(request: Request, error: Exception) -> JSONResponse:
    """Pydantic's first complaint in words, in the form of every other refusal."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    field = next((part for part in first["loc"][1:] if isinstance(part, str)), "body")
    reason = first["msg"]
    if field == "inputs" and first["type"] != "missing":
        reason = "one input as an object, or a list of at least one"
    return JSONResponse({"detail": f"{field}: {reason}"}, 422)


def _api(settings: Deploy) -> FastAPI:
    api = FastAPI(title="Heliostat", version=heliostat.__version__)
    api.add_middleware(BodyLimit, max_body_bytes=settings.max_body_bytes)
    api.add_middleware(Measured, path="/predict")  # around the other
    api.add_exception_handler(Refused, _refused)
    api.add_exception_handler(RequestValidationError, _malformed)
    return api


def _load(path: Path, threads: int | None = None) -> Predictor:
    """A predictor that has answered its task's example. Raises Refused for a bundle that is not whole."""
    predictor = Predictor(bundles.read(path, verify_files=False), threads=threads)  # which verifies them
    predictor.predict([predictor.task.example()])
    return predictor


def _classifier(settings: Deploy) -> type:
    """The class is made here because routes and batching take their limits when they are declared."""
    api = _api(settings)

    @serve.ingress(api)
    class Classifier:
        def __init__(self) -> None:
            self.predictor: Predictor | None = None
            self.version = ""
            self.ongoing = 0
            self.queue = metrics.Gauge("heliostat_serve_queue", "Requests that a replica has begun and not answered")
            self.batch_size = metrics.Histogram("heliostat_serve_batch_size", "Inputs of a forward pass", BATCH_SIZES)
            # One: models and tokenizers are not for sharing, and a second would only contend for processors.
            self.thread = ThreadPoolExecutor(1, "predict")

        async def reconfigure(self, config: dict[str, str]) -> None:
            """Serve calls this before a replica is ready, and again for another bundle: the old one answers
            until the new one has. Serve stops a replica that raises here."""
            predictor = await asyncio.to_thread(_load, Path(config["bundle"]), settings.threads_per_replica)
            self.predictor, self.version = predictor, config["version"]

        async def _in_thread(self, function: Callable[[Any], Any], argument: Any) -> Any:
            return await asyncio.get_running_loop().run_in_executor(self.thread, function, argument)

        @api.post("/predict", responses={413: {"model": Problem}, 422: {"model": Problem}})
        async def predict(self, question: Question) -> Answer:
            """Predict for one input or several."""
            inputs = question.inputs if isinstance(question.inputs, list) else [question.inputs]
            if len(inputs) > settings.max_inputs:
                reason = f"{len(inputs)} are more than the {settings.max_inputs} of one request"
                raise HTTPException(413, f"inputs: {reason}")
            # Taken once: all of a request's answers come from one bundle, whatever is swapped meanwhile.
            predictor, version = self.predictor, self.version
            assert predictor is not None
            self.ongoing += 1
            self.queue.set(self.ongoing)
            try:
                predictions = await self._answers(predictor, inputs)
            finally:
                self.ongoing -= 1
                self.queue.set(self.ongoing)
            return Answer(predictions=predictions, bundle=predictor.bundle.digest[:12], version=version)

        async def _answers(self, predictor: Predictor, inputs: list[Input]) -> list[dict[str, Any]]:
            if self.ongoing == 1 and len(inputs) <= settings.max_batch_size:
                # Alone: no wait for others to share a batch.
                predictions: list[dict[str, Any]] = await self._in_thread(predictor.predict, inputs)
                self.batch_size.observe(len(inputs))
                return predictions
            # Prepared before they are batched: a refusal names the input by its place in its own request, and
            # touches no other request.
            table = await self._in_thread(predictor.rows, inputs)
            return await asyncio.gather(*(self.predict_row((predictor, table.slice(i, 1))) for i in range(len(inputs))))

        @serve.batch(max_batch_size=settings.max_batch_size, batch_wait_timeout_s=settings.batch_wait_s)
        async def predict_row(self, rows: list[tuple[Predictor, pa.Table]]) -> list[dict[str, Any]]:
            predictions: list[dict[str, Any]] = [{}] * len(rows)
            for predictor in {id(each): each for each, _ in rows}.values():  # two while a bundle is swapped
                places = [i for i, (each, _) in enumerate(rows) if each is predictor]
                table = pa.concat_tables([rows[i][1] for i in places])
                found = await self._in_thread(predictor.predict_rows, table)
                self.batch_size.observe(len(places))
                for i, prediction in zip(places, found, strict=True):
                    predictions[i] = prediction
            return predictions

        @api.get("/healthz")
        async def healthz(self) -> Health:
            """Answers once the model has."""
            assert self.predictor is not None
            return Health(status="ok", bundle=self.predictor.bundle.digest[:12], version=self.version)

    return Classifier


def application(bundle_path: Path, version: str, settings: Deploy) -> serve.Application:
    """The deployment with a bundle, not yet running. `version`: what answers call it. Raises Refused for a
    bundle that is not whole."""
    _load(bundle_path)  # it must answer here first: Serve would stop every replica that cannot load it
    code = f"{heliostat.__version__} {settings.model_dump_json()}"
    deployment = serve.deployment(name="classifier")(_classifier(settings)).options(
        # Serve takes any two calls for different code, and restarts the replicas; where the version is the
        # same it only swaps the bundle. It offers this to itself alone.
        version=hashlib.sha256(code.encode()).hexdigest()[:12],
        _internal=True,
    )
    return deployment.options(
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": settings.target_ongoing_requests,
        },
        max_ongoing_requests=settings.max_ongoing_requests,
        max_queued_requests=settings.max_queued_requests,
        max_surge_percent=100,  # other settings do restart replicas: the new ones first
        ray_actor_options={"num_cpus": settings.cpus_per_replica},
        user_config={"bundle": str(bundle_path.absolute()), "version": version},
    ).bind()


def build(args: dict[str, Any]) -> serve.Application:
    """For `serve deploy`: `bundle`, a path that every node sees, and `version`. The settings are those of the
    bundle's recipe. Raises Refused for other arguments."""
    for name in args:
        if name not in ("bundle", "version"):
            raise Refused(f"args.{name}", "no such argument", nearest(name, ["bundle", "version"]))
    if "bundle" not in args:
        raise Refused("args.bundle", "no bundle is named", "name the folder that training wrote")
    path = Path(args["bundle"]).expanduser()
    settings = bundles.read(path, verify_files=False).recipe.deploy
    return application(path, str(args.get("version", "")), settings)


def deploy(bundle_path: Path, version: str, deploy: Deploy, name: str) -> str:
    """Serve a bundle on the cluster that Ray is connected to; returns the endpoint's URL once it answers.

    Where Serve runs already, the application of that name is brought up to date. Raises Refused for a bundle
    that is not whole, and for a port that something else holds."""
    app = application(bundle_path, version, deploy)
    # Serve has no public way to ask which port it has.
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        _check_port(deploy.host, deploy.port)
        serve.start(http_options={"host": deploy.host, "port": deploy.port})
    elif client.http_config.port != deploy.port:
        raise Refused(
            "deploy.port",
            f"Serve runs on port {client.http_config.port} of this cluster, not on {deploy.port}",
            "use that port, or stop it with `serve shutdown`",
        )
    serve.run(app, name=name, route_prefix="/", blocking=False)
    host = "127.0.0.1" if deploy.host == "0.0.0.0" else deploy.host
    return f"http://{host}:{deploy.port}"


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that are closing do no harm
        try:
            probe.bind((host, port))
        except OSError as error:
            raise Refused(
                "deploy.port",
                f"{host}:{port} cannot be used: {error.strerror}",
                "stop what listens there, or choose another port",
            ) from error
