"""Bytes over HTTP, from real servers that stall, drop connections, refuse, redirect and change what they serve."""

from __future__ import annotations

import random
import threading
import time

import pytest

from data_pipelines import DataError, remote
from data_pipelines.config import DataUnreachable
from data_pipelines.remote import open_shard
from data_pipelines.shards import Shard
from tests.data_pipelines.servers import serving

DATA = random.Random(0).randbytes(3_000_000)


@pytest.fixture
def server():
    with serving({"a": DATA, "empty": b""}) as server:
        yield server


def shard(url: str, on_hub: bool = False) -> Shard:
    return Shard("a", url, "jsonl", on_hub=on_hub)


def read(url: str, patience: float = 5.0, stall: float = 0.3) -> bytes:
    with open_shard(shard(url), patience, stall) as file:
        return file.read()


@pytest.mark.parametrize(
    "faults",
    [
        [],
        [("drop", 1_000_000), ("drop", 1), ("drop", 0), ("drop", 700_000)],
        [("stall", 1_000_000), ("stall", 0), ("stall", 500_000)],
        [503, 429, 408, 500, ("drop", 100_000), 502],
    ],
    ids=["sound", "drops", "stalls", "statuses"],
)
@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_every_byte_once_whatever_the_server_does(server, caplog, faults, ranges):
    server.faults.extend(faults)
    server.ranges = ranges
    assert read(server.url("a")) == DATA
    waits = [message for message in caplog.messages if message.startswith("waiting for a at http://127")]
    assert len(waits) == len(faults)
    assert len(server.asked) == 1 + len(faults)  # one response for all bytes, unless it ends
    assert bool(faults) == any("goes on after" in message for message in caplog.messages)
    if faults and faults[0] == ("drop", 1_000_000) and ranges:
        assert server.asked[1][1] == "bytes=1000000-"


def test_seeking(server, caplog):
    """Short ways forward go on in the same response."""
    with open_shard(shard(server.url("a")), 5) as file:
        for place, requests in [(0, 1), (10, 1), (900_000, 1), (2_950_000, 2), (5, 3)]:
            file.seek(place)
            assert file.read(1000) == DATA[place : place + 1000]
            assert len(server.asked) == requests
        assert file.seek(-1000, 2) == len(DATA) - 1000
        assert file.read() == DATA[-1000:]
        file.seek(len(DATA) + 5)
        assert file.read() == b""
    assert caplog.messages == []


def test_sizes(server, tmp_path):
    (tmp_path / "b").write_bytes(b"12345")
    assert remote.size(Shard("b", str(tmp_path / "b"), "jsonl"), 1) == 5
    assert remote.size(shard(server.url("a")), 1) == len(DATA)
    assert server.asked == [("a", "bytes=0-0", None)]
    assert remote.size(shard(server.url("empty")), 1) == 0
    assert read(server.url("empty")) == b""
    server.ranges = server.says_size = False
    server.files["b"] = DATA
    assert remote.size(shard(server.url("b")), 1) is None
    with open_shard(shard(server.url("b")), 1) as file:
        assert file.seek(0, 2) == len(DATA)


def test_a_server_that_starts_late_is_waited_for(caplog):
    with serving({}) as server:
        url, port = server.url("a"), server.server_port

    def start() -> None:
        time.sleep(0.5)
        with serving({"a": DATA}, port):
            finished.wait(10)

    finished = threading.Event()
    thread = threading.Thread(target=start)
    thread.start()
    try:
        assert read(url) == DATA
    finally:
        finished.set()
        thread.join()
    assert any("Connection refused" in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("always", "why"), [(503, "503 Service Unavailable"), (("stall", 0), "timed out"), (("drop", 0), ".*")]
)
def test_patience_ends(server, always, why):
    server.always = always
    start = time.monotonic()
    with pytest.raises(
        DataUnreachable, match=rf"^a at {server.url('a')} has sent nothing for 1 s \({why}\); .*patience$"
    ):
        read(server.url("a"), patience=0.6, stall=0.2)
    assert 0.6 <= time.monotonic() - start < 2


