"""Generating text: one narrow interface, and the engines behind it.

Shapes: R requests of a step that get a token, T tokens of a text, V vocabulary.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one answer are drawn."""

    max_tokens: int
    temperature: float = 1.0
    """0: always the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """0: all tokens."""
    min_p: float = 0.0
    """Tokens are left out that are less likely than so much of the likeliest (Nguyen et al. 2024, arXiv:2407.01082)."""
    seed: int | None = None
    """The same seed draws the same tokens from the same logits."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for each time it was drawn before; `presence_penalty` once."""
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    """What the logit of a token of the prompt, or that was drawn before, is divided by; multiplied, where it is below 0
    (Keskar et al. 2019, arXiv:1909.05858)."""
    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    """How many of the likeliest tokens to report beside the drawn one, with log-probabilities; None: nothing."""
    grammar: str = ""
    """What the text must follow, in llguidance's Lark. Empty: nothing."""
    ignore_end: bool = False
    """Go on behind the end-of-text token, up to `max_tokens`: for load generators."""


@dataclass(frozen=True)
class Token:
    id: int
    logprob: float | None = None
    """Of the model itself: before temperature, penalties, bias and grammar. None where nobody asked."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens with their log-probabilities, likeliest first."""


class EngineFailed(RuntimeError):
    """The engine cannot go on with a request, for no fault of the request."""


class Engine(Protocol):
    tokenizer: Any
    max_length: int
    """Tokens of a prompt and its answer together."""
    vocab_size: int
    end_ids: frozenset[int]
    """Tokens that end an answer; the last of an answer that ended by itself is one of them."""

    def generate(self, prompt: list[int], sampling: Sampling) -> AsyncGenerator[list[Token], None]:
        """Tokens as they come. Closing the iterator gives the request up. Raises EngineFailed."""

    async def score(self, ids: list[int], top: int) -> list[Token]:
        """How likely the model holds each token after those before it; the first has no log-probability."""

    def check_sampling(self, sampling: Sampling) -> None:
        """Raises Refused for what this engine would draw otherwise; of the grammar `check_grammar` says it."""

    def check_grammar(self, grammar: str) -> None:
        """Raises Refused for what is no grammar."""

    def token_bytes(self, token: int) -> bytes: ...

    def check(self) -> None:
        """Raises EngineFailed for an engine that answers no more."""

    def close(self) -> None:
        """Ends the engine once what it has begun is done."""
