"""/v1/embeddings: a vector for each text."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from heliostat.predictor import Predictor
from serve.openai.protocol import EmbeddingRequest, Problem
from serve.openai.tokens import as_tokens


def tokens_of(request: EmbeddingRequest, predictor: Predictor, max_inputs: int) -> list[list[int]]:
    """Of each input. Raises Problem for what cannot be embedded: nothing is cut off a text that is too long."""
    config = predictor.model.config.get_text_config()
    width, limit = config.hidden_size, predictor.bundle.recipe.model.max_length
    if request.dimensions not in (None, width):
        raise Problem(400, f"dimensions: this model's vectors have {width}, which cannot be shortened", "dimensions")
    given = [request.input] if isinstance(request.input, str) else request.input
    if "" in given or [] in given:
        raise Problem(400, "input: an empty text", "input")
    found = as_tokens(request.input, predictor.processor, config.vocab_size, "input")
    if len(found) > max_inputs:
        raise Problem(400, f"input: {len(found)} are more than the {max_inputs} of one request", "input")
    for number, ids in enumerate(found):
        if len(ids) > limit:
            raise Problem(
                400,
                f"This model's maximum context length is {limit} tokens. However, input.{number} has {len(ids)}.",
                "input",
                "context_length_exceeded",
            )
    return found


def whole(request: EmbeddingRequest, vectors: list[list[float]], num_tokens: int) -> dict[str, Any]:
    """The answer. In base64 vectors are float32, the least significant byte first."""
    given: list[Any] = vectors
    if request.encoding_format == "base64":
        given = [base64.b64encode(np.array(vector, "<f4").tobytes()).decode() for vector in vectors]
    return {
        "object": "list",
        "model": request.model,
        "data": [{"object": "embedding", "index": i, "embedding": each} for i, each in enumerate(given)],
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
