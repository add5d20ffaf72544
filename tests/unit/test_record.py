"""The flight recorder without Ray: a job that prints, workers' files that grow, and what is left after a kill."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from heliostat.place import Place
from heliostat.recipe import Refused, build
from heliostat.record import parts
from heliostat.record.events import RECORD, read_events
from heliostat.record.logs import FILE_BYTES, LOGS, Log, Rotation, Tail, read_log
from heliostat.record.parts import Shipper, fetch, numbered
from heliostat.record.secrets import HIDDEN, hider
from tests.object_stores import gs, s3

ROOT = Path(__file__).resolve().parents[2]
JOB = "01000000"
SESSION_FILE = f"worker-0a1b-{JOB}-4242.out"
LOG = "10.0.0.1-4242"
"""The log of the worker whose file that is."""

SCRIPT = """
import logging, os, sys, threading, time
from pathlib import Path
from heliostat.record import Recording, say

run, session, storage, what = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
logging.basicConfig(level=logging.WARNING)
record = Recording(run, storage, 64 << 20, {"job": "beat", "words": []})
record.follow(session, "01000000", "10.0.0.1")
"""

BEATS = """
print("token:", os.environ["API_TOKEN"], flush=True)
logging.getLogger("beat").warning("a warning")
number = 0
while what != "end" or number < 20:
    print(f"beat {number} {time.time():.3f}", flush=True)
    number += 1
    time.sleep(0.02)
print("no end of line", end="", flush=True)
record.end(status="done")
"""


def start(tmp_path: Path, script: str, *words: str) -> subprocess.Popen[str]:
    """`script` in a process that records itself; its words: a store's address, and what to do."""
    (tmp_path / "session").mkdir(exist_ok=True)
    env = os.environ | {"PYTHONPATH": str(ROOT / "platform"), "API_TOKEN": "wonderful-secret"}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT + script, str(tmp_path / "run"), str(tmp_path / "session"), *words],
        env=env,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def scribe_of(run: Path) -> int:
    """The process id of the scribe, once it has said something."""
    wait_for(lambda: (run / RECORD / "alive").exists())
    for folder in Path("/proc").glob("[0-9]*"):
        words = (folder / "cmdline").read_bytes().split(b"\0") if (folder / "cmdline").exists() else []
        if b"heliostat.record.scribe" in words and str(run).encode() in words:
            return int(folder.name)
    raise AssertionError("there is no scribe")


