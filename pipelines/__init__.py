"""Jobs: `python -m pipelines.X RECIPE [overrides]`."""

import sys

if sys.argv[:1] == ["-m"] and sys.stderr.isatty():
    # Importing PyTorch, transformers and Ray takes seconds, in which nothing else could be said.
    print("heliostat: loading …", file=sys.stderr, flush=True)
