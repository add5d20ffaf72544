"""A folder that every node sees, or one of an object store: where a run's checkpoints and its record lie."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.fs

from heliostat.recipe import Refused, write_atomically

BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class Place:
    """A folder on one of pyarrow's file systems."""

    filesystem: pa.fs.FileSystem
    path: str

    @classmethod
    def at(cls, address: Path | str, field: str = "checkpoint.storage") -> Place:
        """Of a path, or an address such as `s3://BUCKET/FOLDER`; options, such as an endpoint of one's own, follow it
        after a question mark, and credentials are those of the environment. `field`: what a refusal names."""
        if "://" not in str(address):
            return cls(pa.fs.LocalFileSystem(), str(Path(address).expanduser().absolute()))
        try:
            filesystem, path = pa.fs.FileSystem.from_uri(str(address))
        except (OSError, pa.ArrowInvalid) as error:
            raise Refused(field, f"{address} cannot be used: {error}") from error
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

    def files(self) -> list[str]:
        """The names of the files that lie right in it; none where there is nothing."""
        selector = pa.fs.FileSelector(self.path, recursive=True, allow_not_found=True)  # as above
        found = [info for info in self.filesystem.get_file_info(selector) if info.type == pa.fs.FileType.File]
        names = [info.path[len(self.path) + 1 :] for info in found]
        return [name for name in names if "/" not in name]

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

    def delete(self, name: str) -> None:
        """A file; it need not be there."""
        with suppress(FileNotFoundError):
            self.filesystem.delete_file(f"{self.path}/{name}")

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
