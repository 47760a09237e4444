"""Bytes in and out of a local disk or an object store: connections, atomic writes, names in a folder, error mapping.

Knows nothing of audio, plans or Ray. Nothing here caches a listing: a job's truth is what the storage says now.
Exceptions of fsspec, botocore and aiohttp become `InputError` here and nowhere else.
"""

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO

import aiohttp
import fsspec
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

from parakeet_core.errors import ConfigError, ErrorKind, InputError

S3_SCHEMES = frozenset({"s3", "s3a"})
SCHEME = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]*)://")

MAX_ATTEMPTS = 8  # with botocore's waits of up to 20 s between tries: about half a minute, three times (see below)
CONNECT_TIMEOUT_S = 10  # a healthy endpoint answers in under 1 s; a dead host must not hold a worker for minutes
READ_TIMEOUT_S = 20  # between two packets, not for the whole body; a hung socket costs this once per attempt
BODY_ATTEMPTS = 3  # botocore retries until the headers are there; a body that breaks off is fetched again by s3fs
READ_BLOCK_BYTES = 8 << 20  # of `Storage.open`; s3fs would read 50 MiB ahead
MAX_POOL_CONNECTIONS = 64  # botocore's default of 10 would queue the read-ahead threads of one worker behind each other
LISTING_THREADS = 16  # ranges of one long listing at a time; a page of 1000 names takes 100-300 ms
SINGLE_PUT_LIMIT = 5 * 2**30 - 1  # S3 refuses a larger put_object; parts and plan files are a few hundred MiB at most
HIDDEN_PREFIX = ".tmp-"
TEMPORARY_FOLDER = ".tmp"  # under the root: what a killed writer leaves must not lie among the files of a table

# What fsspec, s3fs and gcsfs let through. OSError covers local files, FileNotFoundError, PermissionError, TimeoutError.
STORAGE_ERRORS = (OSError, BotoCoreError, ClientError, aiohttp.ClientError)
_SECRET_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")
_NO_ACCESS_CODES = frozenset(
    {"AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
)


@dataclass(frozen=True)
class StorageOptions:
    """How to reach an object store. What is left out comes from the usual AWS variables, files or the machine's role.

    Args:
        endpoint_url: an S3 endpoint other than AWS; default `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL`.
        region: default `AWS_REGION` or `AWS_DEFAULT_REGION`.
        key, secret, token: credentials; default the `AWS_*` variables and botocore's own search. Never printed.
        anonymous: unsigned requests, for public buckets.
    """

    endpoint_url: str | None = None
    region: str | None = None
    key: str | None = field(default=None, repr=False)
    secret: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    anonymous: bool = False

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
                # Standard mode retries 5xx, throttling, resets and timeouts with exponential backoff, jitter. Adaptive
                # mode adds a rate limit per process, with which many workers on one bucket only slow each other.
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
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"{scrub(url)}: no storage for the scheme {scheme!r} ({error}); use s3:// or a path"
        ) from error
    if scheme in S3_SCHEMES:
        fs.retries = BODY_ATTEMPTS  # an attribute: s3fs takes no argument for it
    return fs, url.split("://", 1)[1].rstrip("/")


def scrub(text: str, options: StorageOptions | None = None) -> str:
    """`text` without credentials: known secrets, user:password@ in URLs, query strings (signed URLs)."""
    secrets = [os.environ.get(name) for name in _SECRET_VARIABLES]
    if options is not None:
        secrets += [options.key, options.secret, options.token]
    for secret in secrets:
        if secret and len(secret) >= 4:  # shorter strings occur in ordinary words
            text = text.replace(secret, "***")
    text = re.sub(r"(://)[^/@\s]+@", r"\1***@", text)
    return re.sub(r"(https?://[^\s?\"']+)\?[^\s\"']*", r"\1?***", text)


