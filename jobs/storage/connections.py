"""Reaching a local disk or an object store: options, filesystems, retries, and one boundary for their errors.

Knows nothing of what is read or written, of plans or of Ray. Exceptions of fsspec and of the stores' packages become
`InputError` or `CredentialsError` here and nowhere else; no message from here holds a credential.
"""

import errno
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import fsspec
from botocore.exceptions import (
    ClientError,
    CredentialRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    SSOError,
    TokenRetrievalError,
)

from jobs.storage.redaction import redact_text
from jobs.storage.retrying import PATIENCE_S, STORAGE_ERRORS, http_status, is_storage_error, retry_budget
from parakeet_core.errors import ConfigError, CredentialsError, ErrorKind, InputError

S3_SCHEMES = frozenset({"s3", "s3a"})
SCHEME = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]*)://")
_Result = TypeVar("_Result")

MAX_ATTEMPTS = 5  # of one request, by botocore: waits of up to 1, 2, 4 and 8 s between them
CONNECT_TIMEOUT_S = 10  # a healthy endpoint answers in under 1 s; a dead host must not hold a worker for minutes
READ_TIMEOUT_S = 20  # between two packets, not for the whole body; a hung socket costs this once per attempt
LISTING_THREADS = 16  # ranges of one long listing at a time; a page of 1000 names takes 100-300 ms
DELETED_AT_ONCE = 1000  # objects; the most that S3 removes in one request
MAX_POOL_CONNECTIONS = 64  # botocore's default of 10 would queue the read-ahead threads of one worker behind each other

_SECRET_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")
_MISSING_CODES = frozenset({"NoSuchKey", "NoSuchBucket", "404", "410"})
_NO_ACCESS_CODES = frozenset({"AccessDenied", "401", "403", "SignatureDoesNotMatch"})
# About the credentials, whatever the object. As errors of items they would give rows without end, and a plan that lacks
# what could not be opened, so they stop the run, and a rerun with fresh credentials finishes it.
_CREDENTIAL_CODES = frozenset(
    {"ExpiredToken", "TokenRefreshRequired", "RequestExpired", "InvalidToken", "InvalidAccessKeyId"}
)
# About the credentials or about one object: an answer to HEAD has a status but no code, and some servers sign another
# name than the one requested ("a/../b"). The answer of the bucket itself tells which.
_DOUBTFUL_CODES = frozenset({"400", "403", "SignatureDoesNotMatch"})
_CREDENTIAL_ERRORS = (
    *(NoCredentialsError, PartialCredentialsError, CredentialRetrievalError),
    *(SSOError, TokenRetrievalError),
)


@dataclass(frozen=True)
class StorageOptions:
    """How to reach an object store. What is left out comes from the usual AWS variables, files or the machine's role.

    Args:
        endpoint_url: an S3 endpoint other than AWS; default `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL`.
        region: default `AWS_REGION` or `AWS_DEFAULT_REGION`.
        key, secret, token: credentials; default the `AWS_*` variables and botocore's own search. Never printed.
        anonymous: unsigned requests, for public buckets.
        patience_s: for how long failing storage is tried again (`retrying.py`).
        signed_urls: redacted URL of a source -> the URL that opens it. Plans, tables and messages hold the first, only
            running processes the second.
    """

    endpoint_url: str | None = None
    region: str | None = None
    key: str | None = field(default=None, repr=False)
    secret: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    anonymous: bool = False
    patience_s: float = PATIENCE_S
    signed_urls: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    def for_s3(self, environ: Mapping[str, str] = os.environ) -> dict:
        """The arguments of `s3fs.S3FileSystem`."""
        endpoint = self.endpoint_url or environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL")
        region = self.region or environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION")
        arguments = {
            "anon": self.anonymous,
            "key": self.key,
            "secret": self.secret,
            "token": self.token,
            "endpoint_url": endpoint,
            "use_listings_cache": False,
            "config_kwargs": {
                # Standard mode retries 5xx, throttling, resets and timeouts with exponential backoff and jitter.
                # Adaptive mode adds a rate limit per process; workers on one bucket only slow each other down with it.
                "retries": {"mode": "standard", "total_max_attempts": MAX_ATTEMPTS},
                "connect_timeout": CONNECT_TIMEOUT_S,
                "read_timeout": READ_TIMEOUT_S,
                "max_pool_connections": MAX_POOL_CONNECTIONS,
                # Servers older than 2025 answer 411 or 501 to the checksum trailers that botocore adds by default.
                "request_checksum_calculation": "when_required",
                "response_checksum_validation": "when_required",
            },
        }
        if region:
            arguments["client_kwargs"] = {"region_name": region}
        return arguments


