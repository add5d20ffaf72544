"""`python -m pipelines.report JOB [--storage FOLDER] [--output FILE]`: the story of a job as one HTML file. JOB is a
run's name, its folder, where its record was shipped to (`s3://BUCKET/FOLDER/RUN`), or `last`."""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from heliostat.place import Place
from heliostat.recipe import Recipe, Refused, nearest, write_atomically
from heliostat.record.events import RECORD
from heliostat.record.parts import fetch
from heliostat.report.page import render
from heliostat.report.story import newest, tell
from heliostat.train.folder import LEDGER
from pipelines.answer import answer

REPORT_FILE = "story.html"
"""In the run's record. What is written right into a run's folder would make it the newest run."""


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job")
    parser.add_argument("--storage", default=Recipe.model_fields["storage"].default)
    parser.add_argument("--output", default="", help=f"empty: {REPORT_FILE} in the run's record, or RUN.html here")
    return parser.parse_args(words)


@contextmanager
def found(job: str, storage: Path) -> Iterator[tuple[Path, Path]]:
    """A run's folder, or a copy of what is left of it for as long as the block lasts; and where its report goes."""
    if "://" in job:
        with tempfile.TemporaryDirectory() as scratch:
            place = Place.at(job, "job")
            folder = Path(scratch) / place.path.rpartition("/")[2]
            if not fetch(place / RECORD, folder):
                raise Refused("job", f"{job} holds no record", "name the folder of one run: s3://BUCKET/FOLDER/RUN")
            yield folder, Path(f"{folder.name}.html")
        return
    runs = storage / "runs"
    folder = (newest(runs) or runs / job) if job == "last" else runs / job
    if not folder.is_dir():
        folder = Path(job).expanduser().absolute()
    if not any((folder / name).exists() for name in (RECORD, LEDGER, "result.json")):
        names = [path.name for path in runs.glob("*/")]
        raise Refused("job", f"no run {job!r} in {runs}, and no such folder", nearest(job, names))
    yield folder, folder / RECORD / REPORT_FILE if (folder / RECORD).is_dir() else Path(f"{folder.name}.html")


def run(options: argparse.Namespace) -> dict[str, Any]:
    with found(options.job, Path(options.storage).expanduser()) as (folder, file):
        story = tell(folder)
        path = Path(options.output).expanduser().absolute() if options.output else file.absolute()
        if not path.parent.is_dir():
            raise Refused("output", f"{path.parent} is no folder")
        write_atomically(path, render(story))
        print(f"{story.folder.name}: {story.status} {story.reason}", flush=True)
    told = {"run": story.folder.name, "run_status": story.status, "reason": story.reason}
    return {"report": str(path)} | told | {"ended": story.ended}


def main() -> int:
    options = parse(sys.argv[1:])
    return answer("report", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
