"""Draws the tokens of requests that share a step, each as its own request asks.

Shapes: R requests of a step that get a token, V vocabulary.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import llguidance
import llguidance.hf
import torch
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from torch import Tensor
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

from heliostat.generate import Sampling, Token
from heliostat.models.adapters import Adapter
from heliostat.recipe import Refused

ONE_LINE: dict[str, Any] = {"whitespace_flexible": False}
"""How llguidance is told to let JSON have no line breaks: a small model that may write white space anywhere writes
little else."""


class Grammars:
    """What texts can be made to follow, over the tokens of one tokenizer."""

    def __init__(self, tokenizer: Any, vocab_size: int, end_ids: frozenset[int]) -> None:
        self._tokens = llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=sorted(end_ids) or None)

        self._compiled = functools.lru_cache(64)(self._compile)  # up to a second for a large schema

    def matcher(self, grammar: str) -> llguidance.LLMatcher:
        """At the beginning of a text. Raises Refused for what is no grammar."""
        return self._compiled(grammar).deep_copy()

    def _compile(self, grammar: str) -> llguidance.LLMatcher:
        try:
            matcher = llguidance.LLMatcher(self._tokens, grammar, log_level=0)
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair; UTF-8 cannot
            raise Refused("grammar", f"not valid Unicode: {error.reason}") from error
        if matcher.is_error():
            raise Refused("grammar", matcher.get_error().strip().splitlines()[0])
        return matcher

    def token_bytes(self, token: int) -> bytes:
        return self._tokens.decode_bytes([token])


def json_grammar(schema: dict[str, Any]) -> str:
    """A JSON value by a JSON schema, on one line. In llguidance's Lark, which all engines read."""
    return f"start: %json {json.dumps({**schema, 'x-guidance': ONE_LINE}, ensure_ascii=False)}\n"


def end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Of the generation's configuration, and the tokenizer's own, which chat templates end answers with."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in [*listed, tokenizer.eos_token_id] if token is not None)


