"""What all deployments share: their limits and replicas, the questions that any task answers, and how they start."""

# Annotations are not postponed here: replicas get some of the classes by value, and FastAPI reads its annotations
# there, where a name in a string would find nothing.
import asyncio
import hashlib
import ipaddress
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import ray
import torch
from fastapi import FastAPI, HTTPException
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayTaskError
from ray.serve import metrics
from ray.serve.config import BackpressureConfig
from ray.serve.context import _get_global_client
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import heliostat
from heliostat.hardware import cannot_listen
from heliostat.models import bundle as bundles
from heliostat.models.staging import staged
from heliostat.predictor import Predictor, loading
from heliostat.recipe import Deploy, Refused, check_precision, nearest
from heliostat.tasks.text_embedding import TextEmbedding
from serve import haproxy, keys
from serve.forms import Forms
from serve.gate import ADMITTED, BodyLimit, Deadline, Gated

logger = logging.getLogger("heliostat")
Input = dict[str, Any]
LATENCIES_S = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0]
"""Upper bounds of what a histogram counts."""
SPINNING = {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "300000"}
"""The environment of replicas whose threads have processors of their own: they wait for each other as OpenMP's threads
do by default, for some milliseconds. Elsewhere (`launch.cluster.THREADS`) they sleep at once, which suits threads that
share processors, and costs those of llama.cpp, which meet a hundred times for a token, half of their speed."""
RETRY_AFTER_S = 1.0
"""What who finds all queues full is told."""
PAGE = Path(__file__).with_name("page.html")
ARGUMENTS = ("bundle", "version", "keys_file")
"""What `build` of an application takes."""


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Question(Body):
    inputs: Annotated[
        Input | Annotated[list[Input], Field(min_length=1)],
        Field(examples=[[{"text": "a short text"}, {"text": "another"}]]),
    ]
    """One input or several, as the task defines them: `{"text": "…"}`, `{"image": "…"}` in base64, or a row's columns
    with their numbers."""


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
    precision: str
    """In which the model computes."""
    ongoing: int
    """Requests that this replica is busy with."""


class Observed:
    """Says in every answer which replica made it, and of requests of some paths what Ray exports to Prometheus, each
    name with `ray_` before it. It is made in the replica, with the first request."""

    def __init__(self, app: Any, paths: tuple[str, ...]) -> None:
        self.app, self.paths = app, paths
        self.header = (b"x-replica", serve.get_replica_context().replica_id.unique_id.encode())
        self.requests = metrics.Counter(
            "heliostat_serve_requests", "Requests by outcome: answered, refused (4xx), failed", ("outcome",)
        )
        self.latency = metrics.Histogram("heliostat_serve_latency_s", "Of requests that were answered", LATENCIES_S)

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Callable[[Any], Any]) -> None:
        begun, status = time.perf_counter(), 500  # which an exception becomes

        async def noted(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], self.header]}
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            if scope["type"] == "http" and scope["path"].endswith(self.paths):
                outcome = "answered" if status < 400 else "refused" if status < 500 else "failed"
                self.requests.inc(1, {"outcome": outcome})
                if outcome == "answered":
                    self.latency.observe(time.perf_counter() - begun)


def http(settings: Deploy, paths: tuple[str, ...]) -> FastAPI:
    """An application with what all of them have around their routes, the outermost last. `paths`: those whose
    requests are measured."""
    api = FastAPI(title="Heliostat", version=heliostat.__version__)
    api.add_middleware(Forms, max_inputs=settings.max_inputs, max_body_bytes=settings.max_body_bytes)
    api.add_middleware(BodyLimit, max_body_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_s)
    api.add_middleware(Deadline, timeout_s=settings.timeout_s)
    if settings.keys_file:
        api.add_middleware(Gated, source=settings.keys_file)
    api.add_middleware(Observed, paths=paths)
    return api


def page(
    kind: Literal["text", "texts", "image", "row", "chat", "completion"], model: str, example: Any = None
) -> HTMLResponse:
    """A page to try a model on: `kind` is what one gives it, of a row beginning with the `example`."""
    settings = json.dumps({"kind": kind, "model": model, "example": example}).replace("<", "\\u003c")
    text = PAGE.read_text(encoding="utf-8").replace("/*settings*/null", settings)
    # It loads nothing: all it needs is written in it.
    policy = "default-src 'unsafe-inline'; connect-src 'self'; img-src data:"
    return HTMLResponse(text, headers={"content-security-policy": policy})


