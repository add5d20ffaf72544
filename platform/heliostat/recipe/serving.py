"""The sections of a recipe that say which bundle is deployed, how it is served, how another takes its place, and when
what it is asked has drifted."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from heliostat.recipe.base import Count, Refused, Section

GgufDtype = Literal["q8_0", "f16", "f32"]
INT8_TASKS = ("text_classification",)


def check_precision(precision: str, task: str) -> None:
    """Raises Refused for a precision of `Deploy` that a task is not served in."""
    if precision == "int8" and task not in INT8_TASKS:
        reason = f"int8 is for {', '.join(INT8_TASKS)}, not for {task}"
        raise Refused("deploy.precision", reason, "use float32 or bfloat16")


class Gate(Section):
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95
    """A challenger is promoted when the paired bootstrap's one-sided lower bound of its gain is above zero."""
    resamples: PositiveInt = 2000


class SamplingDefaults(Section):
    """How tokens are drawn for a request that does not say. None: as the bundle's generation_config.json says, else as
    OpenAI's protocol does: temperature 1 from all tokens, chats to the end of the context, completions of 16 tokens."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0: always the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Count | None = None
    """0: from all tokens."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """0: from all tokens."""
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    """1: none."""
    max_tokens: PositiveInt | None = None
    """Of an answer, where the context has room for them."""


class Deploy(Section):
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    min_replicas: Count = 1
    """0: an endpoint that nobody asks gives its last replica back, and the next request waits until one has started."""
    max_replicas: PositiveInt = 2
    target_ongoing_requests: PositiveFloat = 4.0
    """Of a replica: where there are more, so many more replicas are started, up to `max_replicas`."""
    target_queued_tokens: PositiveInt = 4096
    """Language models: tokens of prompts that wait for a replica, by which more are started, too."""
    target_first_token_s: PositiveFloat = 5.0
    """Language models: where requests wait longer for their first token, more replicas are started."""
    upscale_delay_s: Annotated[float, Field(ge=0)] = 10.0
    """How long more replicas must be wanted before they are started."""
    downscale_delay_s: Annotated[float, Field(ge=0)] = 300.0
    max_ongoing_requests: PositiveInt = 64
    max_queued_requests: PositiveInt = 256
    """Where so many wait at a replica (at a proxy, if it is Ray's), the next are told to come again: status 503."""
    keys_file: str = ""
    """The file of API keys that `pipelines.keys` writes, where every node sees it, or `env:NAME`, an environment
    variable of all nodes with its content. Empty: everyone may ask."""
    timeout_s: PositiveFloat = 600.0
    """A request that is not answered by then is given up: status 504."""
    body_timeout_s: PositiveFloat = 30.0
    """So is one whose body is not here by then: status 408."""
    stage_folder: Annotated[str, Field(pattern=r"^(/.*)?$")] = ""
    """A folder on each node's own disk, where bundles are copied before replicas start: for those that lie on network
    storage. Empty: each replica reads them where they are."""
    drain_s: PositiveFloat = 60.0
    """What a replica that ends has begun may take so long; what is not done then is cut off."""
    max_batch_size: PositiveInt = 16
    batch_wait_s: Annotated[float, Field(ge=0)] = 0.005
    max_inputs: PositiveInt = 256
    """Inputs one request may hold."""
    max_body_bytes: PositiveInt = 4 << 20
    sample_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Of the inputs, those that are kept with their predictions, as clients sent them, for the job `drift`. 0: none."""
    sample_folder: str = ""
    """Where they are kept, by bundle. Empty: STORAGE/served/NAME."""
    sample_every_s: PositiveFloat = 60.0
    """A replica writes a file so often, where it has something to write."""
    sample_days: PositiveFloat = 30.0
    """Older ones are removed."""
    sample_bytes: PositiveInt = 1 << 30
    """So are the oldest where the folder holds more."""
    cpus_per_replica: Annotated[float, Field(ge=0)] = 0.1
    threads_per_replica: PositiveInt = 1
    """More than one are fastest where `cpus_per_replica` reserves a processor for each: then they wait for each other
    without going to sleep."""
    gpus_per_replica: Annotated[float, Field(ge=0)] = 0.0
    """0: a replica computes on processors. 0.5: two share a GPU."""
    precision: Literal["float32", "bfloat16", "int8"] = "float32"
    """Of matrix products; language models keep their weights in it too. `int8`: classifiers of texts on processors, by
    ONNX Runtime; it needs the extra `edge`."""
    int8_loss: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Of accuracy on the bundle's validation rows: where int8 loses more of float32's, it is not deployed."""
    int8_disagreement: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Nor where it gives more of these rows another label, whichever is right."""
    engine: Literal["embedded", "llama_cpp", "vllm"] = "embedded"
    """Language models: what draws the tokens. `llama_cpp` is the fast one on CPUs; it needs the extra `llm`. `vllm` is
    the one for GPUs; it needs the environment that `make llm` builds."""
    llm_environment: str = ""
    """That environment's folder, on every node. Empty: beside the one that a replica runs in (`.venv-llm`)."""
    gguf_dtype: GgufDtype = "q8_0"
    """What llama.cpp's weights are: `f32` gives the bundle's own answers, `q8_0` needs a quarter of the memory."""
    cache_tokens: Annotated[int, Field(ge=128)] = 16384
    """Language models: tokens whose keys and values a replica keeps, of all its requests together."""
    stream_interval_s: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Language models: a streamed answer's tokens that come sooner than this after those before are sent with the next
    ones, since what it costs to send them is taken from the processors that draw. 0: each as soon as it is there."""
    sampling: SamplingDefaults = SamplingDefaults()
    """Language models: how tokens are drawn for a request that does not say."""
    adapters: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")], str] = {}
    """Language models: bundles that were trained by `model.lora` on the one that is deployed, served beside it from its
    weights. By name: clients ask for NAME:ADAPTER. JSON."""

    @model_validator(mode="after")
    def _replicas(self) -> Deploy:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas={self.min_replicas} is above max_replicas={self.max_replicas}")
        if self.gpus_per_replica and self.precision == "int8":
            raise Refused("deploy.gpus_per_replica", "int8 is for processors", "set it 0, or use bfloat16")
        if self.gpus_per_replica > 1:
            raise ValueError(f"gpus_per_replica={self.gpus_per_replica:g}: a replica computes on one GPU; use ≤ 1")
        return self


class Rollout(Section):
    error_increase: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """A new version whose error rate is this much higher does harm. Errors: answers with a status of 500 or more, or
    none within `timeout_s`, and refusals of what the old version answers."""
    latency_increase: PositiveFloat = 0.1
    """So does one whose median latency (until an answer begins) is higher by this share of the old one's."""
    quality_drop: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """So does one whose answers are judged worse by this much, on average."""
    judge: str = ""
    """`module:function` that is told a request and its answer, as objects, and says how good that is, from 0 to 1, or
    None where it cannot tell. Empty: quality is not compared."""
    false_roll_back: Annotated[float, Field(gt=0, le=0.5)] = 0.05
    """The chance at most that a version which is no worse is rolled back, over the whole of its rollout."""
    steps: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1)] = [0.01, 0.05, 0.25, 0.5]
    """A canary's shares of the traffic. What does well at the last one gets all of it."""
    requests_per_step: PositiveInt = 1000
    """At least."""
    max_requests: PositiveInt = 100_000
    """A rollout that has seen so many and is not decided is called off: the old version stays."""
    max_s: PositiveFloat = 86_400.0
    """So is one that took so long."""
    timeout_s: PositiveFloat = 30.0
    """A new version that has not begun to answer by then has failed, and the old one is asked."""
    key_header: str = "x-user"
    """Requests with the same value of this header go to the same version; those without go to either."""
    num_routers: PositiveInt = 2

    @model_validator(mode="after")
    def _rising(self) -> Rollout:
        if any(low >= high for low, high in pairwise(self.steps)):
            raise Refused("rollout.steps", f"{self.steps} do not rise", "name each share once, the smallest first")
        return self


class Drift(Section):
    """What of an endpoint's inputs and predictions differs from the bundle's validation rows has drifted if chance
    would hardly do it, and if it differs by enough to matter: with many rows, every difference is more than chance."""

    false_alarms: Annotated[float, Field(gt=0, le=0.5)] = 0.01
    """The chance at most that a report says drift where there is none, over all that it compares."""
    psi: PositiveFloat = 0.2
    """The population stability index from which a column matters. 0.2 is a normal column's shift by 0.45 of its
    standard deviation."""
    mmd: PositiveFloat = 0.02
    """The squared maximum mean discrepancy from which embeddings matter. 0.02 is a shift by a quarter of the standard
    deviation, in all their dimensions."""
    min_rows: Annotated[int, Field(ge=10)] = 100
    """With fewer, on either side, nothing is said."""
    max_rows: PositiveInt = 2000
    """So many of each side are compared, a random choice where there are more."""

    @model_validator(mode="after")
    def _rows(self) -> Drift:
        if self.min_rows > self.max_rows:
            raise ValueError(f"min_rows={self.min_rows} is above max_rows={self.max_rows}")
        return self