def to_input_error(error: BaseException, what: str, options: StorageOptions | None = None) -> InputError:
    """The `InputError` for an exception of the storage layer; its message names `what` and holds no credential."""
    code = ""
    for cause in (error, error.__cause__):  # s3fs keeps botocore's answer as the cause
        if isinstance(cause, ClientError):
            code = str(cause.response.get("Error", {}).get("Code", ""))
    if isinstance(error, FileNotFoundError | NotADirectoryError) or code in ("NoSuchKey", "NoSuchBucket", "404"):
        return InputError(ErrorKind.MISSING_OBJECT, f"{scrub(what, options)}: the storage has no such object")
    denied = isinstance(error, PermissionError | NoCredentialsError | PartialCredentialsError)
    if denied or code in _NO_ACCESS_CODES:
        reason = code or type(error).__name__
        return InputError(
            ErrorKind.FORBIDDEN,
            f"{scrub(what, options)}: the storage refuses access ({reason}); check the credentials and their policy",
        )
    detail = scrub(f"{type(error).__name__}: {error}", options)[:300]
    return InputError(ErrorKind.STORAGE, f"{scrub(what, options)}: the storage failed after retries ({detail})")


@contextmanager
def storage_errors(what: str, options: StorageOptions | None = None) -> Iterator[None]:
    """Every storage call runs inside this: the one boundary where storage exceptions become `InputError`."""
    try:
        yield
    except STORAGE_ERRORS as error:
        raise to_input_error(error, what, options) from error


class Storage:
    """A folder on a local disk or a prefix of an object store, reached by names relative to it. Can be pickled.

    All methods raise `InputError` of kind MISSING_OBJECT, FORBIDDEN or STORAGE.
    """

    def __init__(self, url: str, options: StorageOptions = DEFAULT_OPTIONS):
        self.url = url.rstrip("/") if len(url) > 1 else url
        self.options = options
        self.scheme = scheme_of(url)
        self.fs, self.root = connect(self.url, options)

    def __reduce__(self):
        return type(self), (self.url, self.options)

    def __repr__(self) -> str:
        return f"Storage({scrub(self.url)!r})"

    @property
    def is_local(self) -> bool:
        return self.scheme == "file"

    def path(self, name: str = "") -> str:
        """The path of `name` in `self.fs`."""
        return f"{self.root.rstrip('/')}/{name}" if name else self.root

    def source(self, name: str) -> str:
        """The URL or absolute path that opens `name` from anywhere."""
        return self.path(name) if self.is_local else f"{self.scheme}://{self.path(name)}"

    def exists(self, name: str) -> bool:
        with storage_errors(self.source(name), self.options):
            try:
                self.fs.info(self.path(name))
            except FileNotFoundError:
                return False
            return True

    def read_bytes(self, name: str) -> bytes:
        with storage_errors(self.source(name), self.options):
            return read_object(self.fs, self.path(name))

    def open(self, name: str) -> IO[bytes]:
        """A seekable file for reading."""
        with storage_errors(self.source(name), self.options):
            if self.is_local:
                return open(self.path(name), "rb")
            return self.fs.open(self.path(name), "rb", block_size=READ_BLOCK_BYTES)

    def list_names(self, folder: str = "", edges: Sequence[str] = ()) -> list[str]:
        """Names of the files directly in `folder`, sorted; none if it does not exist, and no half-written ones.

        Args:
            edges: names, ascending, that cut a long listing of an object store into ranges listed at the same time.
        """
        with storage_errors(self.source(folder), self.options):
            if self.is_local:
                try:
                    with os.scandir(self.path(folder)) as entries:
                        names = [entry.name for entry in entries if entry.is_file()]
                except FileNotFoundError:
                    return []
            elif self.scheme in S3_SCHEMES:
                prefix = f"{self.path(folder)}/"
                names = [key[len(prefix) :] for key in s3_keys(self.fs, prefix, edges)]
            else:
                try:
                    entries = self.fs.ls(self.path(folder), detail=True, refresh=True)
                except FileNotFoundError:
                    return []
                names = [entry["name"].rsplit("/", 1)[-1] for entry in entries if entry["type"] == "file"]
        return sorted(name for name in names if name and not name.startswith(HIDDEN_PREFIX))

    def write_atomic(self, name: str, data: bytes | IO[bytes], exclusive: bool = False) -> bool:
        """Make `name` hold `data`, whole or not at all: no reader ever sees a part of it.

        Local: a temporary file in a hidden folder of the root, fsync, rename. Object store: one put request.

        Args:
            exclusive: only if `name` does not exist yet. Certain on local disk and on stores that honour If-None-Match
                (AWS); elsewhere two writers in the same instant both succeed and the last one stays: read it back.

        Returns:
            False if `exclusive` and the name was there already; else True.
        """
        with storage_errors(self.source(name), self.options):
            if self.is_local:
                return write_local(self.path(name), data, exclusive, self.path(TEMPORARY_FOLDER))
            if exclusive and self.exists(name):  # some servers ignore If-None-Match: rclone 1.75 overwrites
                return False
            body = data if isinstance(data, bytes) else data.read()
            if len(body) > SINGLE_PUT_LIMIT:
                raise OSError(errno.EFBIG, f"{len(body)} bytes are over the limit of one put request")
            try:
                if self.scheme in S3_SCHEMES:
                    # The chunk size decides between one put and a multipart upload: above half of the body, one put.
                    mode = "create" if exclusive else "overwrite"
                    self.fs.pipe_file(self.path(name), body, mode=mode, chunksize=max(50 * 2**20, len(body)))
                else:
                    self.fs.pipe_file(self.path(name), body)
            except FileExistsError:
                return False
            return True

    def delete(self, name: str) -> None:
        """Remove one file; no error if it is gone already."""
        with storage_errors(self.source(name), self.options):
            try:
                self.fs.rm_file(self.path(name))
            except FileNotFoundError:
                return


