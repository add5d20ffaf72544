"""/v1/completions: text that goes on."""

from __future__ import annotations

from typing import Any

from heliostat.generate import Sampling, Token
from serve.openai.answer import Answer, Piece, Take
from serve.openai.protocol import CompletionRequest, Problem
from serve.openai.tokens import as_tokens

DEFAULT_TOKENS = 16
FILL_IN_THE_MIDDLE = [
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen Coder, Code Gemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek Coder
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
]
"""The tokens before prefix, suffix and middle, by which models were trained to fill in."""


class CompletionAnswer(Answer):
    request: CompletionRequest
    id_prefix, object, chunk = "cmpl", "text_completion", "text_completion"

    def drawing(self) -> tuple[list[list[int]], Sampling]:
        request, asked = self.request, self.request.max_tokens
        if request.best_of not in (None, request.n or 1):
            raise Problem(400, "best_of: only the value of n is supported", "best_of")
        if asked == 0 and not request.echo:
            raise Problem(400, "max_tokens: 0 needs echo", "max_tokens")
        prompts = self._prompts()
        room = min(self.room(prompt, asked, "prompt", DEFAULT_TOKENS) for prompt in prompts)
        self._offsets = [0] * len(prompts) * (request.n or 1)
        return prompts, self.sampling(0 if asked == 0 else room, request.logprobs)

    def _prompts(self) -> list[list[int]]:
        tokenizer, prompt = self.engine.tokenizer, self.request.prompt
        if self.request.suffix is not None:
            if not isinstance(prompt, str) or self.request.echo:
                raise Problem(400, "suffix: needs a prompt that is one text, and no echo", "suffix")
            return [fill_in_the_middle(tokenizer, prompt, self.request.suffix)]
        prompts = as_tokens(prompt, tokenizer, self.engine.vocab_size, "prompt")
        # Nothing at all begins as documents do.
        begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return [one or [begin] for one in prompts]

    async def draw(self, take: Take) -> None:
        if self.request.echo:
            for index, question in enumerate(self.questions):
                take(index, await self._echo(question.prompt))
        if self.questions[0].sampling.max_tokens:
            await super().draw(take)
            return
        for index in range(len(self.questions)):
            take(index, Piece(finish="length"))

    async def _echo(self, prompt: list[int]) -> Piece:
        if self.request.logprobs is None:
            tokens = [Token(token) for token in prompt]
        else:
            tokens = await self.engine.score(prompt, self.request.logprobs)
        return Piece(self.engine.tokenizer.decode(prompt, skip_special_tokens=True), tokens)

    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        logprobs = None
        if self.request.logprobs is not None:
            texts = [self.token_text(token.id) for token in piece.tokens]
            offsets = []
            for text in texts:
                offsets.append(self._offsets[index])
                self._offsets[index] += len(text)
            logprobs = {
                "tokens": texts,
                "token_logprobs": [token.logprob for token in piece.tokens],
                "top_logprobs": [
                    None if token.logprob is None else {self.token_text(other): value for other, value in token.top}
                    for token in piece.tokens
                ],
                "text_offset": offsets,
            }
        return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish}


def fill_in_the_middle(tokenizer: Any, prefix: str, suffix: str) -> list[int]:
    """Raises Problem for a vocabulary without the tokens for it."""
    vocabulary = tokenizer.get_vocab()
    for marks in FILL_IN_THE_MIDDLE:
        if all(mark in vocabulary for mark in marks):
            first, last = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prefix, suffix))
            before_prefix, before_suffix, before_middle = (vocabulary[mark] for mark in marks)
            return [before_prefix, *first, before_suffix, *last, before_middle]
    raise Problem(400, "suffix: this model's vocabulary has no tokens for filling in the middle", "suffix")
