"""Retries of failing storage: after which failures, and for how long. Knows nothing of requests or of rows.

botocore retries an S3 request until the answer's headers have arrived (`connections.py`), under a quota of 100 retries
per process. What it does not cover is here: a body that breaks off, a burst of 503s that uses up the quota, plain http.
"""

import functools
import http.client
import itertools
import logging
import random
import socket
import time
import urllib.error
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

import aiohttp
import botocore.exceptions
from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError

PATIENCE_S = 90.0  # S3 answers SlowDown for about as long while it spreads a prefix that has become busy
PAUSE_S = 1.0  # before the second try, at most; doubled each time, with full jitter, so that workers spread out
LONGEST_PAUSE_S = 20.0  # as in botocore's standard mode
STORES = 4096  # whose state is kept; a manifest of http URLs may name any number of hosts

# What fsspec and s3fs let through. OSError covers local files, FileNotFoundError, PermissionError, TimeoutError.
STORAGE_ERRORS = (
    *(OSError, BotoCoreError, ClientError, ResponseParserError),
    *(aiohttp.ClientError, http.client.HTTPException),
)
_BROKEN_TRANSFERS = (
    *(botocore.exceptions.HTTPClientError, botocore.exceptions.ConnectionError, ResponseParserError),
    *(botocore.exceptions.IncompleteReadError, aiohttp.ClientError),
    *(http.client.IncompleteRead, http.client.BadStatusLine, ConnectionError, TimeoutError),
)
# Answers below 500 that S3 gives when an upload stalled or was damaged on its way, or when two uploads collide.
_PASSING_CODES = frozenset({"RequestTimeout", "XAmzContentSHA256Mismatch", "BadDigest", "ConditionalRequestConflict"})
# The attributes that hold an answer's HTTP status, as a number or text: of azure, of aiohttp, of gcsfs and urllib.
_STATUS_NAMES = ("status_code", "status", "code")
_STORE_PACKAGES = frozenset({"gcsfs", "google", "adlfs", "azure"})  # optional; some of their errors have no status
_PASSING_STATUSES = frozenset({408, 429})
_Result = TypeVar("_Result")


def is_storage_error(error: Exception) -> bool:
    """Whether an exception comes from a store. Those of stores other than S3 derive from Exception alone."""
    package = type(error).__module__.partition(".")[0]
    answered = any(hasattr(error, name) for name in _STATUS_NAMES)
    return isinstance(error, STORAGE_ERRORS) or answered or package in _STORE_PACKAGES


def http_status(error: BaseException) -> int | None:
    """The HTTP status that an exception carries, if any."""
    found = (str(getattr(error, name, "")) for name in _STATUS_NAMES)
    return next((int(value) for value in found if value.isdecimal() and 100 <= int(value) < 600), None)


def may_pass(error: BaseException) -> bool:
    """Whether the same request can succeed later: the server is overloaded or out of order, or the transfer broke."""
    answer = next((cause for cause in (error, error.__cause__) if isinstance(cause, ClientError)), None)
    if answer is not None:  # s3fs raises an OSError of its own, with botocore's answer as the cause
        status = answer.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or status == 429 or answer.response.get("Error", {}).get("Code") in _PASSING_CODES
    status = http_status(error)
    if status is not None:  # below 400, the body of a good answer broke off
        return status >= 500 or status in _PASSING_STATUSES or status < 400
    if isinstance(error, urllib.error.URLError):
        return isinstance(error.reason, BaseException) and may_pass(error.reason)
    if isinstance(error, socket.gaierror):
        return error.errno == socket.EAI_AGAIN
    if getattr(error, "retryable", False) is True:  # google.auth says so itself
        return True
    if hasattr(error, "inner_exception") and not hasattr(error, "status_code"):  # azure got no answer
        return True
    return isinstance(error, _BROKEN_TRANSFERS) and not isinstance(error, ValueError)  # ValueError: a malformed URL


class RetryBudget:
    """How long one process keeps trying one store.

    A call is given up when it has failed for the caller's whole patience, or when the store has answered no call of
    this process for that long: a store that is gone costs the patience once, and then one try per item.
    """

    def __init__(self, store: str):
        self.store = store
        self._failing_since: float | None = None  # start of the first failed try since the last answer

    def run(self, call: Callable[[], _Result], patience_s: float) -> _Result:
        """Run `call()`, and again after failures that may pass. Raises the last failure."""
        started = time.monotonic()
        for attempt in itertools.count():
            tried_at = time.monotonic()
            try:
                result = call()
            except Exception as error:
                if not may_pass(error):
                    self._failing_since = None  # the store answers, if only to refuse
                    raise
                failing_since = self._failing_since or tried_at
                self._failing_since = failing_since
                left_s = patience_s - (time.monotonic() - min(started, failing_since))
                if left_s <= 0:
                    raise
                if not attempt:
                    found = type(error.__cause__ or error).__name__  # its text may hold a signed URL
                    logging.getLogger(__name__).warning(
                        "%s fails (%s); trying again for up to %.0f s", self.store, found, left_s
                    )
            else:
                self._failing_since = None
                return result
            time.sleep(random.uniform(0, min(PAUSE_S * 2**attempt, LONGEST_PAUSE_S, left_s)))
        raise AssertionError("unreachable")


@functools.lru_cache(STORES)
def _budget(store: str) -> RetryBudget:
    return RetryBudget(store)


def retry_budget(url: str) -> RetryBudget:
    """The budget of the bucket or host of `url` in this process."""
    scheme, _, rest = url.partition("://")
    host = urlsplit(f"//{rest}").hostname if scheme in ("http", "https") else rest.split("/", 1)[0]
    return _budget(f"{scheme}://{host}" if rest else "local disk")
