"""An HTTP server in a thread that misbehaves as it is told."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from data_pipelines import remote


class Server(ThreadingHTTPServer):
    """Serves `files` by path, with ranges.

    faults: what the next requests get, one each: an HTTP status, ("drop", n) for a response that ends after n bytes,
    ("stall", n) or ("stall", n, seconds) for one that is silent after them, by default for longer than anybody waits,
    or None. always: a fault of every request, once `faults` is empty. retry_after: header of statuses. redirects:
    locations by path. asked: the path, Range and Authorization of every request. happened: the path and kind of every
    fault that a client may have noticed.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, files: dict[str, bytes], port: int = 0):
        super().__init__(("127.0.0.1", port), _Handler)
        self.files = files
        self.faults: deque = deque()
        self.always: object = None
        self.retry_after: str | None = None
        self.ranges = self.says_size = True
        self.redirects: dict[str, str] = {}
        self.etags: dict[str, str] = {}
        self.asked: list[tuple[str, str | None, str | None]] = []
        self.happened: list[tuple[str, str]] = []
        self.stop = threading.Event()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"

    def handle_error(self, request, client_address) -> None:
        """Clients that hang up are expected."""


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        server, path = self.server, self.path[1:]
        server.asked.append((path, self.headers["Range"], self.headers["Authorization"]))
        fault = server.faults.popleft() if server.faults else server.always
        if path in server.redirects:
            return self.answer(302, {"Location": server.redirects[path]})
        if isinstance(fault, int):
            server.happened.append((path, str(fault)))
            return self.answer(fault, {"Retry-After": server.retry_after} if server.retry_after else {})
        if path not in server.files:
            return self.answer(404)
        data, headers, status = server.files[path], {}, 200
        first, total = 0, len(data)
        if path in server.etags:
            headers["ETag"] = server.etags[path]
        if server.ranges and self.headers["Range"]:
            start, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            first = int(start)
            if first >= total:
                return self.answer(416, {**headers, "Content-Range": f"bytes */{total}"})
            data, status = data[first : int(last) + 1 if last else total], 206
            headers["Content-Range"] = f"bytes {first}-{first + len(data) - 1}/{total}"
        kind, count, *seconds = fault if fault else ("", len(data))
        if count < len(data):
            server.happened.append((path, kind))
        self.answer(status, headers, data, count, (*seconds, 30.0)[0] if kind == "stall" else None)

    def answer(self, status: int, headers=(), data=b"", count: int | None = None, stall: float | None = None) -> None:
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        if self.server.says_size:
            self.send_header("Content-Length", str(len(data)))
        cut = count is not None and count < len(data)
        if cut or not self.server.says_size:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        self.wfile.write(data[:count])
        self.wfile.flush()
        if stall is not None and cut:
            self.server.stop.wait(stall)
            self.wfile.write(data[count:])


@contextmanager
def serving(files: dict[str, bytes], port: int = 0) -> Iterator[Server]:
    server = Server(files, port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.stop.set()
        server.shutdown()
        server.server_close()
        thread.join()
        remote._seen.clear()  # the next server may get the same port
