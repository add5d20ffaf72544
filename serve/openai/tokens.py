"""What requests give as text or as tokens, one or several."""

from __future__ import annotations

from typing import Any

from serve.openai.protocol import Problem

Given = str | list[str] | list[int] | list[list[int]]


def as_tokens(given: Given, tokenizer: Any, vocab_size: int, param: str) -> list[list[int]]:
    """Each of them as tokens. Raises Problem for no text at all, and for tokens that there are not."""
    if given == []:
        raise Problem(400, f"{param}: an empty list", param)
    several = isinstance(given, list) and not isinstance(given[0], int)
    listed: list[Any] = list(given) if several else [given]
    found = [tokenizer(item)["input_ids"] if isinstance(item, str) else list(item) for item in listed]
    if wrong := [token for one in found for token in one if not 0 <= token < vocab_size]:
        raise Problem(400, f"{param}: there is no token {wrong[0]}", param)
    return found
