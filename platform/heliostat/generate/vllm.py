"""vLLM's server in processes and an environment of its own, asked over a socket in a folder of its own: the engine for
GPUs.

It gets token ids and gives token ids. It pins other versions of torch and transformers than this environment has: so
nothing of ours is imported there, and nothing of it here. What it would do otherwise than `Sampling` says is refused.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import aiohttp

from heliostat.generate import EngineFailed, Sampling, Token
from heliostat.generate.drawing import Grammars, end_ids
from heliostat.recipe import Refused

NO_LIMIT = aiohttp.ClientTimeout(total=None)
LEAST_TEMPERATURE = 0.01
"""What is colder vLLM draws at this one."""
SEEDS = 2**63
SPARE_TOKENS = 256
"""Of the cache: vLLM counts in blocks, and keeps one for itself."""
POLL_S, STOP_S = 0.2, 20.0
"""How often is asked whether it is ready; how long it may take to end."""
HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""That its attention has on processors (`vllm/v1/attention/backends/cpu_attn.py`). With another it starts, and ends at
the first request."""
NUMBER_BYTES = {"float32": 4, "bfloat16": 2}
LEASH = 'exec 3<&0; { { "$@" </dev/null 3<&-; kill 0; } & read -r _ <&3; kill 0; } &'
"""Ends the command's whole group of processes when this process has closed its end of the socket, or is no more, and
when the command itself ends. In the background: of a worker that ends, Ray kills the children."""