class Forwarded:
    """What deployments of HTTP applications share: they answer requests that a router let in and read for them, too."""

    async def forward(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[list[dict[str, Any]]]:
        """Answer a request: ASGI's messages, those together that are there together. Whoever stops reading has left."""
        messages: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        request = asyncio.Queue[dict[str, Any]]()  # and no more: a client who leaves is not heard here
        request.put_nowait({"type": "http.request", "body": body, "more_body": False})
        scope = {ADMITTED: "", **scope}
        answer = asyncio.ensure_future(self(scope, request.get, messages.put))  # type: ignore[operator]
        answer.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            over = False
            while not over:
                found = [await messages.get()]
                while not messages.empty():
                    found.append(messages.get_nowait())
                over = found[-1] is None
                if there := [message for message in found if message is not None]:
                    yield there
            await answer  # which raises what went wrong
        finally:
            answer.cancel()


def inputs_of(question: Question, settings: Deploy) -> list[Input]:
    """Raises HTTPException for more of them than one request may hold."""
    inputs = question.inputs if isinstance(question.inputs, list) else [question.inputs]
    if len(inputs) > settings.max_inputs:
        raise HTTPException(413, f"inputs: {len(inputs)} are more than the {settings.max_inputs} of one request")
    return inputs


def answering(path: Path, settings: Deploy | None = None) -> Predictor:
    """A predictor that has answered its task's example, computing as a replica does by its settings (None: as torch is
    set here). Raises Refused for a bundle that is not whole."""
    if settings is not None and settings.stage_folder:
        folder, here = Path(settings.stage_folder), settings.model_copy(update={"stage_folder": ""})
        try:
            return answering(staged(path, folder), here)
        except Refused:  # something may have cleaned that folder
            return answering(staged(path, folder, anew=True), here)
    bundle = bundles.read(path, verify_files=False)  # the predictor verifies them
    if settings is None:
        predictor = Predictor(bundle)
    else:
        device = torch.device("cuda" if settings.gpus_per_replica else "cpu")
        bfloat16 = settings.precision == "bfloat16"
        predictor = Predictor(
            bundle, threads=settings.threads_per_replica, bfloat16=bfloat16, device=device, load=loading(settings)
        )
    predictor.predict([predictor.task.example()])
    return predictor


def check_served(path: Path, settings: Deploy) -> None:
    """Raises Refused for a bundle that is not served in the settings' precision: here, before a replica tries."""
    bundle = bundles.read(path, verify_files=False)
    check_precision(settings.precision, bundle.recipe.task)
    if settings.precision == "int8":
        bundles.verify(bundle)
        loading(settings)(bundle)


def scaled(
    kind: type,
    name: str,
    bundle_path: Path,
    version: str,
    settings: Deploy,
    policy: dict[str, Any] | None = None,
    **config: Any,
) -> serve.Application:
    """The deployment of a class with a bundle, not yet running. `policy`: Ray Serve's autoscaling policy, where ongoing
    requests are not all. `config`: what `reconfigure` is told beside the bundle and its version, of which no change
    restarts a replica. Raises Refused for keys that cannot be read."""
    keys.check(settings.keys_file)
    spins = 1 < settings.threads_per_replica <= settings.cpus_per_replica
    code = f"{heliostat.__version__} {settings.model_dump_json()}"
    deployment = serve.deployment(name=name)(kind).options(
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
            "upscale_delay_s": settings.upscale_delay_s,
            "downscale_delay_s": settings.downscale_delay_s,
            **({"policy": policy} if policy else {}),
        },
        max_ongoing_requests=settings.max_ongoing_requests,
        max_queued_requests=settings.max_queued_requests,
        backpressure_config=BackpressureConfig(retry_after_s=RETRY_AFTER_S),
        graceful_shutdown_timeout_s=settings.drain_s,
        max_surge_percent=100,  # other settings do restart replicas: the new ones first
        ray_actor_options={
            "num_cpus": settings.cpus_per_replica,
            "num_gpus": settings.gpus_per_replica,
            "runtime_env": {"env_vars": SPINNING if spins else {}},
        },
        user_config={"bundle": str(bundle_path.absolute()), "version": version, **config},
    ).bind()


