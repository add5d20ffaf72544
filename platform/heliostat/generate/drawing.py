"""Draws the tokens of requests that share a step, each as its own request asks.

Shapes: R requests of a step that get a token, V vocabulary.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import llguidance
import llguidance.hf
import torch
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from torch import Tensor
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

from heliostat.generate import Sampling, Token
from heliostat.recipe import Refused

ONE_LINE: dict[str, Any] = {"whitespace_flexible": False}
"""How llguidance is told to let JSON have no line breaks: a small model that may write white space anywhere writes
little else."""


class Grammars:
    """What texts can be made to follow, over the tokens of one tokenizer."""

    def __init__(self, tokenizer: Any, vocab_size: int, end_ids: frozenset[int]) -> None:
        self._tokens = llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=sorted(end_ids))

        self._compiled = functools.lru_cache(64)(self._compile)  # up to a second for a large schema

    def matcher(self, grammar: str) -> llguidance.LLMatcher:
        """At the beginning of a text. Raises Refused for what is no grammar."""
        return self._compiled(grammar).deep_copy()

    def _compile(self, grammar: str) -> llguidance.LLMatcher:
        matcher = llguidance.LLMatcher(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            raise Refused("grammar", matcher.get_error().strip().splitlines()[0])
        return matcher

    def token_bytes(self, token: int) -> bytes:
        return self._tokens.decode_bytes([token])


def json_grammar(schema: dict[str, Any]) -> str:
    """A JSON value by a JSON schema, on one line."""
    return llguidance.LLMatcher.grammar_from_json_schema({**schema, "x-guidance": ONE_LINE})


class Draw:
    """What was drawn for one request, and how the next token is. It outlives the request's place in the cache, so
    copies of the request's state keep it: it has no copies."""

    def __init__(self, sampling: Sampling, matcher: llguidance.LLMatcher | None) -> None:
        self.sampling, self.matcher = sampling, matcher
        self.reports: list[Token] = []
        self._drawn: Counter[int] = Counter()
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed % 2**64)
        self.plain = (
            sampling.temperature == 0
            and sampling.logprobs is None
            and matcher is None
            and not (sampling.logit_bias or sampling.frequency_penalty or sampling.presence_penalty)
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Draw:
        return self

    def __call__(self, logits_V: Tensor) -> int:
        sampling = self.sampling
        scores_V = self._adjusted(logits_V)
        if sampling.temperature == 0:
            token = int(scores_V.argmax())
        else:
            token = self._sampled(scores_V / sampling.temperature)
        if sampling.logprobs is not None:
            self.reports.append(report(logits_V.log_softmax(-1), token, sampling.logprobs))
        self._drawn[token] += 1
        if self.matcher is not None:
            self.matcher.consume_token(token)
        return token

    def _adjusted(self, logits_V: Tensor) -> Tensor:
        sampling = self.sampling
        scores_V = logits_V.clone()
        if sampling.logit_bias:
            scores_V[list(sampling.logit_bias)] += torch.tensor(list(sampling.logit_bias.values()))
        if self._drawn and (sampling.frequency_penalty or sampling.presence_penalty):
            counts = torch.tensor(list(self._drawn.values()), dtype=scores_V.dtype)
            scores_V[list(self._drawn)] -= sampling.frequency_penalty * counts + sampling.presence_penalty
        if self.matcher is not None:
            bits = allocate_token_bitmask(1, len(scores_V))
            fill_next_token_bitmask(self.matcher, bits)
            allowed = torch.from_numpy(bits.view("uint8")).flatten()
            allowed_V = (allowed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
            scores_V[allowed_V.flatten()[: len(scores_V)] == 0] = -torch.inf
        return scores_V

    def _sampled(self, scores_V: Tensor) -> int:
        sampling = self.sampling
        if 0 < sampling.top_k < len(scores_V):
            scores_V = scores_V.masked_fill(scores_V < scores_V.topk(sampling.top_k).values[-1], -torch.inf)
        probs_V = scores_V.softmax(-1)
        if sampling.top_p < 1:
            sorted_V, order_V = probs_V.sort(descending=True)
            # The smallest set whose probability reaches top_p: a token belongs to it where those before it do not.
            before_V = sorted_V.cumsum(-1) - sorted_V
            probs_V = torch.zeros_like(probs_V).scatter(0, order_V, sorted_V * (before_V < sampling.top_p))
        return int(torch.multinomial(probs_V, 1, generator=self._generator))


class Draws(ContinuousBatchingLogitsProcessor):
    """transformers' place for what changes logits before the likeliest is taken: the token that a request's `Draw`
    chooses becomes the likeliest."""

    supported_kwargs = {"draw": Draw}
    ignored_kwargs = ()

    def __init__(self) -> None:
        self._draws: list[Draw] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        self._draws = [request.state.logit_processor_kwargs["draw"] for request in requests_with_new_token]
        return torch.zeros(len(self._draws), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        # Behind them come rows of requests whose prompt is not read to its end: nobody takes their token.
        for logits_V, draw in zip(scores, self._draws, strict=False):
            if not draw.plain:
                logits_V[draw(logits_V)] = torch.inf
        return scores


def report(logprobs_V: Tensor, token: int, top: int) -> Token:
    values, ids = logprobs_V.topk(min(top, len(logprobs_V)))
    return Token(token, float(logprobs_V[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
