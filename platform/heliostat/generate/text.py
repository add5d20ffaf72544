"""Tokens as text, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CONTEXT_TOKENS = 8
"""Of the prompt, that the first token of an answer is decoded behind: some tokenizers write a space only there."""


class TextStream:
    """The text of an answer as its tokens come. What may be the beginning of a stop string is held back until it is
    known not to be one; half a character, until the other half is there."""

    def __init__(self, tokenizer: Any, prompt: list[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._ids = prompt[-CONTEXT_TOKENS:]
        self._first, self._decoded = 0, len(self._ids)
        """Text is known of the tokens before the second place, and decoded from the first on: behind some tokens, since
        a decoder may treat a text's beginning otherwise."""
        self._stop, self._held = tuple(stop), ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that is sure. Once `stopped`, an answer's text has ended before a stop string."""
        self._ids.append(token)
        self._decode(last=False)
        found = [place for text in self._stop if (place := self._held.find(text)) >= 0]
        if found:
            self.stopped = True
            return self._shown(min(found))
        return self._shown(len(self._held) - max((_overlap(self._held, text) for text in self._stop), default=0))

    def rest(self) -> str:
        """What was held back, when nothing more comes."""
        if self.stopped:
            return ""
        self._decode(last=True)
        return self._shown(len(self._held))

    def _decode(self, last: bool) -> None:
        before = self._tokenizer.decode(self._ids[self._first : self._decoded])
        text = self._tokenizer.decode(self._ids[self._first :])
        if last or not text.endswith("\ufffd"):
            self._held += text[len(before) :]
            self._first, self._decoded = self._decoded, len(self._ids)

    def _shown(self, count: int) -> str:
        shown, self._held = self._held[:count], self._held[count:]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Characters at the text's end that begin a stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
