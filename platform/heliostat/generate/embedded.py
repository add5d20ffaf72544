"""The engine that needs nothing beside transformers: its continuous batching, with its paged cache, in this process,
where the model is."""

from __future__ import annotations

import asyncio
import copy
import uuid
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import torch
import transformers
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler

from heliostat.generate import EngineFailed, Sampling, Token
from heliostat.generate.drawing import Draw, Draws, Grammars, end_ids, report
from heliostat.models.adapters import Adapter, attach, begin, through

PAGE_TOKENS = 32
"""Tokens of a request's last page that may stay empty."""
SCHEDULER = "heliostat"
STEP_TOKENS = {"cpu": 512, "cuda": 4096}
"""Tokens of one forward pass: longer prompts are read in parts, so that answers in progress go on meanwhile."""


class Scheduler(FIFOScheduler):
    """Where the cache is full, no request is taken in until one has ended; one that was given up has ended, too. The
    tokens of a step go through the adapters of their requests."""

    def schedule_batch(
        self, token_budget: int, cache_budget: int
    ) -> tuple[list[FutureRequestState] | None, bool, int, int]:
        found = super().schedule_batch(token_budget, cache_budget)
        # The thread that asks is the one that computes, and in this order.
        begin([(each.state.logit_processor_kwargs["draw"].adapter, each.query_length) for each in found[0] or []])
        return found

    def clear_cancelled_requests(self) -> list[RequestState]:
        cancelled = super().clear_cancelled_requests()
        if cancelled:
            self.block_new_requests = False
        return cancelled


class EmbeddedEngine:
    """Greedy answers are those of `model.generate`, whoever shares the step."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        cache_tokens: int,
        threads: int | None = None,
        adapters: Mapping[str, Adapter] | None = None,
    ) -> None:
        """`cache_tokens`: keys and values kept, of all requests together. `threads`: processors of the engine (None: as
        torch is set). `adapters`: by name, for `adapted`."""
        config = model.config.get_text_config()
        self.model, self.tokenizer, self._threads = model, tokenizer, threads
        pages = max(2, cache_tokens // PAGE_TOKENS)
        self.max_length = min(getattr(config, "max_position_embeddings", 0) or cache_tokens, (pages - 1) * PAGE_TOKENS)
        self.end_ids = end_ids(model, tokenizer)
        self._ends: list[int] | int = sorted(self.end_ids) or -1  # a model may have none
        self.vocab_size = config.vocab_size
        self._grammars = Grammars(tokenizer, config.vocab_size, self.end_ids)
        self._adapter: Adapter | None = None
        self._adapters = dict(adapters or {})
        attach(model, [*self._adapters.values()])
        # A model of its own around the same weights: for the time of a step, the manager changes what attention is, and
        # whoever uses the model meanwhile would get that, too.
        tensors = [*model.parameters(), *model.buffers()]
        SCHEDULER_MAPPING[SCHEDULER] = Scheduler
        self._manager = ContinuousBatchingManager(
            copy.deepcopy(model, {id(tensor): tensor for tensor in tensors}),
            transformers.GenerationConfig(do_sample=False, eos_token_id=self._ends),
            ContinuousBatchingConfig(
                page_size=PAGE_TOKENS,
                num_blocks=pages,
                max_batch_tokens=STEP_TOKENS[model.device.type],
                # Requests with one beginning share its keys and values, which each adapter has of its own.
                allow_block_sharing=not self._adapters,
                use_async_batching=False,
                use_cuda_graph=False,  # a captured step would not draw anew
                scheduler_type=SCHEDULER,
            ),
        )
        draws = ContinuousBatchingLogitsProcessorList(transformers.LogitsProcessorList([Draws()]))
        draws.tensors_required = 1  # it counts only processors that it converted itself
        self._manager.logit_processor = draws
        self._manager.start()

    def adapted(self, name: str) -> EmbeddedEngine:
        """The same engine, whose answers are those of the model with an adapter."""
        found = copy.copy(self)
        found._adapter = self._adapters[name]
        return found

    async def generate(self, prompt: list[int], sampling: Sampling) -> AsyncGenerator[list[Token], None]:
        matcher = self._grammars.matcher(sampling.grammar) if sampling.grammar else None
        draw = Draw(sampling, matcher, prompt, self._adapter)
        name, outputs, sent = uuid.uuid4().hex, asyncio.Queue[Any](), 0
        manager, finished = self._manager, False
        manager.register_result_handler(name, outputs.put_nowait)
        try:
            accepted = manager.add_request(
                prompt,
                request_id=name,
                max_new_tokens=sampling.max_tokens,
                streaming=True,
                eos_token_id=-1 if sampling.ignore_end else self._ends,
                draw=draw,
            )
            if accepted is None:
                raise EngineFailed("the engine has stopped")
            while not finished:
                output = await outputs.get()
                finished = output.is_finished()
                if output.error is not None:
                    raise EngineFailed(output.error)
                ids = output.generated_tokens
                # Reports may be ahead of outputs: the next step may have drawn already.
                yield [draw.reports[i] if draw.reports else Token(ids[i]) for i in range(sent, len(ids))]
                sent = len(ids)
        finally:
            if not finished:
                manager.cancel_request(name)
                manager.output_router.result_handlers.pop(name, None)

    async def score(self, ids: list[int], top: int) -> list[Token]:
        return await asyncio.to_thread(self._score, ids, top)

    @torch.inference_mode()
    def _score(self, ids: list[int], top: int) -> list[Token]:
        if self._threads:
            torch.set_num_threads(self._threads)
        with through(self._adapter, len(ids)):
            logits_TV = self.model(torch.tensor([ids], device=self.model.device), use_cache=False).logits[0].float()
        tokens = [Token(ids[0])]
        return tokens + [report(logits_TV[i].log_softmax(-1), token, top) for i, token in enumerate(ids[1:])]

    def check_sampling(self, sampling: Sampling) -> None:
        pass

    def check_grammar(self, grammar: str) -> None:
        self._grammars.matcher(grammar)

    def token_bytes(self, token: int) -> bytes:
        return self._grammars.token_bytes(token)

    def check(self) -> None:
        if not self._manager.is_running() or self._manager.background_thread_status.fatal_error is not None:
            raise EngineFailed("the engine has stopped")

    def close(self) -> None:
        self._manager.destroy()
