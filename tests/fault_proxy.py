"""An HTTP proxy on the loopback, in front of a real S3 server, that fails on purpose.

Requests go on unchanged, with the Host that the client signed, so the server checks real signatures. What fails is
decided by `FaultProxy.plan`, a function of the request, which a test may change while a job runs.
"""

import http.client
import random
import socket
import struct
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

XML_NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
UPSTREAM_TIMEOUT_S = 60.0

# Answers of S3; a body cut by RST, or by a proper end that is too early; a connection that breaks before the server has
# the request, or after it has done it; a socket that never answers; credentials that have expired; a wrong signature.
FAULTS = ("slow_down", "internal_error", "reset", "short", "lost_request", "lost_answer", "hang", "expired_token")
FAULTS += ("bad_signature",)
DENIED = "denied"  # and what asks for the removal of many objects is answered with 200, and a refusal for each of them
PASSING = ("slow_down", "internal_error", "reset", "short", "lost_request", "lost_answer")
_ANSWERS = {
    "slow_down": (503, "SlowDown", "Please reduce your request rate."),
    "internal_error": (500, "InternalError", "We encountered an internal error. Please try again."),
    "expired_token": (403, "ExpiredToken", "The provided token has expired."),
    "bad_signature": (403, "SignatureDoesNotMatch", "The request signature does not match."),
    DENIED: (403, "AccessDenied", "Access Denied"),
}


@dataclass(frozen=True)
class Request:
    """What a plan decides by."""

    method: str
    path: str  # without the query
    query: str
    number: int  # from 0, in the order of arrival

    @property
    def is_read(self) -> bool:
        return self.method == "GET" and "list-type=" not in self.query

    @property
    def is_listing(self) -> bool:
        return self.method == "GET" and "list-type=" in self.query

    @property
    def is_delete(self) -> bool:
        return self.method == "DELETE" or (self.method == "POST" and self.query.startswith("delete"))


Plan = Callable[[Request], str | None]  # one of FAULTS, DENIED, or None


def no_fault(_: Request) -> str | None:
    return None


def seeded_faults(seed: int, rate: float, burst: int, faults: tuple[str, ...]) -> Plan:
    """Bursts of one kind of fault each, at random requests; the share of failing requests is about `rate`."""

    def plan(request: Request) -> str | None:
        rng = random.Random(f"{seed} {request.number // burst}")
        return rng.choice(faults) if rng.random() < rate else None

    return plan


class FaultProxy(ThreadingHTTPServer):
    """Use as a context manager.

    Attributes:
        plan: which request fails, and how.
        listing_lag_s: objects younger than this are left out of listings.
        made: faults made so far, by kind; `lagged` counts objects that a listing left out.
        seen: all requests.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, upstream_url: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream_url).netloc
        self.plan: Plan = no_fault
        self.listing_lag_s = 0.0
        self.made: Counter[str] = Counter()
        self.seen: list[Request] = []
        self.written_at: dict[str, float] = {}  # path of an object -> when it was put
        self.lock = threading.Lock()
        self.closing = threading.Event()

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> "FaultProxy":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def written_parts(self) -> list[str]:
        """Paths of the parts of tables that were put."""
        return [path for path in list(self.written_at) if "/transcripts/part-" in path]

    def handle_error(self, request, client_address) -> None:
        """Clients that go away in mid-answer are what this proxy is for."""

    def decide(self, method: str, target: str) -> tuple[Request, str | None]:
        parts = urlsplit(target)
        with self.lock:
            request = Request(method, parts.path, parts.query, len(self.seen))
            self.seen.append(request)
        fault = self.plan(request)
        if fault:
            with self.lock:
                self.made[fault] += 1
        return request, fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultProxy

    def log_message(self, *_) -> None:
        pass

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request, fault = self.server.decide(self.command, self.path)
        if fault == DENIED and request.is_delete and self.command == "POST":
            self._refuse_each(body)
        elif fault in _ANSWERS:
            self._answer_error(*_ANSWERS[fault])
        elif fault == "hang":
            self.server.closing.wait()
            self.close_connection = True
        elif fault == "lost_request":
            self._reset()
        else:
            status, headers, content = self._forward(body)
            if self.command == "PUT" and status == 200:
                self.server.written_at[request.path] = time.monotonic()
            if request.is_listing and self.server.listing_lag_s:
                content = self._without_young_objects(request, content)
            if fault in ("reset", "short") and content:  # an answer without a body can only be lost
                self._send(status, headers, content[: len(content) // 2], len(content))
            if fault:
                self._end() if fault == "short" else self._reset()
            else:
                self._send(status, headers, content, None if self.command == "HEAD" else len(content))

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_request  # noqa: N815 - names of http.server

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.server.upstream, timeout=UPSTREAM_TIMEOUT_S)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("connection", "expect"):
                connection.putheader(name, value)
        connection.endheaders(body)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        return response.status, response.getheaders(), content

    def _send(self, status: int, headers: list[tuple[str, str]], content: bytes, length: int | None) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding") and (length is None or name != "Content-Length"):
                self.send_header(name, value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content)

    def _answer_error(self, status: int, code: str, message: str) -> None:
        content = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        content = b"" if self.command == "HEAD" else content
        self._send(status, [("Content-Type", "application/xml")], content, len(content))

    def _refuse_each(self, body: bytes) -> None:
        """What S3 says to DeleteObjects of somebody who may not."""
        keys = [key.text for key in ElementTree.fromstring(body).iter(f"{{{XML_NAMESPACE}}}Key")]  # noqa: S314 - ours
        errors = "".join(f"<Error><Key>{key}</Key><Code>AccessDenied</Code></Error>" for key in keys)
        content = f"<?xml version='1.0'?><DeleteResult xmlns='{XML_NAMESPACE}'>{errors}</DeleteResult>".encode()
        self._send(200, [("Content-Type", "application/xml")], content, len(content))

    def _reset(self) -> None:
        """End the connection with RST, as a middlebox or a dying server does."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._end()

    def _end(self) -> None:
        self.close_connection = True
        self.rfile.close()  # the socket closes with the last file over it
        self.connection.close()

    def _without_young_objects(self, request: Request, content: bytes) -> bytes:
        ElementTree.register_namespace("", XML_NAMESPACE)
        root = ElementTree.fromstring(content)  # noqa: S314 - the answer of our own server
        bucket = request.path.strip("/").split("/")[0]
        for entry in root.findall(f"{{{XML_NAMESPACE}}}Contents"):
            key = entry.findtext(f"{{{XML_NAMESPACE}}}Key")
            written_at = self.server.written_at.get(f"/{bucket}/{key}")
            if written_at is not None and time.monotonic() - written_at < self.server.listing_lag_s:
                root.remove(entry)
                self.server.made["lagged"] += 1
        return ElementTree.tostring(root, xml_declaration=True, encoding="utf-8")