def wait_for(condition: Callable[[], object], timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def texts(run: Path, log: str) -> list[str]:
    """A log's lines without their times."""
    return [line.partition(" ")[2] for line in read_log(run / RECORD / LOGS / log)]


def printed_by_worker(session: Path) -> Callable[[], None]:
    """A worker's file that gets a line at each call."""
    stream = (session / SESSION_FILE).open("w")
    stream.write(f":job_id:{JOB}\n:actor_name:RayTrainWorker\n")

    def beat() -> None:
        stream.write(f"work {time.time():.3f}\n")
        stream.flush()

    return beat


def test_secrets_are_hidden_and_words_are_not(tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("rays-own-token\n")
    environment = {
        "HF_TOKEN": "hf-abcdefgh",
        "AWS_SECRET_ACCESS_KEY": "/abc+defghijk",
        "DB_PASSWORD": "correct horse",
        "RAY_AUTH_MODE": "token",
        "SSH_AUTH_SOCK": str(tmp_path),
        "PATH": "/usr/local/bin",
    }
    hide = hider(environment, home=tmp_path)
    for value in ("hf-abcdefgh", "/abc+defghijk", "correct horse", "rays-own-token"):
        assert hide(f"got {value}, and {value}") == f"got {HIDDEN}, and {HIDDEN}"
    for text, hidden in {
        "postgresql://me:hunter22@host/db": f"postgresql://me:{HIDDEN}@host/db",
        "Authorization: Bearer abc.def-123": f"Authorization: Bearer {HIDDEN}",
        "?password=hunter22&user=me": f"?password={HIDDEN}&user=me",
        'api_key: "abcd1234"': f'api_key: "{HIDDEN}"',
        "github_pat_0123456789abcdefABCDEF": HIDDEN,
    }.items():
        assert hide(text) == hidden
    for text in (
        f"the token of {tmp_path} in /usr/local/bin",
        "tokens_per_s=1234.5, max_tokens: 4096, pad_token: [PAD]",
        "s3://bucket/folder?endpoint_override=127.0.0.1:9000",
        "12:30:11 @rank 0: loss 0.25",
    ):
        assert hide(text) == text


def test_a_log_goes_on_where_it_ended_in_small_files(tmp_path: Path) -> None:
    line = "x" * 1000
    for _ in range(2):
        log = Log(tmp_path, hider({}))
        for _ in range(2 * FILE_BYTES // 1000):
            log.write([line])
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [f"{number:06d}.log" for number in range(1, len(files) + 1)]
    assert len(files) >= 4
    assert all(file.stat().st_size <= FILE_BYTES + 2000 for file in files)
    assert len(list(read_log(tmp_path))) == 2 * (2 * FILE_BYTES // 1000)


def test_a_log_says_that_it_is_full(tmp_path: Path) -> None:
    log = Log(tmp_path, hider({}), most_bytes=500)
    for _ in range(100):
        log.write(["a line"])
    lines = list(read_log(tmp_path))
    assert 10 < len(lines) < 30
    assert lines[-1].endswith("nothing more is recorded: record.max_bytes")


def test_lines_are_as_on_paper(tmp_path: Path) -> None:
    log = Log(tmp_path, hider({}))
    log.write(["\x1b[1;31mred\x1b[0m", "10%\r20%\r30%", "windows\r", "bell\x07 and nul\x00", "y" * 20_000])
    lines = [line.partition(" ")[2] for line in read_log(tmp_path)]
    assert lines[:4] == ["red", "30%", "windows", "bell and nul"]
    assert lines[4] == "y" * 16_384 + " … 3616 more characters"
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ", next(read_log(tmp_path)))


def test_the_oldest_files_go_and_every_log_keeps_its_last(tmp_path: Path) -> None:
    for age, name in enumerate(("a/000001", "a/000002", "b/000001", "b/000002", "c/000001")):
        file = tmp_path / f"{name}.log"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"x" * 100)
        os.utime(file, (1000 + age, 1000 + age))
    assert Rotation(tmp_path, 500).turn() == (0, 0)
    assert Rotation(tmp_path, 450).turn() == (1, 100)
    assert not (tmp_path / "a/000001.log").exists()
    assert Rotation(tmp_path, 1).turn() == (1, 100)
    assert sorted(str(file.relative_to(tmp_path)) for file in tmp_path.glob("*/*")) == [
        "a/000002.log",
        "b/000002.log",
        "c/000001.log",
    ]


def test_a_tail_gives_each_line_once_and_whole(tmp_path: Path) -> None:
    file = tmp_path / "file"
    tail = Tail(file)
    assert tail.lines() == []
    with file.open("wb") as stream:
        got = []
        text = "one\ntwo ü\nthree".encode()
        for at in range(len(text)):
            stream.write(text[at : at + 1])
            stream.flush()
            got += tail.lines()
    assert got == ["one", "two ü"]
    assert tail.lines(last=True) == ["three"]
    file.write_text("anew\n")
    assert tail.lines() == ["anew"]


def test_all_that_a_job_and_its_workers_print(tmp_path: Path) -> None:
    elsewhere = """
for error in (False, True):
    record.worker('10.0.0.2', 77, 'RayTrainWorker', ['from afar', os.environ['API_TOKEN']], error)
"""
    process = start(tmp_path, elsewhere + BEATS, "", "end")
    (tmp_path / "session" / SESSION_FILE).write_text(
        f":job_id:{JOB}\n:actor_name:RayTrainWorker\nmine\n:job_id:02000000\nanother's\n:job_id:{JOB}\nmine again"
    )
    (tmp_path / "session" / SESSION_FILE).with_suffix(".err").write_text(
        f":job_id:{JOB}\n:actor_name:RayTrainWorker\nmine\nonly on this one\n"
    )
    (tmp_path / "session" / "worker-0a1b-ffffffff-4243.err").write_text(f"nobody's\n:job_id:{JOB}\nlater mine\n")
    (tmp_path / "session" / "worker-0a1b-02000000-4244.err").write_text("another's\n")
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert "not whole" not in stderr
    run = tmp_path / "run"
    driver = texts(run, "driver")
    assert driver[0] == f"token: {HIDDEN}"
    assert "WARNING beat: a warning" in driver
    assert [line for line in driver if line.startswith("beat")] == [
        line for line in stdout.splitlines() if line.startswith("beat")
    ]
    assert driver[-1] == "no end of line"
    assert "wonderful-secret" in stdout, "only the record hides it"
    assert sorted(texts(run, LOG)) == ["mine", "mine again", "only on this one"], "Ray Train says it twice"
    assert texts(run, "10.0.0.1-4243") == ["later mine"]
    assert texts(run, "10.0.0.2-77") == ["from afar", HIDDEN]
    logs = {path.name for path in (run / RECORD / LOGS).iterdir()}
    assert logs == {"driver", LOG, "10.0.0.1-4243", "10.0.0.2-77"}
    events = read_events(run)
    assert {event["event"] for event in events} == {"begun", "worker", "ended"}
    workers = {event["log"]: event["name"] for event in events if event["event"] == "worker"}
    assert workers == {LOG: "RayTrainWorker", "10.0.0.2-77": "RayTrainWorker"}
    assert [event["status"] for event in events if event["event"] == "ended"] == ["done"]


def test_a_killed_job_loses_nothing(tmp_path: Path) -> None:
    process = start(tmp_path, BEATS, "", "forever")
    work = printed_by_worker(tmp_path / "session")
    scribe = scribe_of(tmp_path / "run")
    for _ in range(50):
        work()
        time.sleep(0.02)
    process.kill()
    killed = time.time()
    stdout, _ = process.communicate()
    work()  # one that has not noticed yet
    wait_for(lambda: not running(scribe))
    recorded = [line for line in texts(tmp_path / "run", "driver") if line.startswith("beat")]
    printed = [line for line in stdout.splitlines() if line.startswith("beat")]
    assert len(printed) > 20
    assert recorded[: len(printed) - 1] == printed[:-1], "a line is printed, then recorded"
    written = (tmp_path / "session" / SESSION_FILE).read_text().splitlines()[2:]
    assert texts(tmp_path / "run", LOG) == written
    gone = read_events(tmp_path / "run")[-1]
    assert gone["event"] == "gone"
    assert killed - 0.1 < gone["time"] < killed + 1.0


def test_a_lost_machine_takes_a_second_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Job and scribe are killed at once, and their disk is gone: what the store has ends less than 1 s before."""
    with s3(monkeypatch) as address:
        process = start(tmp_path, BEATS, address.format("/records"), "forever")
        work = printed_by_worker(tmp_path / "session")
        scribe = scribe_of(tmp_path / "run")
        place = Place.at(address.format("/records")) / "run" / RECORD
        limit = time.monotonic() + 60
        while len(numbered(place)) < 4:
            assert time.monotonic() < limit, "nothing is shipped"
            work()
            time.sleep(0.1)
        for _ in range(100):
            work()
            time.sleep(0.02)
        os.kill(scribe, signal.SIGKILL)
        process.kill()
        killed = time.time()
        process.communicate()
        assert fetch(place, tmp_path / "copy" / "run")
    copy = tmp_path / "copy" / "run"
    for log, word in (("driver", "beat"), (LOG, "work")):
        shipped = [line for line in texts(copy, log) if line.startswith(word)]
        assert shipped == [line for line in texts(tmp_path / "run", log) if line.startswith(word)][: len(shipped)]
        assert float(shipped[-1].split()[-1]) > killed - 1.0
    assert [event["event"] for event in read_events(copy)] == ["begun", "worker"]


def test_a_terminal_is_one_still(tmp_path: Path) -> None:
    """What is drawn on it gets there as it is, and is no line of the record."""
    script = """
print(sys.stderr.isatty(), sys.stdout.isatty(), os.get_terminal_size(sys.stderr.fileno()).columns > 0, file=sys.stderr)
for done in range(3):
    print(f"\\r\\x1b[2K\\x1b[36m{done}0%", end="", file=sys.stderr, flush=True)
print("\\x1b[0m\\x1b[1mdone\\x1b[0m", file=sys.stderr)
record.end(status="done")
"""
    main, other = pty.openpty()
    (tmp_path / "session").mkdir()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT + script, str(tmp_path / "run"), str(tmp_path / "session"), "", ""],
        env=os.environ | {"PYTHONPATH": str(ROOT / "platform")},
        stdout=other,
        stderr=other,
    )
    os.close(other)
    seen = b""
    while True:
        try:
            data = os.read(main, 65536)
        except OSError:  # nobody has the other end any more
            break
        if not data:
            break
        seen += data
    assert process.wait(60) == 0
    assert seen == (
        b"True True True\r\n\r\x1b[2K\x1b[36m00%\r\x1b[2K\x1b[36m10%\r\x1b[2K\x1b[36m20%\x1b[0m\x1b[1mdone\x1b[0m\r\n"
    )
    assert texts(tmp_path / "run", "driver") == ["True True True", "done"]


def test_the_job_goes_on_without_its_scribe_and_says_so_once(tmp_path: Path) -> None:
    process = start(tmp_path, "sys.stdin.readline()\nrecord.follow(session, '2', '')\n" + BEATS, "", "end")
    os.kill(scribe_of(tmp_path / "run"), signal.SIGKILL)
    stdout, stderr = process.communicate("go on\n", timeout=60)
    assert process.returncode == 0, stderr
    assert stderr.count("the record of run is not whole") == 1
    assert len([line for line in texts(tmp_path / "run", "driver") if line.startswith("beat")]) == 20
    assert "no end of line" in stdout


def test_the_job_goes_on_where_there_is_no_room_and_says_so_once(tmp_path: Path) -> None:
    script = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (300, -1))\n" + BEATS
    process = start(tmp_path, script, "", "end")
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert stderr.count("the record of run is not whole: [Errno 27]") == 1
    assert stdout.count("beat") == 20


def test_a_folder_that_cannot_be_made_stops_no_job(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    process = start(tmp_path, "print('it ran')\nrecord.end(status='done')", "", "end")
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (0, "it ran\n"), stderr
    assert stderr.count("the record of run is not whole") == 1


def story(run: Path) -> dict[str, str]:
    return {path.relative_to(run).as_posix(): path.read_text() for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize("store", [s3, gs, None], ids=["s3", "gs", "folder"])
def test_what_is_shipped_is_what_there_is(
    store: Callable[..., object] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if store is None:
        check_shipping(tmp_path, Place.at(tmp_path / "store"), monkeypatch)
    else:
        with store(monkeypatch) as address:  # type: ignore[attr-defined]
            check_shipping(tmp_path, Place.at(address.format("/records")) / "run", monkeypatch)


def check_shipping(tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    for folder in ("ledger", "stacks", "record/events", "record/logs/driver", "checkpoints/step-1"):
        (run / folder).mkdir(parents=True)
    (run / "recipe.json").write_text('{"ü": 1}\n')
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    first = Shipper(run, place, hider({"KEY": "secret-of-mine"}))
    first.ship()
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 2}\n{"step": 3, "cut')
        stream.flush()
        first.ship()
        stream.write('": 1}\n')
    (run / "ledger" / "attempt-001.json").write_text('{"seconds": 1}')
    (run / "record/logs/driver/000001.log").write_text("a line\u2028that is one\nsecret-of-mine\n")
    first.ship()
    (run / "ledger" / "attempt-001.json").write_text('{"seconds": 22}')
    (run / "stacks" / "rank-0.txt").write_text("Thread 0x1\r\n")
    first.ship()
    before = numbered(place)
    first.ship()
    assert numbered(place) == before, "nothing is new"
    assert fetch(place, tmp_path / "one")
    expected = story(run) | {"record/logs/driver/000001.log": f"a line\u2028that is one\n{HIDDEN}\n"}
    assert story(tmp_path / "one") == expected
    (run / "record/logs/driver/000001.log").unlink()
    monkeypatch.setattr(parts, "FOLD_PARTS", 2)
    first.ship()
    first.settle()
    assert len(numbered(place)) == 1, "parts are folded"
    assert fetch(place, tmp_path / "two")
    assert story(tmp_path / "two") == story(run)
    # The cluster is gone with its disk, and the run begins anew by the same name: what was shipped stays.
    shutil.rmtree(run)
    (run / "record/events").mkdir(parents=True)
    (run / "record/events/host-2.jsonl").write_text('{"time": 1, "event": "begun"}\n')
    again = Shipper(run, place, hider({}))
    again.ship()
    again.fold()
    assert fetch(place, tmp_path / "three")
    assert story(tmp_path / "three") == story(tmp_path / "two") | story(run)
    again.withdraw()
    assert fetch(place, tmp_path / "four")
    assert story(tmp_path / "four") == story(tmp_path / "two")
    assert not fetch(place / "nothing", tmp_path / "five")


def test_a_store_that_was_away_gets_all_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shipper = Shipper(run, Place.at(tmp_path / "store"), hider({}))
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    shipper.ship()
    shutil.move(tmp_path / "store", tmp_path / "away")
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    with pytest.raises(OSError, match="store"):
        shipper.ship()
    shutil.move(tmp_path / "away", tmp_path / "store")
    shipper.ship()
    assert fetch(Place.at(tmp_path / "store"), tmp_path / "copy")
    assert story(tmp_path / "copy") == story(run)


def test_a_store_cannot_write_elsewhere(tmp_path: Path) -> None:
    for name in ("../outside", str(tmp_path / "outside")):
        Place.at(tmp_path).publish("part-00000001.jsonl", json.dumps({"file": name, "whole": "x"}) + "\n")
        fetch(Place.at(tmp_path), tmp_path / "copy")
        assert not (tmp_path / "outside").exists()


def test_where_records_are_shipped_to() -> None:
    tree = {"name": "x", "task": "language_model"}
    assert build(tree).record_storage == ""
    assert build(tree | {"checkpoint": {"storage": "/shared/checkpoints"}}).record_storage == ""
    assert build(tree | {"checkpoint": {"storage": "s3://b/c"}}).record_storage == "s3://b/c"
    assert build(tree | {"checkpoint": {"storage": "s3://b/c"}, "record": {"storage": "/r"}}).record_storage == "/r"
    with pytest.raises(Refused, match=r"record\.storage"):
        build(tree | {"record": {"storage": "s3://me:secret@bucket"}})
