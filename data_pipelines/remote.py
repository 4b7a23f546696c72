"""The bytes of a shard, from this machine or from a server that may stall, drop connections or be away for a while."""

from __future__ import annotations

import io
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from functools import cache
from typing import TYPE_CHECKING, BinaryIO, cast

from data_pipelines.config import DataError, DataUnreachable
from data_pipelines.shards import Shard

if TYPE_CHECKING:  # files on this machine are read without it
    import httpx2 as httpx

log = logging.getLogger(__name__)
STALL = 30.0  # seconds without a byte after which a connection counts as lost
BUFFER = 2**18  # bytes
_AHEAD = 2**20  # bytes that are received and dropped, because that is quicker than another request
_LONGEST_PAUSE = 60.0
_jitter = random.SystemRandom()  # not the global generator, whose state belongs to training
_seen: dict[str, tuple[int | None, str | None]] = {}  # size and ETag of what this process has opened, by URL


def open_shard(shard: Shard, patience: float, stall: float = STALL) -> BinaryIO:
    """A shard's bytes as they are stored, seekable and buffered.

    patience: seconds without a new byte after which a server is given up. stall: seconds after which a silent
    connection is replaced, or a fourth of the patience where that is less. Raises OSError for local files; DataError,
    while reading, for what a server refuses, for a file that changes, and, as DataUnreachable, when patience ends.
    """
    if not shard.is_remote:
        return open(shard.place, "rb", buffering=BUFFER)
    return cast(BinaryIO, io.BufferedReader(_Remote(shard, patience, stall), BUFFER))


def size(shard: Shard, patience: float, stall: float = STALL) -> int | None:
    """Bytes of a shard, which is not read; None where its server does not say. Raises as `open_shard` does."""
    if not shard.is_remote:
        return os.stat(shard.place).st_size
    with _Remote(shard, patience, stall) as remote:
        return remote.size()


class _Again(Exception):
    """A server asks to be asked again. after: seconds."""

    def __init__(self, why: str, after: float = 0.0):
        super().__init__(why)
        self.after = after


class Positioned(io.RawIOBase):
    """Bytes that can be read, and sought, from `_at` on."""

    _at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at


