"""Tasks of bundles that do harm when they are served, and a judge of answers."""

from __future__ import annotations

import itertools
import time
from typing import Any

from heliostat.tasks.text_classification import TextClassification
from tests.recipes import WORDS


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
    """Whether the label is the one that the words decide (`tests.recipes.text_file`)."""
    found = zip(request["inputs"], answer["predictions"], strict=True)
    labels = ["dark" if item["text"].split()[-1] in WORDS[:7] else "bright" for item, _ in found]
    return sum(each["label"] == label for each, label in zip(answer["predictions"], labels, strict=True)) / len(labels)
