"""Sources that are not on this machine's disks, each asked for over HTTP from a server that speaks its protocol."""

from __future__ import annotations

import io
import json
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from heliostat.data.prepare import prepare
from heliostat.data.sources import open_source
from heliostat.launch.batch import run_on_ray
from heliostat.recipe import Refused
from tests.object_stores import gs, s3
from tests.unit.test_prepare import recipe_for, rows_of, source_rows

FILES = {f"train/part-{number}.parquet": source_rows(60, number) for number in range(5)}


def fill(address: str) -> None:
    filesystem, _ = pyarrow.fs.FileSystem.from_uri(address.format(""))
    for name, table in FILES.items():
        with filesystem.open_output_stream(f"reviews/{name}") as stream:
            pq.write_table(table, stream)


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub's API as listing and reading a data set's Parquet files takes."""

    protocol_version = "HTTP/1.1"
    repository = "/api/datasets/someone/reviews"
    files = {}

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/datasets/someone/reviews/resolve/refs/convert/parquet/"):
            self.send_file(self.files["default/" + path.split("/default/")[1]])
        elif path.startswith(f"{self.repository}/tree/"):
            folder = path.partition("refs/convert/parquet")[2].strip("/")
            self.send_json(self.children(folder))
        elif path.startswith(self.repository):
            self.send_json({"id": "someone/reviews", "sha": "0" * 40, "private": False, "downloads": 0, "likes": 0,
                            "tags": []})  # fmt: skip
        else:
            self.send_json({"error": "not found"}, 404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        if "application/json" in self.headers.get("content-type", ""):
            paths = json.loads(body)["paths"]
        else:
            paths = [unquote(pair.partition("=")[2]) for pair in body.split("&") if pair.startswith("paths=")]
        self.send_json([self.entry(name) for name in self.files if name in paths])

    def children(self, folder: str) -> list[dict[str, object]]:
        inside = [name.removeprefix(f"{folder}/") for name in self.files if name.startswith(f"{folder}/")]
        folders = {name.partition("/")[0] for name in inside if "/" in name}
        return [self.entry(f"{folder}/{name}") for name in inside if "/" not in name] + [
            {"type": "directory", "path": f"{folder}/{name}", "oid": "0" * 40} for name in sorted(folders)
        ]

    def entry(self, name: str) -> dict[str, object]:
        return {"type": "file", "path": name, "oid": "0" * 40, "size": len(self.files[name])}

    def send_json(self, value: object, status: int = 200) -> None:
        self.send_body(json.dumps(value).encode(), status)

    def send_file(self, content: bytes) -> None:
        if asked := self.headers.get("range"):
            first, last = asked.removeprefix("bytes=").split("-")
            end = min(int(last) + 1 if last else len(content), len(content))
            part = {"content-range": f"bytes {first}-{end - 1}/{len(content)}"}
            self.send_body(content[int(first) : end], 206, part)
        else:
            self.send_body(content, 200)

    def send_body(self, content: bytes, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"content-length": str(len(content)), "etag": '"0"', **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def hub(patch: pytest.MonkeyPatch) -> Iterator[str]:
    for name, table in FILES.items():
        pq.write_table(table, stream := io.BytesIO())
        Hub.files[f"default/{name}"] = stream.getvalue()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # What HF_ENDPOINT sets where it is there before the library is imported.
    endpoint = f"http://127.0.0.1:{server.server_port}"
    patch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    patch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
                  endpoint + "/{repo_id}/resolve/{revision}/{filename}")  # fmt: skip
    yield "hf://someone/reviews{}"
    server.shutdown()
    server.server_close()


@pytest.fixture(params=[s3, gs, hub], ids=["s3", "gs", "hub"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An address with a place for the path."""
    with request.param(monkeypatch) as address:
        if request.param is not hub:
            fill(address)
        yield address


def test_rows_are_those_of_local_files(store: str, tmp_path: Path) -> None:
    local = tmp_path / "local"
    for name, table in FILES.items():
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, local / name)
    expected = prepare(recipe_for(tmp_path / "a", str(local / "train")))[0]
    got = prepare(recipe_for(tmp_path / "b", store.format("/train")))[0]
    assert got.fingerprint == expected.fingerprint
    for split, rows in expected.meta["rows"].items():
        assert rows > 0
        assert rows_of(got, split) == rows_of(expected, split)


def test_parts_are_read_where_they_are_sent(store: str) -> None:
    """On a cluster each part is read by another process."""
    parts = pickle.loads(pickle.dumps(open_source(store.format("/train"))))
    assert pa.concat_tables([part.read() for part in parts]) == pa.concat_tables(FILES.values())


@pytest.mark.parametrize("store", [s3, gs], ids=["s3", "gs"], indirect=True)
def test_globs_and_what_is_not_there(store: str) -> None:
    (part,) = open_source(store.format("/tr*/part-[3]*.parquet"))
    assert part.read() == FILES["train/part-3.parquet"]
    assert len(open_source(store.format("/*.parquet"))) == len(FILES)
    for path, words in (("/test", "does not exist"), ("/train/*.csv", "no file")):
        with pytest.raises(Refused, match=words) as caught:
            open_source(store.format(path), "data.test")
        assert caught.value.field == "data.test"


@pytest.mark.slow
def test_prepared_on_a_cluster(ray_cluster: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with s3(monkeypatch) as address:
        fill(address)
        # Ray's workers, started before the credentials were set, take them from the address.
        address = address.replace("s3://", "s3://anyone:anything@")
        prepared, made = prepare(recipe_for(tmp_path, address.format("/train")), run_on_ray)
    assert made
    assert sum(prepared.meta["rows"].values()) == sum(table.num_rows for table in FILES.values())