class Draw:
    """How the tokens of one request are drawn, and what was. It outlives the request's place in the cache, so copies of
    the request's state keep it: it has no copies."""

    def __init__(
        self,
        sampling: Sampling,
        matcher: llguidance.LLMatcher | None = None,
        prompt: Sequence[int] = (),
        adapter: Adapter | None = None,
    ) -> None:
        """`adapter`: what the request's tokens go through."""
        self.sampling, self.matcher, self.adapter = sampling, matcher, adapter
        self.reports: list[Token] = []
        self._drawn: Counter[int] = Counter()
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed % 2**64)
        self._penalised = bool(sampling.frequency_penalty or sampling.presence_penalty)
        self._repels = sampling.repetition_penalty != 1
        self._prompt = set(prompt) if self._repels else set()
        remembers = self._penalised or self._repels or matcher is not None
        self.bends = remembers or bool(sampling.logit_bias)
        """Whether it changes logits."""
        self.notes = remembers or sampling.logprobs is not None
        """Whether it has to know what was drawn."""
        self.cuts = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
        """Whether only the likeliest tokens can be drawn."""
        self.plain = sampling.temperature == 0 and not self.bends and not self.notes

    def __deepcopy__(self, memo: dict[int, Any]) -> Draw:
        return self

    def uniform(self) -> float:
        """The next number of its own sequence, the same on every device."""
        return float(torch.rand((), dtype=torch.float64, generator=self._generator))

    def bend(self, scores_V: Tensor) -> None:
        """In place."""
        sampling = self.sampling
        if self._repels:
            tokens = list(self._prompt | self._drawn.keys())
            found = scores_V[tokens]
            penalty = sampling.repetition_penalty
            scores_V[tokens] = torch.where(found > 0, found / penalty, found * penalty)
        if sampling.logit_bias:
            scores_V[list(sampling.logit_bias)] += scores_V.new_tensor(list(sampling.logit_bias.values()))
        if self._penalised and self._drawn:
            counts = scores_V.new_tensor(list(self._drawn.values()))
            scores_V[list(self._drawn)] -= sampling.frequency_penalty * counts + sampling.presence_penalty
        if self.matcher is not None:
            bits = allocate_token_bitmask(1, len(scores_V))
            fill_next_token_bitmask(self.matcher, bits)
            allowed = torch.from_numpy(bits.view("uint8")).flatten()
            allowed_V = (allowed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
            refused_V = allowed_V.flatten()[: len(scores_V)] == 0
            scores_V.masked_fill_(refused_V.to(scores_V.device), -torch.inf)

    def note(self, token: int, logits_V: Tensor) -> None:
        """`token` was drawn where the model said `logits_V`."""
        if self.sampling.logprobs is not None:
            self.reports.append(report(logits_V.log_softmax(-1), token, self.sampling.logprobs))
        self._drawn[token] += 1
        if self.matcher is not None:
            self.matcher.consume_token(token)


def draw(draws: list[Draw], logits_RV: Tensor) -> Tensor:
    """(R) The next token of each request."""
    scores_RV = logits_RV.clone() if any(each.bends for each in draws) else logits_RV
    for each, scores_V in zip(draws, scores_RV, strict=True):
        if each.bends:
            each.bend(scores_V)
    tokens_R = _likeliest(scores_RV)
    sampled = [i for i, each in enumerate(draws) if each.sampling.temperature > 0]
    # Apart, so that who shares the step has no say in what a request draws.
    for some in ([i for i in sampled if draws[i].cuts], [i for i in sampled if not draws[i].cuts]):
        if some:
            tokens_R[some] = _sampled([draws[i] for i in some], scores_RV[some])
    if noting := [i for i, each in enumerate(draws) if each.notes]:
        tokens = tokens_R.tolist()  # waits for a GPU: once for all
        for i in noting:
            draws[i].note(tokens[i], logits_RV[i])
    return tokens_R


def _likeliest(scores_RV: Tensor) -> Tensor:
    """(R) On processors by NumPy, whose argmax takes a tenth of the time."""
    return scores_RV.argmax(-1) if scores_RV.is_cuda else torch.from_numpy(scores_RV.float().numpy().argmax(-1))


def _sampled(draws: list[Draw], scores_RV: Tensor) -> Tensor:
    """By the inverse of each request's cumulative distribution; in double precision, since small parts add up. All of
    them cut, or none."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=scores_RV.device)[:, None]

    asked, order_RV = [each.sampling for each in draws], None
    scores_RV = scores_RV / column([each.temperature for each in asked])
    if draws[0].cuts:
        scores_RV, order_RV = scores_RV.sort(-1, descending=True)
        places_V = torch.arange(scores_RV.shape[1], device=scores_RV.device)
        beyond_RV = places_V >= column([each.top_k or len(places_V) for each in asked])
        probs_RV = scores_RV.masked_fill(beyond_RV, -torch.inf).softmax(-1)
        # The smallest set whose probability reaches top_p: a token belongs to it where those before it do not.
        before_RV = probs_RV.cumsum(-1) - probs_RV
        kept_RV = before_RV < column([each.top_p for each in asked])
        kept_RV &= probs_RV >= column([each.min_p for each in asked]) * probs_RV[:, :1]
        kept_RV |= places_V == 0
        probs_RV = probs_RV * kept_RV
    else:
        probs_RV = scores_RV.softmax(-1)
    reached_RV = probs_RV.cumsum(-1)
    wanted_R1 = column([each.uniform() for each in draws]) * reached_RV[:, -1:]
    found_R1 = torch.searchsorted(reached_RV, wanted_R1, right=True)
    return (found_R1 if order_RV is None else order_RV.gather(-1, found_R1))[:, 0]


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
        rows = [i for i, each in enumerate(self._draws[: len(scores)]) if not each.plain]
        if rows:
            scores[rows, draw([self._draws[i] for i in rows], scores[rows])] = torch.inf
        return scores


def report(logprobs_V: Tensor, token: int, top: int) -> Token:
    values, ids = logprobs_V.topk(min(top, len(logprobs_V)))
    return Token(token, float(logprobs_V[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