def test_a_server_without_ranges_that_always_stops_at_the_same_byte_is_given_up(server):
    server.ranges, server.always = False, ("drop", 100_000)
    with pytest.raises(DataUnreachable, match="has sent nothing for"):
        read(server.url("a"), patience=0.5)


def test_as_long_as_bytes_come_there_is_patience(server):
    """Twelve stalls of 0.2 s, each of which is followed by some bytes."""
    server.faults.extend([("stall", 100_000)] * 12)
    assert read(server.url("a"), patience=1.0, stall=0.2) == DATA


@pytest.mark.parametrize("seconds", [0.3, 30.0])
def test_a_stall_leaves_patience_to_ask_again(server, caplog, seconds):
    """A short one is sat out; a connection that is silent for a fourth of the patience is replaced."""
    server.faults.append(("stall", 500_000, seconds))
    start = time.monotonic()
    with open_shard(shard(server.url("a")), patience=8.0) as file:
        assert file.read() == DATA
    assert time.monotonic() - start < 7
    assert len(server.asked) == (1 if seconds < 1 else 2)
    assert any("(timed out)" in message for message in caplog.messages) == (seconds > 1)


def test_skipping_counts_as_progress_where_there_are_no_ranges(server):
    server.ranges = False
    server.faults.extend([("drop", 2_900_000), *(("stall", count) for count in range(1_000_000, 2_900_000, 400_000))])
    assert read(server.url("a"), patience=1.0, stall=0.2) == DATA


@pytest.mark.parametrize("date", [False, True])
def test_retry_after(server, caplog, date):
    server.faults.append(429)
    server.retry_after = "1"
    if date:
        server.retry_after = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 2))
    start = time.monotonic()
    assert read(server.url("a")) == DATA
    assert 0.9 <= time.monotonic() - start < 3


@pytest.mark.parametrize(
    ("status", "on_hub", "message"),
    [
        (404, True, r"cannot be read \(404 Not Found\); correct the reference"),
        (401, True, r"is not for everyone \(401 Unauthorized\); log in with `hf auth login`, and accept the dataset's"),
        (403, False, r"is not for everyone \(403 Forbidden\); use a URL that needs no login"),
    ],
)
def test_refusals_are_errors_at_once(server, status, on_hub, message):
    server.always = status
    with pytest.raises(DataError, match=message):
        open_shard(shard(server.url("a?signature=secret"), on_hub), 5).read()
    assert len(server.asked) == 1
    with pytest.raises(DataError) as error:
        open_shard(shard(server.url("a?signature=secret"), on_hub), 5).read()
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("url", ["http://", "http://127.0.0.1:x/a", "http://\n/a"])
def test_bad_urls(url):
    with pytest.raises(DataError, match="correct the reference"):
        read(url)


@pytest.mark.parametrize("location", ["a", "ftp://127.0.0.1/a"])
def test_redirects_to_nowhere(server, location):
    server.redirects["a"] = location
    with pytest.raises(DataError, match="correct the reference"):
        read(server.url("a"))


def test_the_login_stays_with_the_hub(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serving({"a": DATA}) as store:
        server.redirects["a"] = store.url("a")
        with open_shard(shard(server.url("a"), on_hub=True), 5) as file:
            assert file.read() == DATA
        assert [asked[2] for asked in server.asked] == ["Bearer hf_secret"]
        assert [asked[2] for asked in store.asked] == [None]
        read(server.url("a"))
        assert server.asked[-1][2] is None


@pytest.mark.parametrize("change", ["size", "etag"])
def test_a_file_that_changes_is_named(server, change):
    server.etags["a"] = '"1"'
    server.faults.append(("drop", 500_000))
    with open_shard(shard(server.url("a")), 5) as file:
        file.read(100)
        if change == "size":
            server.files["a"] = DATA[:-1]
        else:
            server.etags["a"] = '"2"'
        with pytest.raises(DataError, match=rf"^a at {server.url('a')} has changed since it was first read"):
            file.read()
    with pytest.raises(DataError, match="has changed since it was first read"):
        read(server.url("a"))
