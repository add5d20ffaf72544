"""Lines that processes print, with their time, in files that stay small; and files that grow, read as they do."""

from __future__ import annotations

import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

LOGS = "logs"
"""In the record's folder."""
DRIVER = "driver"
"""The log of the job's own process."""
FILE_BYTES = 1 << 20
"""A log goes on in its next file once one is longer."""
LINE_CHARACTERS = 16_384
READ_BYTES = 4 << 20
TRAIN_WORKER = "RayTrainWorker"
"""By Ray's name of it: what it prints, Ray Train logs besides, which prints it on its standard error too."""
REMEMBERED = 1000
STYLE = re.compile(r"\x1b\[[0-9;]*m")
DRAWN = re.compile(r"\r(?!\n)|\x1b\[[0-9;?]*[A-HJKfhlsu]")
"""A terminal's cursor moves: the text is a picture that is drawn over, such as a progress bar."""
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


class Log:
    """What one process prints. Threads may share it."""

    def __init__(self, folder: Path, hide: Callable[[str], str], most_bytes: int | None = None) -> None:
        """`hide`: takes secrets out of a line. `most_bytes`: after these it takes no more, and says so; None: another
        process takes care."""
        self.folder, self.hide, self.most_bytes = folder, hide, most_bytes
        folder.mkdir(parents=True, exist_ok=True)
        self.number = max((int(file.stem) for file in folder.glob("*.log")), default=0)
        self.written = 0
        self._file_bytes = FILE_BYTES
        self._lock = threading.RLock()

    def write(self, lines: Iterable[str]) -> None:
        """Raises OSError where there is no room."""
        stamp = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        with self._lock:
            texts = []
            for line in lines:
                if self.most_bytes is not None and self.written > self.most_bytes:
                    break
                texts.append(f"{stamp} {self.hide(clean(line))}\n".encode())
                self.written += len(texts[-1])
                if self.most_bytes is not None and self.written > self.most_bytes:
                    texts.append(f"{stamp} nothing more is recorded: record.max_bytes\n".encode())
            if texts:
                self._append(b"".join(texts))

    def _append(self, text: bytes) -> None:
        if self._file_bytes >= FILE_BYTES:
            self.number, self._file_bytes = self.number + 1, 0
        # Open no longer than for this: a job may have a thousand workers, and a network's file system sends what was
        # written once a file is closed. One write: a process that is killed has lost nothing that it had printed.
        file = os.open(self.folder / f"{self.number:06d}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            self._file_bytes += os.write(file, text)
        finally:
            os.close(file)


def clean(line: str) -> str:
    """One line of text as it would stand on paper."""
    text = UNPRINTABLE.sub("", STYLE.sub("", line.rstrip("\r").rpartition("\r")[2]))
    if len(text) > LINE_CHARACTERS:
        text = f"{text[:LINE_CHARACTERS]} … {len(text) - LINE_CHARACTERS} more characters"
    return text


def log_name(ip: str, pid: int | str) -> str:
    """Of a worker's log."""
    return f"{ip}-{pid}"


class Tail:
    """The lines that a file gets as it grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset, self._rest = 0, b""

    def lines(self, last: bool = False) -> list[str]:
        """Those that are new and whole; `last`: also one that nobody will end. None where the file is gone."""
        data = b""
        with suppress(OSError):
            size = self.path.stat().st_size
            if size < self._offset:  # it was cut, and begins anew
                self._offset, self._rest = 0, b""
            if size > self._offset:
                with self.path.open("rb") as stream:
                    stream.seek(self._offset)
                    data = stream.read(-1 if last else READ_BYTES)
        self._offset += len(data)
        *whole, self._rest = (self._rest + data).split(b"\n")
        if last and self._rest:
            whole, self._rest = [*whole, self._rest], b""
        return [line.decode("utf-8", errors="replace") for line in whole]


class Once:
    """Of a worker that prints all on both of its streams, each line once."""

    def __init__(self) -> None:
        self._unmatched: dict[bool, deque[str]] = {error: deque(maxlen=REMEMBERED) for error in (False, True)}
        """By stream, those that the other has not had."""

    def take(self, lines: list[str], error: bool) -> list[str]:
        """Those that are new. `error`: they are from the standard error."""
        other, new = self._unmatched[not error], list[str]()
        for line in lines:
            if line in other:
                other.remove(line)
            else:
                new.append(line)
        self._unmatched[error].extend(new)
        return new


class Rotation:
    """Keeps a record's logs below a size: the oldest files go, but never the last one of a log."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder, self.most_bytes = folder, most_bytes

    def turn(self) -> tuple[int, int]:
        """How many files went, and their bytes."""
        sizes: dict[Path, int] = {}
        free: list[tuple[float, Path]] = []
        for log in self.folder.iterdir() if self.folder.is_dir() else []:
            files = sorted(log.glob("*.log"))
            for file in files:
                with suppress(FileNotFoundError):
                    found = file.stat()
                    sizes[file] = found.st_size
                    if file != files[-1]:
                        free.append((found.st_mtime, file))
        total, gone, gone_bytes = sum(sizes.values()), 0, 0
        for _, file in sorted(free):
            if total - gone_bytes <= self.most_bytes:
                break
            file.unlink(missing_ok=True)
            gone, gone_bytes = gone + 1, gone_bytes + sizes[file]
        return gone, gone_bytes


def read_log(folder: Path) -> Iterator[str]:
    """A log's lines, with their time in front."""
    for file in sorted(folder.glob("*.log")):
        yield from file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
