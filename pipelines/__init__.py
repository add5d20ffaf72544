"""Jobs: `python -m pipelines.X RECIPE [overrides]`."""

import sys

WITH_RECIPE = {
    "bundle",
    "deploy",
    "drift",
    "drill",
    "evaluate",
    "lifecycle",
    "predict",
    "prepare",
    "prove",
    "register",
    "rollout",
    "train",
    "tune",
}
"""Jobs whose words are read by `pipelines.job.parse`."""


def _begin() -> None:
    """Before a job's own imports: PyTorch, transformers and Ray take seconds, in which nothing else could be said, and
    after which nobody wants to hear of a misspelt word."""
    if sys.stderr.isatty():
        print("heliostat: loading …", file=sys.stderr, flush=True)
    name = sys.orig_argv[-len(sys.argv)].rpartition(".")[2]  # the module's, in front of the words
    if name in WITH_RECIPE:
        from pipelines.job import unread

        code = unread(name, sys.argv[1:])
        if code is not None:
            sys.exit(code)


if sys.argv[:1] == ["-m"]:
    _begin()
