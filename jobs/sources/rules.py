"""Which sources a manifest may name: one from an object store must not read the worker's disk or its private network.

Knows nothing of manifests' syntax or of reading. Addresses are checked here by their text, and again by
`guarded_http.py` at the moment of connecting, because a public name can resolve to a private address.
"""

import ipaddress
import posixpath
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

from jobs.storage.connections import scheme_of, scrub
from jobs.storage.files import Storage
from parakeet_core.errors import ErrorKind, InputError

STORE_SCHEMES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"})  # reached with the job's own credentials
HTTP_SCHEMES = frozenset({"http", "https"})
_PRIVATE_NAMES = ("localhost", ".localhost", ".internal", ".local")  # metadata.google.internal among them


@dataclass(frozen=True)
class SourceRules:
    """Resolves the paths of one input's manifests.

    Args:
        remote: the manifest lies in an object store, so its author need not be a user of this machine.
    """

    remote: bool
    allow_local_paths: bool = False
    allow_http: bool = False

    @classmethod
    def of(cls, storage: Storage, allow_local_paths: bool, allow_http: bool) -> "SourceRules":
        return cls(not storage.is_local, allow_local_paths, allow_http)

    def resolve(self, path: str, folder: str) -> str:
        """The absolute path or URL that `path` means in a manifest that lies in `folder` (a path or URL).

        Raises:
            InputError: BAD_RECORD, if the rules refuse it.
        """
        if not path or "\0" in path:
            raise _refused(path, "is empty or holds a NUL", "name an audio file")
        scheme = scheme_of(path)
        if scheme == "file" or path.startswith("/"):
            local = path.removeprefix("file://")
            if path.startswith("file://") or path.startswith("/"):
                if self.remote and not self.allow_local_paths:
                    raise _refused(
                        path, "is a local path in a manifest from an object store", "use --allow-local-paths"
                    )
                return posixpath.normpath(local)
            return self._relative(path, folder)
        if "::" in path:
            raise _refused(path, "chains protocols", "name the object itself")
        if scheme in HTTP_SCHEMES:
            check_host(path)
            if not self.allow_http:
                raise _refused(path, "is an http URL", "use --allow-http")
            return path
        if scheme not in STORE_SCHEMES:
            raise _refused(path, f"has the scheme {scheme!r}", f"expected a path or one of {sorted(STORE_SCHEMES)}")
        bucket, _, key = path.partition("://")[2].partition("/")
        if not bucket or not key.strip("/"):
            raise _refused(path, "names no object", f"expected {scheme}://bucket/key")
        return path

    def _relative(self, path: str, folder: str) -> str:
        if "::" in path and self.remote:
            raise _refused(path, "chains protocols", "name the object itself")
        if not self.remote:
            return posixpath.normpath(f"{folder}/{path}")
        scheme, _, rest = folder.partition("://")
        bucket = rest.split("/", 1)[0]
        joined = posixpath.normpath(f"/{rest}/{path}").lstrip("/")
        if not joined.startswith(f"{bucket}/"):
            raise _refused(path, "leaves its bucket", "give the full URL")
        return f"{scheme}://{joined}"


def check_host(url: str) -> None:
    """Refuse an http URL whose host, judged by its text, is not on the public internet.

    Raises:
        InputError: BAD_RECORD.
    """
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").rstrip(".").lower()
    except ValueError as error:
        raise _refused(url, "is not a URL", "check it") from error
    if "@" in parts.netloc:  # urllib takes it for part of the host, and shows it in its error
        raise _refused(url, "holds a user or password", "give a signed URL")
    if not host or any(host == name or (name.startswith(".") and host.endswith(name)) for name in _PRIVATE_NAMES):
        raise _refused(url, "names a host that is not on the public internet", "copy the audio to object storage")
    try:
        address = socket.inet_ntoa(socket.inet_aton(host))  # also for 2852039166, 0xa9fea9fe and 169.16689662
    except OSError:
        address = host
    if not is_public(address, default=True):
        raise _refused(url, f"names the private address {address}", "copy the audio to object storage")


def is_public(address: str, default: bool = False) -> bool:
    """Whether a literal IP address is on the public internet; `default` for anything that is not an address."""
    try:
        parsed = ipaddress.ip_address(address.split("%", 1)[0])
    except ValueError:
        return default
    mapped = getattr(parsed, "ipv4_mapped", None) or getattr(parsed, "sixtofour", None)
    return (mapped or parsed).is_global and not parsed.is_multicast


def _refused(path: str, found: str, advice: str) -> InputError:
    return InputError(ErrorKind.BAD_RECORD, f"audio_filepath {scrub(path)[:200]!r} {found}; {advice}")
