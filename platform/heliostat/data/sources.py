"""Where rows come from: `packaged:`, `hf://`, or Parquet, CSV, JSONL and Arrow files on any of pyarrow's
filesystems. A source is a list of parts; each is read by itself, so no process holds the whole."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset
import pyarrow.feather
import pyarrow.fs
import pyarrow.json
import pyarrow.parquet as pq

from heliostat.data.packaged import packaged_table
from heliostat.recipe import Refused

ROWS_PER_PART = 2048
FORMATS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".arrow": "feather",
    ".feather": "feather",
}


@dataclass(frozen=True)
class Part:
    """Some rows of a source, read when asked. `name` is what error messages call it."""

    name: str
    read: Callable[[], pa.Table]


def open_source(spec: str, field: str = "data.train") -> list[Part]:
    """The parts of a source. Raises Refused where there is nothing to read."""
    if not spec:
        raise Refused(
            field, "no source is given", "a file, a folder, s3://…, hf://USER/NAME/SPLIT, packaged:NAME/SPLIT"
        )
    if spec.startswith("packaged:"):
        table = packaged_table(spec.removeprefix("packaged:"), field)
        return [
            Part(f"{spec} from row {start}", partial(table.slice, start, ROWS_PER_PART))
            for start in range(0, table.num_rows, ROWS_PER_PART)
        ]
    filesystem, paths = _files(spec, field)
    parts = [part for path in paths for part in _file_parts(filesystem, path, field)]
    if not parts:
        raise Refused(field, f"{spec} holds no rows")
    return parts


def _files(spec: str, field: str) -> tuple[pa.fs.FileSystem, list[str]]:
    try:
        if spec.startswith("hf://"):
            filesystem, pattern = _hub(spec, field)
        elif "://" in spec:
            address, mark, options = spec.partition("?")
            folder, star, name = address.partition("*")
            folder, _, start = folder.rpartition("/") if star else (folder, "", "")
            # Options, such as an endpoint of one's own, follow the address; pyarrow knows them and credentials.
            filesystem, pattern = pa.fs.FileSystem.from_uri(f"{folder}{mark}{options}")
            pattern += f"/{start}*{name}" if star else ""
        else:
            from pathlib import Path

            filesystem, pattern = pa.fs.LocalFileSystem(), str(Path(spec).expanduser().absolute())
        if "*" in pattern:
            folder = pattern.partition("*")[0].rsplit("/", 1)[0]
            found = filesystem.get_file_info(pa.fs.FileSelector(folder, recursive=True))
            paths = [info.path for info in found if fnmatch.fnmatch(info.path, pattern)]
        else:
            info = filesystem.get_file_info(pattern)
            if info.type == pa.fs.FileType.NotFound:
                raise Refused(field, f"{spec} does not exist", "check the path")
            if info.type == pa.fs.FileType.Directory:
                found = filesystem.get_file_info(pa.fs.FileSelector(pattern, recursive=True))
                paths = [item.path for item in found if item.type == pa.fs.FileType.File]
            else:
                paths = [pattern]
    except (OSError, pa.ArrowInvalid) as error:
        raise Refused(field, f"cannot read {spec}: {error}") from error
    paths = sorted(path for path in paths if _format(path) and not path.rsplit("/", 1)[-1].startswith((".", "_")))
    if not paths:
        raise Refused(field, f"{spec} holds no file of a known format", f"known: {', '.join(FORMATS)}")
    return filesystem, paths


def _hub(spec: str, field: str) -> tuple[pa.fs.FileSystem, str]:
    """`hf://USER/NAME/SPLIT`: the Parquet files which the hub keeps of every data set."""
    parts = spec.removeprefix("hf://").split("/")
    if len(parts) not in (3, 4):
        raise Refused(field, f"{spec} is not of the form hf://USER/NAME[/CONFIG]/SPLIT")
    from huggingface_hub import HfFileSystem

    config, split = (parts[2], parts[3]) if len(parts) == 4 else ("default", parts[2])
    filesystem = pa.fs.PyFileSystem(pa.fs.FSSpecHandler(HfFileSystem()))
    return filesystem, f"datasets/{parts[0]}/{parts[1]}@refs%2Fconvert%2Fparquet/{config}/{split}/*.parquet"


def _format(path: str) -> str | None:
    return next((kind for ending, kind in FORMATS.items() if path.endswith(ending)), None)


def _file_parts(filesystem: pa.fs.FileSystem, path: str, field: str) -> list[Part]:
    try:
        if _format(path) == "parquet":
            with filesystem.open_input_file(path) as file:
                groups = pq.ParquetFile(file).num_row_groups
            return [
                Part(f"{path} row group {i}", partial(_read_group, filesystem, path, i, field)) for i in range(groups)
            ]
        return [Part(path, partial(_read_file, filesystem, path, field))]
    except (OSError, pa.ArrowInvalid) as error:
        raise Refused(field, f"cannot read {path}: {error}") from error


def _read_group(filesystem: pa.fs.FileSystem, path: str, group: int, field: str) -> pa.Table:
    try:
        with filesystem.open_input_file(path) as file:
            return pq.ParquetFile(file).read_row_group(group)
    except (pa.ArrowInvalid, OSError) as error:
        raise Refused(field, f"{path} cannot be read: {error}") from error


def _read_file(filesystem: pa.fs.FileSystem, path: str, field: str) -> pa.Table:
    readers: dict[str, Any] = {
        # Texts hold line breaks inside quotes.
        "csv": partial(pa.csv.read_csv, parse_options=pa.csv.ParseOptions(newlines_in_values=True)),
        "json": pa.json.read_json,
        "feather": pa.feather.read_table,
    }
    try:
        with filesystem.open_input_file(path) as file:
            return readers[_format(path) or ""](file)
    except (pa.ArrowInvalid, OSError) as error:
        raise Refused(field, f"{path} cannot be read: {error}") from error
