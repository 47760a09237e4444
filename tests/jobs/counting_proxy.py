"""A proxy before the S3 server of the tests that counts the requests it passes on."""

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


class CountingProxy(ThreadingHTTPServer):
    """Forwards to `upstream` ("host:port"). `requests` holds (method, path or listed prefix) of each request."""

    daemon_threads = True

    def __init__(self, upstream: str):
        super().__init__(("127.0.0.1", 0), _Forward)
        self.upstream, self.requests, self._lock = upstream, [], threading.Lock()

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def record(self, method: str, target: str) -> None:
        url = urlsplit(target)
        query = parse_qs(url.query)
        listed = "list-type" in query
        path = f"{url.path.rstrip('/')}/{query.get('prefix', [''])[0]}" if listed else url.path
        with self._lock:
            self.requests.append(("LIST" if listed else method, path))


class _Forward(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _forward(self) -> None:
        self.server.record(self.command, self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=60)
        # The Host header is signed: it goes on as the client sent it.
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() != "connection":
                upstream.putheader(name, value)
        upstream.endheaders(body or None)
        answer = upstream.getresponse()
        content = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else len(content)
        self.send_header("Content-Length", str(length or 0))
        self.end_headers()
        self.wfile.write(content)
        upstream.close()

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _forward

    def log_message(self, *_) -> None:
        return


@contextmanager
def counting_proxy(endpoint_url: str) -> Iterator[CountingProxy]:
    """A proxy before the server at `endpoint_url`, for the length of the block."""
    proxy = CountingProxy(urlsplit(endpoint_url).netloc)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
