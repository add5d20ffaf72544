"""Tokens as text, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

CONTEXT_TOKENS = 8
"""Of the prompt, that the first token of an answer is decoded behind: some tokenizers write a space only there."""


class TextStream:
    """The text of an answer as its tokens come. What may be the beginning of a stop string is held back until it is
    known not to be one; half a character, until the other half is there."""

    def __init__(self, tokenizer: Any, prompt: list[int], stop: Sequence[str] = (), special: bool = False) -> None:
        """`special`: show special tokens too."""
        self._tokenizer = tokenizer.backend_tokenizer
        self._decoder = DecodeStream(ids=prompt[-CONTEXT_TOKENS:], skip_special_tokens=not special)
        self._stop, self._held = tuple(stop), ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that is sure. Once `stopped`, an answer's text has ended before a stop string."""
        self._held += self._decoder.step(self._tokenizer, token) or ""
        found = [place for text in self._stop if (place := self._held.find(text)) >= 0]
        if found:
            self.stopped = True
            self._held = self._held[: min(found)]
            return self.rest()
        sure = len(self._held) - max((_overlap(self._held, text) for text in self._stop), default=0)
        shown, self._held = self._held[:sure], self._held[sure:]
        return shown

    def rest(self) -> str:
        """What was held back, when nothing more comes."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Characters at the text's end that begin a stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