DEFAULT_OPTIONS = StorageOptions()
OWN_ERRORS = (InputError, CredentialsError)  # what every failure of storage is turned into


def scheme_of(url: str) -> str:
    """`s3` for `s3://bucket/key`; `file` for a plain path."""
    found = SCHEME.match(url)
    return found.group(1).lower() if found else "file"


def connect(url: str, options: StorageOptions = DEFAULT_OPTIONS) -> tuple[fsspec.AbstractFileSystem, str]:
    """A filesystem for `url` and the path of `url` in it. Cheap: fsspec keeps one instance per set of arguments.

    Raises:
        ConfigError: an unknown scheme, or the package for it is not installed.
    """
    scheme = scheme_of(url)
    if scheme == "file":
        path = url[len("file://") :] if url.startswith("file://") else url
        return fsspec.filesystem("file"), os.path.abspath(path)
    arguments = options.for_s3() if scheme in S3_SCHEMES else {"use_listings_cache": False}
    try:
        fs = fsspec.filesystem(scheme, **arguments)
    except (ImportError, ValueError, TypeError, OSError) as error:  # some need more than a URL, or connect at once
        reason = str(error).partition("\n")[0][:300]
        raise ConfigError(
            f"{scrub(url)}: no storage for the scheme {scheme!r} ({reason}); use s3:// or a path"
        ) from error
    if scheme in S3_SCHEMES:
        fs.retries = 1  # s3fs retries without jitter, and in two nested loops; `storage_call` does it once
    return fs, url.split("://", 1)[1].rstrip("/")


def scrub(text: str, options: StorageOptions | None = None) -> str:
    """`text` without credentials: known secrets, and what `redaction.redact_text` removes from URLs."""
    secrets = [os.environ.get(name) for name in _SECRET_VARIABLES]
    if options is not None:
        secrets += [options.key, options.secret, options.token]
    for secret in secrets:
        if secret and len(secret) >= 4:  # shorter strings occur in ordinary words
            text = text.replace(secret, "***")
    return redact_text(text)


