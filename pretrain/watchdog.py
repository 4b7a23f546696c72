"""A rank that dies, hangs or fails ends the others soon, with one line that names it.

A collective that one rank never joins keeps the others waiting for gloo's or NCCL's timeout, half an hour. So every
rank holds a connection to rank 0, which the kernel closes when either process ends, however it ends; and since nobody
closes the connections of a machine that is gone, both sides send a sign of life now and then. Data workers inherit the
connection, and hold it for the few seconds that they take to miss their parent.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import secrets
import socket
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from multiprocessing.connection import Connection, wait

import lightning

from pretrain.stopping import UNFINISHED, Stopped, show_cursor

INTERVAL = 1.0  # seconds between signs of life
SILENT = 30  # intervals without one after which a rank is given up
CONNECT = 60.0  # seconds that connecting may take
CLOSE = 3.0  # seconds that closing may take
SIGN, LEFT = b"sign", b"left"


class Watchdog(lightning.Callback):
    """Watches over the ranks from a run's setup to its end.

    It ends the process from a thread, because collectives cannot be interrupted. The run's files survive that as they
    survive SIGKILL.
    """

    def __init__(self) -> None:
        self._server: Connection | None = None
        self._first = ""
        self._at_fault = threading.Event()
        self._left = False

    def setup(self, trainer: lightning.Trainer, module: lightning.LightningModule, stage: str) -> None:
        self._rank, ranks = trainer.global_rank, trainer.world_size
        if ranks == 1:
            return
        me, token = f"rank {self._rank} (process {os.getpid()} on {socket.gethostname()})", secrets.token_hex(16)
        if self._rank:
            nothing: tuple[int, str, str] | None = None
            where = trainer.strategy.broadcast(nothing)
            assert where is not None
            port, token, self._first = where
            self._server = _framed(socket.create_connection((os.environ["MASTER_ADDR"], port), CONNECT))
            self._server.send_bytes(_encoded(token, self._rank, me))
        else:
            self._server, own = multiprocessing.Pipe()
            self._first, peers = me, {own: (0, me)}
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            with socket.create_server(("", 0), family=family, backlog=ranks, dualstack_ipv6=both) as listener:
                listener.settimeout(CONNECT)
                trainer.strategy.broadcast((listener.getsockname()[1], token, me))
                while len(peers) < ranks:
                    peer = _framed(listener.accept()[0])
                    given, rank, name = json.loads(peer.recv_bytes(1000)) if peer.poll(CONNECT) else ("", 0, "")
                    if given == token:
                        peers[peer] = rank, name
            threading.Thread(target=_serve, args=(peers,), daemon=True).start()
        self._thread = threading.Thread(target=self._watch, args=(self._server,), daemon=True)
        self._thread.start()

    def teardown(self, trainer, module, stage) -> None:
        if self._server is not None:
            self._left = True
            _send(self._server, LEFT)
            self._thread.join(CLOSE)

    def on_exception(self, trainer, module, exception) -> None:
        """Returns only if this rank's failure is not the consequence of another's."""
        if self._server is None:
            return
        why = str(exception).partition("\n")[0]
        if isinstance(exception, Stopped):
            failure = _encoded(UNFINISHED, why.partition(";")[0])
        else:
            failure = _encoded(1, f"{type(exception).__name__}: {why}")
        _send(self._server, failure)
        self._at_fault.wait(CONNECT)

    def _watch(self, server: Connection) -> None:
        """What rank 0 decides, or its end, ends the process."""
        for _, lost, word in _news([server]):
            if lost and not self._left:
                self._end(1, f"{self._first} {lost}", self._rank == 1)
            elif word and word != LEFT:
                rank, code, text = json.loads(word)
                if rank != self._rank:
                    self._end(code, text, self._rank == 0)
                self._at_fault.set()
                break
        server.close()

    def _end(self, code: int, text: str, speaks: bool) -> None:
        if speaks:
            show_cursor()
            os.write(2, f"forethought: {text}; the same command continues\n".encode())
        # As all ranks but the first, where a run is unfinished: launchers take anything else for a failure.
        os._exit(0 if code == UNFINISHED and self._rank else code)


def _serve(peers: Mapping[Connection, tuple[int, str]]) -> None:
    """Tells all ranks which one is at fault: one that is lost; else the first that failed, from which others fail."""
    failures: dict[int, tuple[str, list]] = {}
    patience = 2  # intervals, in which the loss may be noticed that ranks fail from
    verdict = LEFT
    for peer, lost, word in _news(peers):
        rank, name = peers[peer] if peer is not None else (0, "")
        if lost:
            verdict = _encoded(rank, 1, f"{name} {lost}")
            break
        if word == LEFT and rank == 0:
            break
        if word == LEFT:
            _send(peer, LEFT)
        elif word:
            failures[rank] = name, json.loads(word)
        elif failures and peer is None:
            patience -= 1
        if not patience:
            rank, (name, (code, why)) = next(iter(failures.items()))
            # Where all failed alike, rank 0 speaks for them, as in a run without others.
            alike = 0 in failures and failures[0][1] == [code, why]
            verdict = _encoded(0 if alike else rank, code, f"{name}: {why}")
            break
    own, *others = peers
    for peer in others:
        _send(peer, verdict)
    # A process that ends before all of its sockets are read resets the connection, and what the other side has not read
    # is lost. So the others close first.
    until = time.monotonic() + CLOSE
    while others and (left := until - time.monotonic()) > 0:
        for peer in _ready(others, left):
            try:
                peer.recv_bytes()
            except (EOFError, OSError):
                others.remove(peer)
    _send(own, verdict)


def _encoded(*values: int | str) -> bytes:
    return json.dumps(values).encode()


def _news(peers: Collection[Connection]) -> Iterator[tuple[Connection | None, str, bytes]]:
    """(peer, how it was lost, "") or (peer, "", what it says), and (None, "", b"") every interval, until all have left
    or are lost. Sends signs of life to them."""
    silent, due = dict.fromkeys(peers, 0), 0.0
    while silent:
        if time.monotonic() >= due:
            # Counted from now on: a process that was suspended has missed one interval, as have its peers.
            due = time.monotonic() + INTERVAL
            for peer in silent:
                silent[peer] += 1
                _send(peer, SIGN)
            yield None, "", b""
        for peer in [peer for peer, intervals in silent.items() if intervals > SILENT]:
            del silent[peer]
            yield peer, f"has not answered for {SILENT * INTERVAL:.0f} seconds", b""
        for peer in _ready([*silent], INTERVAL):
            try:
                word = peer.recv_bytes(10_000)
            except (EOFError, OSError):
                del silent[peer]
                yield peer, "died", b""
                continue
            silent[peer] = 0
            if word == LEFT:
                del silent[peer]
            if word != SIGN:
                yield peer, "", word


def _ready(peers: list[Connection], timeout: float) -> list[Connection]:
    return [peer for peer in wait(peers, timeout) if isinstance(peer, Connection)]


def _framed(connected: socket.socket) -> Connection:
    connected.settimeout(None)
    return Connection(connected.detach())


def _send(peer: Connection | None, word: bytes) -> None:
    if peer is not None:
        # If it is lost, receiving will say so.
        with contextlib.suppress(OSError):
            peer.send_bytes(word)