def read_object(fs: fsspec.AbstractFileSystem, path: str) -> bytes:
    """A whole object in one request. s3fs would first ask for the size, to split objects above 50 MiB."""
    if getattr(fs, "protocol", None) and set(fs.protocol) & S3_SCHEMES:
        return fs.cat_file(path, max_concurrency=1)
    return fs.cat_file(path)


def s3_keys(fs: fsspec.AbstractFileSystem, prefix: str, edges: Sequence[str]) -> list[str]:
    """`bucket/key` of all objects directly under `bucket/prefix/`, in key order, by ranges between `edges`."""

    def keys(start: str, end: str | None) -> list[str]:
        found = []
        for page in s3_pages(fs, prefix, "/", start):
            found += [key for key, _ in page if end is None or key <= prefix + end]
            if len(found) and end is not None and page and page[-1][0] >= prefix + end:
                break
        return found

    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        ranges = pool.map(keys, ["", *edges], [*edges, None])
        return [key for found in ranges for key in found]


def s3_pages(
    fs: fsspec.AbstractFileSystem, prefix: str, delimiter: str = "", start: str = ""
) -> Iterator[list[tuple[str, int]]]:
    """Pages of (`bucket/key`, size) under `bucket/prefix`, at most 1000 each, in key order, one at a time.

    Args:
        start: only keys behind this one, which is relative to `prefix`.
    """
    bucket, _, key_prefix = prefix.partition("/")
    arguments = {"Bucket": bucket, "Prefix": key_prefix, "Delimiter": delimiter}
    if start:
        arguments["StartAfter"] = key_prefix + start
    while True:
        page = fs.call_s3("list_objects_v2", **arguments)
        yield [(f"{bucket}/{entry['Key']}", entry["Size"]) for entry in page.get("Contents", ())]
        if not page.get("IsTruncated"):
            return
        arguments["ContinuationToken"] = page["NextContinuationToken"]


def write_local(path: str, data: bytes | IO[bytes], exclusive: bool, temporary_folder: str) -> bool:
    """`Storage.write_atomic` for a local path; makes both folders. False if `exclusive` and the path exists."""
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    os.makedirs(temporary_folder, exist_ok=True)
    temporary = os.path.join(temporary_folder, f"{HIDDEN_PREFIX}{uuid.uuid4().hex}")
    # Not tempfile: its files are private to the user (mode 0600), a table is for others to read.
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            if isinstance(data, bytes):
                file.write(data)
            else:
                shutil.copyfileobj(data, file, 2**20)
            file.flush()
            os.fsync(file.fileno())
        if exclusive:
            os.link(temporary, path)  # fails if the path exists, which a rename would not
            os.unlink(temporary)
        else:
            os.replace(temporary, path)
    except FileExistsError:
        os.unlink(temporary)
        return False
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
    sync_folder(folder)
    return True


def sync_folder(folder: str) -> None:
    """The rename itself reaches the disk only with the folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network filesystems do not sync folders
            raise
    finally:
        os.close(handle)
