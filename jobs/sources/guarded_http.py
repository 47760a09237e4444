"""GET over http(s) that never talks to a private address, whatever a name resolves to and wherever a redirect points.

Knows nothing of manifests. The peer's address is checked on the connected socket, before a byte is sent: a name that
resolves to another address the second time (DNS rebinding) gains nothing.
"""

import http.client
import io
import ssl
import string
import time
import urllib.error
import urllib.request
from functools import partial
from urllib.parse import quote, urlsplit

from jobs.sources.rules import check_host, is_public
from jobs.storage.connections import READ_TIMEOUT_S, scrub
from jobs.storage.retrying import PATIENCE_S, retry_budget
from parakeet_core.errors import ErrorKind, InputError

MAX_BODY_BYTES = 2 << 30  # held in memory; more than any single recording should be
HTTP_TIMEOUT_S = max(30, READ_TIMEOUT_S)  # of a socket call; web servers create some files only on request
# A server that sends a byte now and then never causes a timeout, and would hold up its shard, and so the job, for ever.
LEAST_BYTES_PER_S = 2_000  # speech at 16 kbit/s in real time
SLOW_AFTER_S = 60.0  # after this time the body must have come at that rate on average


class _PublicPeer:
    """Mixin for http.client connections: refuses a private peer once connected."""

    def connect(self) -> None:
        super().connect()
        address = self.sock.getpeername()[0]
        if not is_public(address):
            self.close()
            raise InputError(ErrorKind.BAD_RECORD, f"the host {self.host} is at the private address {address}; refused")


class _HTTPConnection(_PublicPeer, http.client.HTTPConnection):
    pass


class _HTTPSConnection(_PublicPeer, http.client.HTTPSConnection):
    pass


class _HTTPHandler(urllib.request.HTTPHandler):
    def http_open(self, request):
        return self.do_open(_HTTPConnection, request)


class _HTTPSHandler(urllib.request.HTTPSHandler):
    def https_open(self, request):
        return self.do_open(_HTTPSConnection, request, context=ssl.create_default_context())


def fetch_http(url: str, patience_s: float = PATIENCE_S) -> bytes:
    """The body of `url`, whole. Failures that may be temporary are retried for `patience_s`.

    Raises:
        InputError: BAD_RECORD (private address, not a URL), MISSING_OBJECT, FORBIDDEN, STORAGE or TOO_LONG.
    """
    check_host(url)
    try:
        body = retry_budget(url).run(partial(_get, url), patience_s)
    except urllib.error.HTTPError as error:
        kinds = {401: ErrorKind.FORBIDDEN, 403: ErrorKind.FORBIDDEN, 404: ErrorKind.MISSING_OBJECT}
        kind = kinds.get(error.code, ErrorKind.STORAGE)
        raise InputError(kind, f"{scrub(url)}: the server answers {error.code}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:  # URLError and timeouts are OSErrors
        # A host that IDNA cannot encode is a UnicodeError. Refused certificates are both ValueError and OSError.
        malformed = isinstance(error, ValueError | http.client.InvalidURL) and not isinstance(error, OSError)
        kind = ErrorKind.BAD_RECORD if malformed else ErrorKind.STORAGE
        raise InputError(kind, f"{scrub(url)}: {scrub(str(error))[:200]}") from error
    if len(body) > MAX_BODY_BYTES:
        raise InputError(
            ErrorKind.TOO_LONG, f"{scrub(url)}: the body is over {MAX_BODY_BYTES} bytes; copy it to a store"
        )
    return body


def _get(url: str) -> bytes:
    with _opener().open(_quoted(url), timeout=HTTP_TIMEOUT_S) as response:
        announced = response.length  # None: until the connection ends, or chunks, which show by themselves what lacks
        body, done, started = io.BytesIO(), 0, time.monotonic()
        while done <= MAX_BODY_BYTES and done != announced and (piece := response.read1(1 << 20)):
            done += body.write(piece)
            passed_s = time.monotonic() - started
            if passed_s > SLOW_AFTER_S and done < LEAST_BYTES_PER_S * passed_s:
                raise TimeoutError(f"{done} bytes in {passed_s:.0f} s, expected {LEAST_BYTES_PER_S} a second")
    if announced is not None and done < min(announced, MAX_BODY_BYTES + 1):  # read1 does not report an early end
        raise http.client.IncompleteRead(b"", announced - done)
    return body.getvalue()


def _opener() -> urllib.request.OpenerDirector:
    """http and https through guarded connections, and nothing else."""
    # Not `build_opener`: it adds ftp, to which a redirect may lead, and a proxy, whose address would then be checked.
    opener = urllib.request.OpenerDirector()
    for handler in (
        _HTTPHandler,
        _HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


def _quoted(url: str) -> str:
    """`url` with spaces and letters outside ASCII percent-encoded, as browsers do; what is already encoded stays."""
    parts = urlsplit(url)
    path, query = (quote(part, safe=string.punctuation) for part in (parts.path, parts.query))
    return parts._replace(path=path, query=query).geturl()
