"""A proxy on loopback that does to HTTP what networks and busy servers do, by a seeded plan."""

import enum
import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import urlsplit

_HOP_BY_HOP = {"connection", "transfer-encoding", "content-length", "keep-alive", "expect"}


class Fault(enum.Enum):
    """A way in which an answer is broken."""

    RESET = "connection reset in the middle of the body"
    TRUNCATE = "connection closed in the middle of the body"
    DELAY = "silence before the answer"
    STALL = "silence in the middle of the body"
    FLIP = "one bit of the body is another one"
    ERROR_500 = 500
    ERROR_503 = 503
    ERROR_429 = 429


PASSING = tuple(fault for fault in Fault if fault is not Fault.FLIP)
"""Faults that whoever sees them can tell."""
_OF_BODIES = {Fault.RESET, Fault.TRUNCATE, Fault.STALL, Fault.FLIP}


class Plan:
    """Which of the requests, in the order they come, meets which fault: a function of the seed alone.

    A request meets one with probability ``rate`` until ``limit`` faults have happened. ``reads_only`` spares all but
    reads of objects, the only requests whose answers can be cut or altered; ``within``, all whose paths lack it.
    """

    def __init__(
        self,
        seed: int,
        kinds: Sequence[Fault] = PASSING,
        *,
        rate: float = 0.3,
        limit: int | None = None,
        reads_only: bool = False,
        within: str = "",
        silence_seconds: float = 0.05,
    ) -> None:
        self.happened: Counter[Fault] = Counter()
        self.sent_bytes = 0
        self.silence_seconds = silence_seconds
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._kinds, self._rate, self._limit, self._reads_only = kinds, rate, limit, reads_only
        self._within = within

    def next(self, path: str, is_read: bool) -> tuple[Fault | None, float]:
        """The fault of the next request, and where in its body, from 0 to 1."""
        with self._lock:
            chance, choice, where = (self._random.random() for _ in range(3))
            kinds = [kind for kind in self._kinds if is_read or not (self._reads_only or kind in _OF_BODIES)]
            over = self._limit is not None and self.happened.total() >= self._limit
            if over or not kinds or self._within not in path or chance >= self._rate:
                return None, where
            fault = kinds[int(choice * len(kinds))]
            self.happened[fault] += 1
            return fault, where

    def count(self, sent: int) -> None:
        """Add to the bytes of bodies that were sent to clients."""
        with self._lock:
            self.sent_bytes += sent


class _Answer(NamedTuple):
    status: int
    headers: Sequence[tuple[str, str]]
    body: bytes


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    plan: Plan
    upstream: str

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault, where = self.plan.next(self.path, self.command == "GET" and "list-type" not in self.path)
        if fault is not None and isinstance(fault.value, int):
            self._send(_refusal(fault.value))
            return
        if fault is Fault.DELAY:
            time.sleep(self.plan.silence_seconds)
        answer = self._forward(body)
        at = int(where * len(answer.body))
        if fault is Fault.FLIP and answer.body:
            answer = answer._replace(body=_flipped(answer.body, at))
        if fault in (Fault.RESET, Fault.TRUNCATE, Fault.STALL) and answer.body:
            self._send(answer, at, fault)
        else:
            self._send(answer)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815  names of the base class

    def _forward(self, body: bytes) -> _Answer:
        connection = http.client.HTTPConnection(self.upstream, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP_BY_HOP:
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            return _Answer(answer.status, answer.getheaders(), answer.read())
        finally:
            connection.close()

    def _send(self, answer: _Answer, cut: int | None = None, fault: Fault | None = None) -> None:
        self.send_response_only(answer.status)
        headers = {name.lower(): value for name, value in answer.headers}
        for name, value in answer.headers:
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        is_head = self.command == "HEAD"
        self.send_header("Content-Length", headers.get("content-length", "0") if is_head else str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body[:cut])
        self.plan.count(len(answer.body[:cut]))
        if cut is None:
            return
        self.wfile.flush()
        if fault is Fault.STALL:
            time.sleep(self.plan.silence_seconds)
            self.wfile.write(answer.body[cut:])
            self.plan.count(len(answer.body[cut:]))
            return
        if fault is Fault.RESET:  # lingering for no time makes the close a reset
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:
            self.close_connection = True  # the client had enough

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def shutdown_request(self, request: Any) -> None:
        request.close()  # without the orderly shutdown, which would spoil a reset

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


@contextmanager
def faulty(endpoint: str, plan: Plan) -> Iterator[str]:
    """Endpoint of a proxy in front of ``endpoint`` that follows the plan for the length of the block."""
    settings: Mapping[str, Any] = {"plan": plan, "upstream": urlsplit(endpoint).netloc}
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), dict(settings)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _refusal(status: int) -> _Answer:
    code = {500: "InternalError", 503: "SlowDown", 429: "TooManyRequests"}[status]
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>by plan</Message></Error>'
    return _Answer(status, [("Content-Type", "application/xml")], body.encode())


def _flipped(body: bytes, at: int) -> bytes:
    return body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
