"""A run's story in an object store, which can append to nothing: what is new goes there in numbered parts, which are
folded into one now and then.

PLACE/part-00000012.jsonl    what files got since part 11
PLACE/whole-00000011.jsonl   all that there was until then: it says the same as what came before it, and more
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from heliostat.place import Place

PART, WHOLE = "part-", "whole-"
STORY = ("*.json", "*.jsonl", "ledger/*", "stacks/*", "record/alive", "record/events/*", "record/logs/*/*")
"""What of a run's folder tells its story; not its weights and rows."""
GROWING = (".jsonl", ".log")
"""Files that are only ever appended to, line by line."""
PART_BYTES = 8 << 20
"""What is left of a growing file goes with the next part."""
LONGEST_BYTES = 16 << 20
"""A file that is written anew is left out once it is longer."""
TRIES = 5
DELETERS = 16
"""Threads: a store takes several requests to delete an object, and meanwhile there is more to ship."""
FOLD_PARTS = 300
FOLD_BYTES = 32 << 10
"""Parts are folded once there are so many, and one for so many bytes of the whole."""


class Shipper:
    """Ships a run's folder to a place in which nobody else writes."""

    def __init__(self, run_dir: Path, place: Place, hide: Callable[[str], str]) -> None:
        self.run_dir, self.place, self.hide = run_dir, place, hide
        self._shipped: dict[str, Any] = {}
        """By file: how many bytes of it where it grows, else its time and size."""
        self._number: int | None = None
        self._first = self._parts = self._whole_bytes = 0
        self._pool = ThreadPoolExecutor(DELETERS)
        self._going: list[Future[None]] = []

    def ship(self) -> None:
        """What is new, if there is something. Raises OSError where the place does not take it, which then is tried with
        the next call."""
        if self._number is None:  # an earlier session may have shipped parts of these files
            self.place.make()
            self._first = self._number = max((number for _, number in numbered(self.place)), default=0)
            self.fold()
            return
        news, shipped = self._news(self._shipped, PART_BYTES)
        if not news:
            return
        self.place.publish(f"{PART}{self._number + 1:08d}.jsonl", _text(news))
        self._number, self._shipped, self._parts = self._number + 1, shipped, self._parts + 1
        if self._parts >= max(FOLD_PARTS, self._whole_bytes // FOLD_BYTES):
            self.fold()

    def fold(self) -> None:
        """Replace this shipper's parts by one file, which is there before they go; they go in the background."""
        assert self._number is not None
        news, shipped = self._news({}, None)
        text, number = _text(news), self._number + 1
        self.place.publish(f"{WHOLE}{number:08d}.jsonl", text)
        self._number, self._shipped, self._parts, self._whole_bytes = number, shipped, 0, len(text)
        self._delete(number - 1)

    def withdraw(self) -> None:
        """Nothing was shipped."""
        self._delete(self._number or 0)
        self.settle()

    def settle(self) -> None:
        """Until what is replaced is gone."""
        wait(self._going)

    def _delete(self, last: int) -> None:
        self._going = [each for each in self._going if not each.done()]
        for name, number in numbered(self.place):
            if self._first < number <= last:  # those of another session may be all that is left of it
                self._going.append(self._pool.submit(self.place.delete, name))

    def _news(self, shipped: dict[str, Any], most_bytes: int | None) -> tuple[list[dict[str, str]], dict[str, Any]]:
        """What differs from what was shipped, as instructions to `fetch`; and what will have been shipped with them."""
        news: list[dict[str, str]] = []
        after: dict[str, Any] = {}
        left = most_bytes
        for file in self._files():
            name = file.relative_to(self.run_dir).as_posix()
            before = shipped.get(name)
            try:
                found = file.stat()
                if file.suffix not in GROWING:
                    after[name] = [found.st_mtime_ns, found.st_size]
                    if after[name] != before and found.st_size <= LONGEST_BYTES:
                        text = file.read_bytes().decode("utf-8", errors="replace")
                        news.append({"file": name, "whole": self.hide(text)})
                    continue
                begin = before or 0
                anew = before is None or found.st_size < begin
                begin = 0 if anew else begin
                data = b""
                if found.st_size > begin and (left is None or left > 0):
                    with file.open("rb") as stream:
                        stream.seek(begin)
                        data = stream.read() if left is None else stream.read(left)
                data = data[: data.rfind(b"\n") + 1]
            except FileNotFoundError:
                continue
            after[name] = begin + len(data)
            left = None if left is None else left - len(data)
            if data or anew:
                text = data.decode("utf-8", errors="replace")
                news.append({"file": name, "whole" if anew else "append": self.hide(text)})
        news += [{"file": name, "gone": ""} for name in shipped if name not in after]
        return news, after

    def _files(self) -> Iterator[Path]:
        for pattern in STORY:
            for file in sorted(self.run_dir.glob(pattern)):
                if not file.name.startswith(".") and file.is_file():  # those are still being written
                    yield file


def fetch(place: Place, folder: Path) -> bool:
    """Rebuild in `folder` what was shipped to a place; whether there was something."""
    for line in _read(place):
        with suppress(ValueError):  # a part that was cut
            _apply(json.loads(line), folder)
    return folder.exists()


def _read(place: Place) -> list[str]:
    """The lines of all parts, in their order."""
    for _ in range(TRIES):
        found = sorted(numbered(place), key=lambda each: each[1])
        with suppress(FileNotFoundError):  # folded, meanwhile
            return [line for name, _ in found for line in place.read(name).decode("utf-8").split("\n")]
    raise OSError(f"{place} changes faster than it can be read")


def _apply(news: dict[str, str], folder: Path) -> None:
    name = PurePosixPath(news["file"])
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(f"a part names {name}, which is outside of the run's folder")
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if "append" in news:
        with path.open("a", encoding="utf-8", newline="") as stream:
            stream.write(news["append"])
    elif "whole" in news:
        path.write_text(news["whole"], encoding="utf-8", newline="")
    else:
        path.unlink(missing_ok=True)


def numbered(place: Place) -> list[tuple[str, int]]:
    """A place's parts and wholes, with their numbers."""
    names = [name for name in place.files() if name.startswith((PART, WHOLE)) and name.endswith(".jsonl")]
    return [(name, int(os.path.splitext(name)[0].rpartition("-")[2])) for name in names]


def _text(news: list[dict[str, str]]) -> str:
    return "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in news)