class VllmEngine:
    """Greedy answers in float32 are those of `model.generate`."""

    def __init__(
        self,
        environment: Path,
        bundle: Path,
        model: Any,
        tokenizer: Any,
        *,
        cache_tokens: int,
        precision: Literal["float32", "bfloat16"] = "float32",
        on_gpu: bool = False,
        threads: int | None = None,
    ) -> None:
        """`environment`: what `make llm` built. `bundle`: the folder that `model` and `tokenizer` are of.
        `cache_tokens`: keys and values kept, of all requests together. `threads`: processors of the engine (None:
        all). Returns once vLLM is ready; raises EngineFailed where it does not start."""
        config = model.config.get_text_config()
        self.tokenizer, self.vocab_size = tokenizer, config.vocab_size
        self.max_length = min(getattr(config, "max_position_embeddings", None) or cache_tokens, cache_tokens)
        self.end_ids = end_ids(model, tokenizer)
        self._grammars = Grammars(tokenizer, self.vocab_size, self.end_ids)
        self._folder = tempfile.TemporaryDirectory(prefix="vllm-")  # only this user may enter it
        self._socket = f"{self._folder.name}/server.sock"
        words = command(environment, bundle, config, cache_tokens, precision, on_gpu)
        self._log = Path(self._folder.name, "log")
        self._leash, theirs = socket.socketpair()
        with theirs, self._log.open("wb") as log:
            starter = subprocess.Popen(
                ["sh", "-c", LEASH, "sh", *words, "--uds", self._socket],
                stdin=theirs.fileno(),
                stdout=log,
                stderr=log,
                env=variables(threads) | {"VLLM_RPC_BASE_PATH": self._folder.name},
                start_new_session=True,
            )
        starter.wait()
        self._group = starter.pid
        self._leash.setblocking(False)
        try:
            asyncio.run(self._ready())
        except BaseException:
            self.close()
            raise

    async def _ready(self) -> None:
        while True:
            try:
                self.check()
            except EngineFailed as error:
                end = self._log.read_text(errors="replace")[-2000:]
                raise EngineFailed(f"vLLM does not start:\n{end}") from error
            try:
                async with self._session() as session, session.get("http://vllm/health") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(POLL_S)

    async def generate(self, prompt: list[int], sampling: Sampling) -> AsyncGenerator[list[Token], None]:
        wanted = _wanted(sampling, self.end_ids)
        ended, rest = False, b""
        async with self._asked({"token_ids": prompt, "sampling_params": wanted, "stream": True}) as response:
            async for data in response.content.iter_any():
                *lines, rest = (rest + data).split(b"\n")
                choices = [choice for line in lines for choice in _choices(line)]
                tokens = [token for choice in choices for token in _tokens(choice, sampling.logprobs or 0)]
                ended = ended or any(choice["finish_reason"] in ("stop", "length") for choice in choices)
                if tokens:
                    yield tokens
        if not ended:
            raise EngineFailed("vLLM gave up an answer")

    async def score(self, ids: list[int], top: int) -> list[Token]:
        wanted = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": top, "detokenize": False}
        async with self._asked({"token_ids": ids, "sampling_params": wanted}) as response:
            _, *found = (await response.json())["prompt_logprobs"]
        values = [{int(token): each["logprob"] for token, each in place.items()} for place in found]
        return [Token(ids[0])] + [
            Token(token, of[token], _likeliest([*of.items()], top)) for token, of in zip(ids[1:], values, strict=True)
        ]

    @asynccontextmanager
    async def _asked(self, body: dict[str, Any]) -> AsyncIterator[aiohttp.ClientResponse]:
        """Leaving it gives the request up: vLLM hears that its client has gone."""
        self.check()
        try:
            async with (
                self._session() as session,
                session.post("http://vllm/inference/v1/generate", json=body) as response,
            ):
                if response.status != 200:
                    raise EngineFailed(await response.text())
                yield response
        except aiohttp.ClientError as error:
            raise EngineFailed(f"vLLM does not answer: {error!r}") from error

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(connector=aiohttp.UnixConnector(self._socket), timeout=NO_LIMIT)

    def check_sampling(self, sampling: Sampling) -> None:
        if 0 < sampling.temperature < LEAST_TEMPERATURE:
            raise Refused("temperature", f"vLLM draws at {LEAST_TEMPERATURE} at least", "use 0: the likeliest token")

    def check_grammar(self, grammar: str) -> None:
        self._grammars.matcher(grammar)
        if not self.end_ids:
            raise Refused("grammar", "this model has no token at which an answer could end")

    def token_bytes(self, token: int) -> bytes:
        return self._grammars.token_bytes(token)

    def check(self) -> None:
        try:
            gone = not self._leash.recv(1)
        except BlockingIOError:
            gone = False
        except OSError:  # closed
            gone = True
        if gone:
            raise EngineFailed("the engine has stopped")

    def close(self) -> None:
        self._leash.close()
        limit = time.monotonic() + STOP_S
        try:
            while time.monotonic() < limit:
                os.killpg(self._group, 0)  # raises once all have ended
                time.sleep(POLL_S)
            os.killpg(self._group, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._folder.cleanup()


def check_model(config: Any, on_gpu: bool) -> None:
    """Raises Refused for a model that vLLM does not compute. `config`: transformers'."""
    size = _head_size(config.get_text_config())
    if not on_gpu and size not in HEAD_SIZES:
        sizes = ", ".join(map(str, HEAD_SIZES))
        reason = f"on processors vllm has attention heads of {sizes}; this model's are of {size}"
        raise Refused("deploy.engine", reason, "use deploy.engine=embedded")


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def command(environment: Path, bundle: Path, config: Any, cache_tokens: int, precision: str, on_gpu: bool) -> list[str]:
    """What starts vLLM's server; where it listens is not said yet. `config`: of the bundle's model."""
    longest = min(getattr(config, "max_position_embeddings", None) or cache_tokens, cache_tokens)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * heads * _head_size(config) * NUMBER_BYTES[precision]
    return [
        *(f"{environment}/bin/python", "-m", "vllm.entrypoints.cli.main", "serve", str(bundle)),
        *("--dtype", precision, "--load-format", "safetensors", "--generation-config", "vllm"),
        *("--enable-scale-out", "--max-model-len", str(longest)),  # the routes for token ids
        *("--kv-cache-memory-bytes", str(token_bytes * (cache_tokens + SPARE_TOKENS))),
        *("--max-logprobs", "-1", "--structured-outputs-config", json.dumps({"backend": "guidance"})),
        *("--disable-log-stats", "--disable-uvicorn-access-log", "--uvicorn-log-level", "warning"),
        *([] if on_gpu else ["--enforce-eager"]),
    ]


def variables(threads: int | None) -> dict[str, str]:
    """The environment variables of vLLM's server."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    return {
        **kept,
        **({"OMP_NUM_THREADS": str(threads)} if threads else {}),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # it would bind every replica to the same processors
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
    }


def _wanted(sampling: Sampling, ends: frozenset[int]) -> dict[str, Any]:
    """As vLLM's `SamplingParams`."""
    wanted: dict[str, Any] = {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
        "ignore_eos": True,  # where an answer ends is said by the ids
        "stop_token_ids": [] if sampling.ignore_end else sorted(ends),
        "detokenize": False,
    }
    if sampling.seed is not None:
        wanted["seed"] = sampling.seed % SEEDS
    if sampling.logit_bias:
        wanted["logit_bias"] = sampling.logit_bias
    if sampling.logprobs is not None:
        wanted["logprobs"] = sampling.logprobs + 1  # the drawn token takes a place, whether it is likely or not
    if sampling.grammar:
        wanted["structured_outputs"] = {"grammar": sampling.grammar}
    return wanted


def _choices(line: bytes) -> list[dict[str, Any]]:
    """What a line of the stream tells, if anything."""
    name, _, data = line.partition(b": ")
    if name != b"data" or data.startswith(b"[DONE]"):
        return []
    event = json.loads(data)
    if "error" in event:
        raise EngineFailed(data.decode())
    return event["choices"]


def _tokens(choice: dict[str, Any], top: int) -> list[Token]:
    if choice["logprobs"] is None:
        return [Token(token) for token in choice["token_ids"]]
    return [
        Token(
            each["token_id"],
            each["logprob"],
            _likeliest([(other["token_id"], other["logprob"]) for other in each["top_logprobs"]], top),
        )
        for each in choice["logprobs"]["content"]
    ]


def _likeliest(found: list[tuple[int, float]], top: int) -> tuple[tuple[int, float], ...]:
    return tuple(sorted(found, key=lambda one: -one[1])[:top])