class _Remote(Positioned):
    """A file behind a URL. It is received sequentially from one response; another one takes over where that ends."""

    def __init__(self, shard: Shard, patience: float, stall: float):
        # A connection that stalls must not use up the patience, or nobody would ask again.
        self._shard, self._patience, self._stall = shard, patience, min(stall, max(patience / 4, 1.0))
        self._what = f"{shard.name} at {shard.place.partition('?')[0]}"  # signed URLs are secrets
        self._response: httpx.Response | None = None
        self._chunks: Iterator[bytes] = iter(())
        self._left = memoryview(b"")  # received and not yet read
        self._next = 0  # position of the first byte of _left
        self._heard = 0.0  # when the last new byte came

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: lambda: 0, os.SEEK_CUR: self.tell, os.SEEK_END: self._end}[whence]()
        if base + offset < 0:
            raise OSError(f"negative seek position {base + offset}")
        self._at = base + offset
        return self._at

    def close(self) -> None:
        self._drop()
        super().close()

    def readinto(self, buffer) -> int:
        size = _seen.get(self._shard.place, (None, None))[0]
        if size is not None and self._at >= size:
            return 0
        if self._at != self._next or not self._left:
            self._patiently(self._receive)
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        self._at += count
        self._next += count
        return count

    def size(self) -> int | None:
        if self._shard.place not in _seen:
            self._patiently(self._look)
        return _seen[self._shard.place][0]

    def _end(self) -> int:
        size = self.size()
        if size is None:
            log.warning("%s has a server that does not say its size; reading all of it to know", self._what)
            while size is None:
                self._at = self._next + len(self._left)
                self._patiently(self._receive)
                size = self.size()
        return size

    def _patiently(self, attempt: Callable[[float], None]) -> None:
        """Calls attempt(timeout in seconds) until it succeeds. Raises DataError."""
        import httpx2 as httpx

        began = self._heard = time.monotonic()
        since, pause, waits = time.strftime("%H:%M:%S"), 0.1, False
        self._furthest = -1
        while True:
            left = self._heard + self._patience - time.monotonic()
            try:
                attempt(min(self._stall, max(left, 1.0)))
            except (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError, httpx.ProxyError) as error:
                why, after = str(error) or type(error).__name__, 0.0
            except _Again as error:
                why, after = str(error), error.after
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise DataError(f"{self._what} cannot be read ({error}); correct the reference") from None
            else:
                if waits:
                    log.warning("%s goes on after %.1f s", self._what, time.monotonic() - began)
                return
            self._drop()
            left = self._heard + self._patience - time.monotonic()
            if left <= 0:
                raise DataUnreachable(
                    f"{self._what} has sent nothing for {time.monotonic() - self._heard:.0f} s ({why}); check the "
                    "network connection and the server, or raise data.patience"
                )
            seconds = min(max(pause * _jitter.uniform(0.5, 1.0), after), left)
            log.warning("waiting for %s since %s (%s); asking again in %.1f s", self._what, since, why, seconds)
            time.sleep(seconds)
            pause, waits = min(2 * pause, _LONGEST_PAUSE), True

    def _receive(self, timeout: float) -> None:
        """Receives until _left begins at _at, or the file ends."""
        if not 0 <= self._at - self._next <= _AHEAD:
            self._drop()
        if self._response is None:
            self._ask(self._at, "", timeout)
        while True:
            skipped = min(self._at - self._next, len(self._left))
            self._left = self._left[skipped:]
            self._next += skipped
            if self._left:
                return
            chunk = next(self._chunks, b"")
            self._left = memoryview(chunk)
            # What a server without ranges sends again and again is not new.
            if self._next + len(chunk) > self._furthest:
                self._furthest, self._heard = self._next + len(chunk), time.monotonic()
            if not chunk:
                size, etag = _seen[self._shard.place]
                if size is None:
                    _seen[self._shard.place] = self._next, etag
                elif self._next < size:
                    raise _Again("the response ended early")
                return

    def _look(self, timeout: float) -> None:
        """Asks for the size."""
        self._drop()
        response = self._ask(0, "0", timeout)
        if response.status_code == 206:
            response.read()  # so that the connection can be used again
        self._drop()

    def _ask(self, start: int, last: str, timeout: float) -> httpx.Response:
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={start}-{last}"}
        if self._shard.on_hub:
            from huggingface_hub.utils import build_hf_headers

            headers |= build_hf_headers()
        client = _client(os.getpid())
        request = client.build_request("GET", self._shard.place, headers=headers, timeout=timeout)
        # The login is not sent on to another host: the client takes it out of redirected requests.
        response = self._response = client.send(request, stream=True, follow_redirects=True)
        status = response.status_code
        if status in (408, 429) or status >= 500:
            raise _Again(f"{status} {response.reason_phrase}", _retry_after(response))
        part = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", ""))
        size = int(part[2]) if part and part[2] != "*" else None
        self._next = start
        if status == 200:
            self._next = 0
            length = response.headers.get("Content-Length", "")
            size = int(length) if length.isdecimal() else None
            if start:
                log.warning("%s has a server without ranges; skipping to byte %d", self._what, start)
        elif status == 416:  # there is nothing from here on
            size = start if size is None else size
        elif status != 206:
            raise DataError(self._refused(response))
        elif part is None or part[1] is None or int(part[1]) != start:
            raise DataError(f"{self._what} has a server that sends other ranges than asked for; use another server")
        etag = response.headers.get("ETag", "").removeprefix("W/") or None
        for name, now, before in zip(("size", "ETag"), (size, etag), _seen.get(self._shard.place, ()), strict=False):
            if None not in (now, before) and now != before:
                raise DataError(
                    f"{self._what} has changed since it was first read (its {name} from {before} to {now}); restore "
                    "it, or start again with the new one"
                )
        old_size, old_etag = _seen.get(self._shard.place, (None, None))
        _seen[self._shard.place] = old_size if size is None else size, etag or old_etag
        self._chunks = iter(()) if status == 416 else response.iter_raw()
        return response

    def _refused(self, response: httpx.Response) -> str:
        status = f"{response.status_code} {response.reason_phrase}"
        if response.status_code not in (401, 403):
            return f"{self._what} cannot be read ({status}); correct the reference"
        way_out = "use a URL that needs no login"
        if self._shard.on_hub:
            way_out = "log in with `hf auth login`, and accept the dataset's terms on its page"
        return f"{self._what} is not for everyone ({status}); {way_out}"

    def _drop(self) -> None:
        if self._response is not None:
            self._response.close()
        self._response, self._chunks, self._left = None, iter(()), memoryview(b"")
        self._next = self._at


@cache
def _client(process: int) -> httpx.Client:
    """One for all threads of a process; connections do not survive a fork."""
    import httpx2 as httpx

    return httpx.Client(limits=httpx.Limits(max_connections=None))


def _retry_after(response: httpx.Response) -> float:
    """Seconds; 0 if there is no such header, or none that can be understood."""
    value = response.headers.get("Retry-After", "")
    if value.isdecimal():
        return float(value)
    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:
        return 0.0
