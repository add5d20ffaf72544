"""OpenAI's protocol for text: what a request may say, what its answer looks like, and how a refusal does.

Fields are those of OpenAI's reference (Completions, Chat, Embeddings, Models) and a few extensions that other servers
share. What cannot be done is refused by name; what changes no answer (`user`, `metadata`, …) is taken and not used.
"""

# Annotations are not postponed here: FastAPI reads those of classes that travel by value.
import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException

from heliostat.generate import EngineFailed
from heliostat.recipe import Refused

MAX_CHOICES = 128
MAX_STOPS = 4
MAX_TOP_LOGPROBS = 20


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False
    """Taken and not used."""
    continuous_usage_stats: bool = False


class Asked(Body):
    """What all requests share."""

    model: str
    user: str | None = None
    """Taken and not used."""

    @model_validator(mode="before")
    @classmethod
    def _unicode(cls, data: Any) -> Any:
        """JSON can spell half a surrogate pair, which no tokenizer takes."""
        try:
            json.dumps(data, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"a text is not valid Unicode: {error.reason}") from error
        return data


class EmbeddingRequest(Asked):
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None


class Generation(Asked):
    """What completions and chats share."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """An extension: draw from so many of the likeliest tokens; 0 or -1: from all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """An extension: draw from tokens that are at least so much of the likeliest's probability."""
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    """An extension: divides the logits of tokens of the prompt and the answer so far."""
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    ignore_eos: bool = False
    """An extension: go on to `max_tokens`."""
    metadata: dict[str, str] | None = None
    """Taken and not used, as the next ones are."""
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def stops(self) -> list[str]:
        listed = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in listed if text]


class CompletionRequest(Generation):
    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """How many of the likeliest tokens to report at each place."""
    echo: bool | None = None
    """Give the prompt back in front, with its log-probabilities where they are asked for."""
    suffix: str | None = None
    """Fill in the middle: what comes behind the answer."""
    best_of: int | None = None


class Message(BaseModel):
    """A chat's message. What it holds beside these goes to the chat template."""

    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None


class JsonSchema(Body):
    name: str = ""
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Function(Body):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"] = "function"
    function: Function


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"] = "function"
    function: NamedFunction


class ChatRequest(Generation):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """The newer name of `max_tokens`."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    """Taken and not used."""
    chat_template_kwargs: dict[str, Any] = {}
    """An extension: further arguments of the chat template."""


class Problem(Exception):
    """A refusal or failure, in the protocol's own shape."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def model_card(name: str, length: int) -> dict[str, Any]:
    """What `/v1/models` says of one. `length`: tokens of a request, its answer among them."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "heliostat", "max_model_len": length}


def no_such_model(asked: str, names: Iterable[str]) -> Problem:
    there = ", ".join(f"`{name}`" for name in names)
    return Problem(404, f"The model `{asked}` does not exist; there is {there}", "model", "model_not_found")


async def problem_response(request: Request, error: Exception) -> JSONResponse:
    found = as_problem(error)
    return JSONResponse(found.body(), found.status, getattr(error, "headers", None))


def as_problem(error: Exception) -> Problem:
    match error:
        case Problem():
            return error
        case Refused():
            return Problem(400, str(error), error.field)
        case RequestValidationError():
            return _validation(error)
        case HTTPException():
            return Problem(error.status_code, str(error.detail))
        case EngineFailed():
            return Problem(503, str(error))
    return Problem(500, "the server failed; its log says why")


HANDLED = (Problem, Refused, RequestValidationError, HTTPException, EngineFailed, Exception)


def _validation(error: RequestValidationError) -> Problem:
    """Pydantic's first complaint. Of a union, the branch does not name a field."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"][1:]]
    field = path[0] if path and first["type"] != "json_invalid" else None
    if field is not None and path[1:2] and path[1].isdigit():
        field = ".".join(path[:3])
    if first["type"] == "extra_forbidden":
        return Problem(400, f"Unrecognized request argument supplied: {'.'.join(path)}", ".".join(path))
    return Problem(400, f"{field or 'body'}: {first['msg']}", field)