def to_own_error(
    error: BaseException, what: str, options: StorageOptions = DEFAULT_OPTIONS
) -> InputError | CredentialsError:
    """The error for an exception of the storage layer; its message names `what` and holds no credential."""
    code = _error_code(error)
    refused = _refused_credentials(error, code, what, options)
    if refused:
        return CredentialsError(
            f"{scrub(what, options)}: the storage refuses access ({refused}), not to this object but to these "
            "credentials; give valid ones (AWS_* variables, a profile or a role)"
        )
    if isinstance(error, FileNotFoundError | NotADirectoryError) or code in _MISSING_CODES:
        return InputError(ErrorKind.MISSING_OBJECT, f"{scrub(what, options)}: the storage has no such object")
    if isinstance(error, PermissionError) or code in _NO_ACCESS_CODES:
        reason = code or type(error).__name__
        return InputError(
            ErrorKind.FORBIDDEN,
            f"{scrub(what, options)}: the storage refuses access ({reason}); check the credentials and their policy",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InputError(ErrorKind.STORAGE, f"{scrub(what, options)}: no space is left there; make room")
    detail = scrub(f"{code or type(error).__name__}: {error}", options)[:300]
    return InputError(ErrorKind.STORAGE, f"{scrub(what, options)}: the storage failed after retries ({detail})")


def _refused_credentials(error: BaseException, code: str, what: str, options: StorageOptions) -> str:
    """What shows that the credentials are at fault and not `what`; an empty string if nothing does."""
    if isinstance(error, _CREDENTIAL_ERRORS) or type(error).__module__.startswith("google.auth."):
        return type(error).__name__
    if code in _DOUBTFUL_CODES and scheme_of(what) in S3_SCHEMES:
        fs, path = connect(what, options)
        try:
            fs.call_s3("list_objects_v2", Bucket=path.partition("/")[0], MaxKeys=1)
        except STORAGE_ERRORS as answer:
            code = _error_code(answer)
            return code if code in _CREDENTIAL_CODES or code == "SignatureDoesNotMatch" else ""
    return code if code in _CREDENTIAL_CODES else ""


def _error_code(error: BaseException) -> str:
    """S3's code, or the HTTP status of another store's answer; an empty string if there is neither."""
    for cause in (error, error.__cause__):  # s3fs keeps botocore's answer as the cause
        if isinstance(cause, ClientError):
            return str(cause.response.get("Error", {}).get("Code", ""))
    return str(http_status(error) or "")


@contextmanager
def storage_errors(what: str, options: StorageOptions = DEFAULT_OPTIONS) -> Iterator[None]:
    """The one boundary where storage exceptions become `InputError`, or `CredentialsError`."""
    try:
        yield
    except Exception as error:
        if not is_storage_error(error):
            raise
        raise to_own_error(error, what, options) from error


def storage_call(call: Callable[[], _Result], url: str, options: StorageOptions) -> _Result:
    """Make a request to storage: tried again while the failure may pass, then mapped to our own errors."""
    with storage_errors(url, options):
        return retry_budget(url).run(call, options.patience_s)


def read_object(fs: fsspec.AbstractFileSystem, path: str) -> bytes:
    """A whole object in one request. s3fs would first ask for the size, to split objects above 50 MiB."""
    if getattr(fs, "protocol", None) and set(fs.protocol) & S3_SCHEMES:
        return fs.cat_file(path, max_concurrency=1)
    return fs.cat_file(path)


def s3_keys(
    fs: fsspec.AbstractFileSystem, prefix: str, edges: Sequence[str], options: StorageOptions = DEFAULT_OPTIONS
) -> list[str]:
    """`bucket/key` of all objects directly under `bucket/prefix/`, in key order, listed in ranges between `edges`."""

    def keys(start: str, end: str | None) -> list[str]:
        found = []
        for page in s3_pages(fs, prefix, "/", start, options):
            found += [key for key, _ in page if end is None or key <= prefix + end]
            if end is not None and page and page[-1][0] >= prefix + end:
                break
        return found

    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        ranges = pool.map(keys, ["", *edges], [*edges, None])
        return [key for found in ranges for key in found]


def s3_pages(
    fs: fsspec.AbstractFileSystem,
    prefix: str,
    delimiter: str = "",
    start: str = "",
    options: StorageOptions = DEFAULT_OPTIONS,
) -> Iterator[list[tuple[str, int]]]:
    """Pages of (`bucket/key`, size) under `bucket/prefix`, at most 1000 each, in key order, one at a time.

    Args:
        start: only keys after this one, which is relative to `prefix`.
    """
    bucket, _, key_prefix = prefix.partition("/")
    arguments = {"Bucket": bucket, "Prefix": key_prefix, "Delimiter": delimiter}
    if start:
        arguments["StartAfter"] = key_prefix + start
    budget = retry_budget(f"s3://{bucket}")
    while True:
        page = budget.run(partial(fs.call_s3, "list_objects_v2", **arguments), options.patience_s)
        yield [(f"{bucket}/{entry['Key']}", entry["Size"]) for entry in page.get("Contents", ())]
        if not page.get("IsTruncated"):
            return
        arguments["ContinuationToken"] = page["NextContinuationToken"]


def s3_delete(fs: fsspec.AbstractFileSystem, paths: Sequence[str], options: StorageOptions = DEFAULT_OPTIONS) -> None:
    """Remove objects `bucket/key` of one bucket; no error for those that are already gone.

    Not by `fs.rm`: it takes brackets in a key for a pattern, and does not say which objects were not removed.
    """
    for start in range(0, len(paths), DELETED_AT_ONCE):
        some = paths[start : start + DELETED_AT_ONCE]
        storage_call(partial(_delete_objects, fs, some), f"s3://{some[0]}", options)


def _delete_objects(fs: fsspec.AbstractFileSystem, paths: Sequence[str]) -> None:
    bucket = paths[0].partition("/")[0]
    keys = [{"Key": path.partition("/")[2]} for path in paths]
    answer = fs.call_s3("delete_objects", Bucket=bucket, Delete={"Objects": keys, "Quiet": True})
    for refused in answer.get("Errors", ()):  # the answer itself has status 200
        status = 503 if refused.get("Code") in ("InternalError", "SlowDown", "ServiceUnavailable") else 403
        raise ClientError({"Error": refused, "ResponseMetadata": {"HTTPStatusCode": status}}, "DeleteObjects")
