"""Whether a converted file is the model that it was converted from: its log-probabilities beside the bundle's."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from heliostat.generate import Token

TEXTS = (
    "A heliostat turns to keep the sun's rays on one target; a field of them melts salt.",
    'def area(radius: float) -> float:\n    return 3.14159 * radius ** 2\n\nprint(area(2.5), "m2")',
    "1 234,56 € — 东京 🌞 Où est la gare ? Straße, 42% @ 19:05.",
)
SHORT_TOKENS, LONG_TOKENS, LAST_TOKENS = 20, 400, 4
"""Looked at: the beginning of each text, and the end of a long one, where a mistake in the positions shows."""
TOP = 10
"""Tokens compared at each place, beside the text's own."""


class Scores(Protocol):
    max_length: int

    async def score_from(self, ids: list[int], first: int, top: int) -> list[Token]:
        """Log-probabilities of the tokens from the place `first` on, with the `top` likeliest."""


@dataclass(frozen=True)
class Parity:
    """Differences of log-probabilities, in units of the spread of the bundle's over the vocabulary at that place: the
    log-probabilities of a model that is not trained lie close together."""

    mean: float
    worst: float
    top: float
    """By how much the bundle's likeliest token exceeds the file's, at worst."""


@torch.inference_mode()
def parity(engine: Scores, model: Any, tokenizer: Any) -> Parity:
    """For the bundle's `model` in float32."""
    short = [tokenizer(text)["input_ids"][:SHORT_TOKENS] for text in TEXTS]
    long = tokenizer(" ".join(TEXTS * 20))["input_ids"][: min(LONG_TOKENS, engine.max_length)]
    looks = [(ids, 1) for ids in short] + [(long, len(long) - LAST_TOKENS)]
    differences, tops = [], []
    for ids, first in looks:
        found = asyncio.run(engine.score_from(ids, first, TOP))
        logprobs_TV = model(torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)
        for place, token in enumerate(found, start=first - 1):
            logprobs_V = logprobs_TV[place]
            spread = logprobs_V.std()
            compared = [(token.id, token.logprob), *token.top]
            # JSON has no word for what is not a number.
            values = torch.tensor([torch.nan if value is None else value for _, value in compared])
            difference = logprobs_V[[other for other, _ in compared]] - values
            differences.append((difference / spread).abs())
            tops.append((logprobs_V.max() - logprobs_V[token.top[0][0]]) / spread)
    all_ = torch.cat(differences)
    return Parity(float(all_.mean()), float(all_.max()), float(torch.stack(tops).max()))