def arguments(args: dict[str, Any]) -> tuple[Path, str, Deploy]:
    """Bundle, version and settings from the `args` of a file for `serve deploy`: `bundle`, a path that every node sees,
    `version`, and `keys_file`. The other settings are those of the bundle's recipe. Raises Refused for other
    arguments."""
    for name in args:
        if name not in ARGUMENTS:
            raise Refused(f"args.{name}", "no such argument", nearest(name, list(ARGUMENTS)))
    if "bundle" not in args:
        raise Refused("args.bundle", "no bundle is named", "name the folder that training wrote")
    path = Path(args["bundle"]).expanduser()
    settings = bundles.read(path, verify_files=False).recipe.deploy
    settings = settings.model_copy(update={name: args[name] for name in ("keys_file",) if name in args})
    return path, str(args.get("version", "")), settings


def application(bundle_path: Path, version: str, settings: Deploy) -> serve.Application:
    """The deployment that fits the bundle's task, not yet running. `version`: what answers call it. Raises Refused for
    a bundle that is not whole."""
    from serve import classifier, embeddings, language_model

    bundle = bundles.read(bundle_path, verify_files=False)
    check_precision(settings.precision, bundle.recipe.task)
    task = bundle.task()
    generates = task.model_class == "AutoModelForCausalLM"
    if settings.adapters and not generates:
        raise Refused("deploy.adapters", "only models that generate text have them", "leave it out")
    if settings.engine != "embedded" and not generates:
        raise Refused("deploy.engine", f"{settings.engine} is for models that generate text", "leave it out")
    embeds = isinstance(task, TextEmbedding)
    if settings.sample_share and (generates or embeds):
        raise Refused("deploy.sample_share", "only what classifiers are asked is kept", "set it 0")
    if generates:
        return language_model.application(bundle_path, version, settings)
    return (embeddings if embeds else classifier).application(bundle_path, version, settings)


def check_gpus(settings: Deploy) -> None:
    """Refuse an endpoint that could never start on the cluster that Ray is connected to."""
    if settings.gpus_per_replica > ray.cluster_resources().get("GPU", 0):
        raise Refused(
            "deploy.gpus_per_replica",
            f"a replica asks for {settings.gpus_per_replica:g} of a GPU, the cluster has none",
            "set it 0, or deploy where there are GPUs",
        )


def stage(path: Path, folder: str) -> None:
    """A bundle's copy on every node of the cluster. Raises Refused where one cannot be."""
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    task = ray.remote(num_cpus=0)(staged)
    copies = [
        # A node may leave meanwhile.
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True)).remote(path, Path(folder))
        for node in nodes
    ]
    try:
        ray.get(copies)
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, Refused) else error) from None


def deploy(bundle_path: Path, version: str, deploy: Deploy, name: str) -> str:
    """Serve a bundle on the cluster that Ray is connected to; returns the endpoint's URL once it answers.

    Where Serve runs already, the application of that name is brought up to date. Raises Refused for a bundle
    that is not whole, for keys that cannot be read, for GPUs that the cluster lacks, and for a port that something else
    holds."""
    check_gpus(deploy)
    if not deploy.keys_file and not _is_loopback(deploy.host):
        logger.warning("%s is reached from other machines, and asks for no keys: see deploy.keys_file", deploy.host)
    app = application(bundle_path, version, deploy)
    if deploy.stage_folder:
        stage(bundle_path.absolute(), deploy.stage_folder)
    # Serve has no public way to ask which port it has.
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        _check_port(deploy.host, deploy.port)
        environment = {"env_vars": haproxy.variables(deploy)}
        options = {"host": deploy.host, "port": deploy.port}
        serve.start(http_options=options, controller_options={"runtime_env": environment})
    elif client.http_config.port != deploy.port:
        raise Refused(
            "deploy.port",
            f"Serve runs on port {client.http_config.port} of this cluster, not on {deploy.port}",
            "use that port, or stop it with `serve shutdown`",
        )
    serve.run(app, name=name, route_prefix="/", blocking=False)
    host = "127.0.0.1" if deploy.host == "0.0.0.0" else deploy.host
    return f"http://{host}:{deploy.port}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_port(host: str, port: int) -> None:
    if reason := cannot_listen(host, port):
        raise Refused(
            "deploy.port", f"{host}:{port} cannot be used: {reason}", "stop what listens there, or choose another port"
        )
