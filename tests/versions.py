"""Tasks of bundles that do harm when they are served, and a judge of answers."""

from __future__ import annotations

import itertools
import time
from typing import Any

from heliostat.tasks.text_classification import TextClassification
from tests.recipes import WORDS

LABELLED = WORDS[:7], WORDS[8:]
"""Words of dark and of bright texts alone (`tests.recipes.text_file`)."""


class Failing(TextClassification):
    """Every third forward pass raises, from the fourth on: the first ones are those of loading."""

    passes = itertools.count()

    def predictions(self, outputs: Any, batch: Any) -> list[dict[str, Any]]:
        number = next(self.passes)
        if number > 3 and number % 3 == 0:
            raise RuntimeError("as it was made to")
        return super().predictions(outputs, batch)


class Late(TextClassification):
    def predictions(self, outputs: Any, batch: Any) -> list[dict[str, Any]]:
        time.sleep(0.1)
        return super().predictions(outputs, batch)


def right(request: Any, answer: Any) -> float:
    """Whether the label is the one that the words decide."""
    label = "dark" if request["inputs"][0]["text"].split()[0] in LABELLED[0] else "bright"
    return float(answer["predictions"][0]["label"] == label)
