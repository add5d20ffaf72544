"""How torch.distributed.checkpoint writes to a place and reads from it."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.fs
from torch.distributed.checkpoint.filesystem import FileSystem

from heliostat.place import Place


class Streams(FileSystem):
    """How torch.distributed.checkpoint opens a place's files. `written`: bytes and SHA-256 of those it wrote, by name,
    taken as they passed by."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.written: dict[str, dict[str, Any]] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        path = os.fspath(path)
        if mode == "rb":
            with open(path, "rb") if self.place.local else self.place.filesystem.open_input_file(path) as stream:
                yield stream
            return
        inner = open(path, "wb") if self.place.local else self.place.filesystem.open_output_stream(path)  # noqa: SIM115
        with inner:
            hashed = _Hashed(inner)
            yield hashed
        name = path.rpartition("/")[2]
        self.written[name] = {"bytes": hashed.position, "sha256": hashed.hash.hexdigest()}

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        return f"{os.fspath(path)}/{suffix}"

    def init_path(self, path: str | os.PathLike[str]) -> str:
        return os.fspath(path)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        old, new = os.fspath(path), os.fspath(new_path)
        self.place.filesystem.move(old, new)
        self.written[new.rpartition("/")[2]] = self.written.pop(old.rpartition("/")[2])

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        Place(self.place.filesystem, os.fspath(path)).make()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def exists(self, path: str | os.PathLike[str]) -> bool:
        return bool(self.place.filesystem.get_file_info(os.fspath(path)).type != pa.fs.FileType.NotFound)

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        self.place.filesystem.delete_file(os.fspath(path))


class _Hashed(io.IOBase):
    def __init__(self, stream: Any) -> None:
        self.stream, self.hash, self.position = stream, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.stream.write(view)
        self.hash.update(view)
        self.position += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        return self.position

    def writable(self) -> bool:
        return True

    def flush(self) -> None:
        if not self.stream.closed:
            self.stream.flush()

    def fileno(self) -> int:
        return int(self.stream.fileno())
