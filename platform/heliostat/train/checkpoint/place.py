"""Where checkpoints lie: a folder that every node sees, or an object store."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs
from torch.distributed.checkpoint.filesystem import FileSystem

from heliostat.recipe import Refused, write_atomically

BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class Place:
    """A folder on one of pyarrow's file systems."""

    filesystem: pa.fs.FileSystem
    path: str

    @classmethod
    def at(cls, address: Path | str) -> Place:
        """Of a path, or an address such as `s3://BUCKET/FOLDER`; options, such as an endpoint of one's own, follow it
        after a question mark, and credentials are those of the environment."""
        if "://" not in str(address):
            return cls(pa.fs.LocalFileSystem(), str(Path(address).expanduser().absolute()))
        try:
            filesystem, path = pa.fs.FileSystem.from_uri(str(address))
        except (OSError, pa.ArrowInvalid) as error:
            raise Refused("checkpoint.storage", f"{address} cannot be used: {error}") from error
        return cls(filesystem, path.rstrip("/"))

    @property
    def local(self) -> bool:
        return isinstance(self.filesystem, pa.fs.LocalFileSystem)

    def __truediv__(self, name: str) -> Place:
        return Place(self.filesystem, f"{self.path}/{name}")

    def __str__(self) -> str:
        return self.path if self.local else f"{self.filesystem.type_name}://{self.path}"

    def folders(self) -> dict[str, dict[str, int]]:
        """The folders in this one, and the files in each with their bytes; empty where there is nothing."""
        # Recursive, since object stores have no folders, and some do not even make them up.
        selector = pa.fs.FileSelector(self.path, recursive=True, allow_not_found=True)
        found: dict[str, dict[str, int]] = {}
        for info in self.filesystem.get_file_info(selector):
            folder, _, name = info.path[len(self.path) + 1 :].partition("/")
            if info.type == pa.fs.FileType.Directory:
                found.setdefault(folder, {})
            elif name:
                found.setdefault(folder, {})[name] = info.size
        return found

    def make(self) -> None:
        if self.local:  # an object store has none
            Path(self.path).mkdir(parents=True, exist_ok=True)

    def remove(self) -> None:
        """With all that is in it; it need not be there."""
        if self.filesystem.get_file_info(self.path).type == pa.fs.FileType.Directory:
            # Google's misses the folder itself once its files are gone.
            with suppress(FileNotFoundError):
                self.filesystem.delete_dir(self.path)

    def read(self, name: str) -> bytes:
        with self.filesystem.open_input_stream(f"{self.path}/{name}") as stream:
            return bytes(stream.read())

    def publish(self, name: str, text: str) -> None:
        """Write a file that others see whole or not at all."""
        if self.local:
            write_atomically(Path(self.path) / name, text)
        else:
            with self.filesystem.open_output_stream(f"{self.path}/{name}") as stream:
                stream.write(text.encode())

    def digest(self, name: str) -> str:
        hashed = hashlib.sha256()
        with self.filesystem.open_input_stream(f"{self.path}/{name}") as stream:
            while block := stream.read(BLOCK_BYTES):
                hashed.update(block)
        return hashed.hexdigest()


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
