"""Files on a local disk that are written whole or not at all, and what killed writers leave of them.

A temporary file is locked (flock) as long as its writer lives, and its name says on which machine the writer runs.
"""

import errno
import fcntl
import os
import platform
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

from parakeet_core.errors import ErrorKind, InputError

HIDDEN_PREFIX = ".tmp-"
FOREIGN_LIFE_S = 86_400.0  # a file of another machine, last written longer ago, is dead: a write takes seconds
_NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})  # filesystems without flock
_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})  # filesystems without hard links


def check_regular(path: str) -> None:
    """Refuse what is not a regular file, before it is opened: a pipe would wait forever, and a device may never end.

    Raises:
        OSError: the path does not exist or may not be examined.
        InputError: BAD_RECORD.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        found = kinds.get(stat.S_IFMT(mode), "a device")
        raise InputError(ErrorKind.BAD_RECORD, f"{path}: this is {found}; expected a regular file, name one or copy it")


def write_local(path: str, data: bytes | IO[bytes], exclusive: bool, temporary_folder: str) -> bool:
    """Make `path` hold `data` through a temporary file, fsync and a rename; creates both folders.

    Args:
        exclusive: only if `path` does not exist.
        temporary_folder: on the same filesystem.

    Returns:
        False if `exclusive` and the path exists.
    """
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    os.makedirs(temporary_folder, exist_ok=True)
    temporary, handle = _open_locked(temporary_folder)
    try:
        with os.fdopen(handle, "wb") as file:  # closed, and so unlocked, only after the rename
            if isinstance(data, bytes):
                file.write(data)
            else:
                shutil.copyfileobj(data, file, 2**20)
            file.flush()
            os.fsync(handle)
            if exclusive:
                _link(temporary, path)
            else:
                os.replace(temporary, path)
    except FileExistsError:
        return False
    finally:
        with suppress(FileNotFoundError):  # a rename has moved it
            os.unlink(temporary)
    sync_folder(folder)
    return True


def _link(temporary: str, path: str) -> None:
    """Give the file its name; FileExistsError if the name exists: a rename would replace that file."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # Without hard links (FAT, some network and FUSE mounts) an empty file takes the name, and the whole one then
        # replaces it. A writer that is killed between the two leaves the file empty.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        os.replace(temporary, path)


def _open_locked(folder: str) -> tuple[str, int]:
    """(path, handle) of a new file that this process has locked."""
    while True:
        path = os.path.join(folder, f"{_own_prefix()}{uuid.uuid4().hex}")
        # Not tempfile: its files are private to the user (mode 0600), but others must be able to read a table.
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        if os.fstat(handle).st_nlink:
            return path, handle
        os.close(handle)  # removed as dead between being created and being locked


@contextmanager
def try_lock(path: str) -> Iterator[bool]:
    """Lock an existing file during the block; False if another process holds the lock. A dead process holds none."""
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            if error.errno not in _NO_LOCKS | {errno.EBADF}:  # NFS: no lock on a file open only for reading
                raise
        yield True


def _own_prefix() -> str:
    return f"{HIDDEN_PREFIX}{re.sub(r'[^A-Za-z0-9.]', '_', platform.node())}-"


def remove_dead_temporaries(folder: str) -> int:
    """Remove temporary files whose writers are dead; returns their number. Those of live writers are never touched.

    On this machine a writer is dead if its file is not locked. A lock of another machine may not be visible here: its
    files are removed when they are older than `FOREIGN_LIFE_S`.
    """
    try:
        names = [name for name in os.listdir(folder) if name.startswith(HIDDEN_PREFIX)]
    except FileNotFoundError:
        return 0
    removed = 0
    for name in names:
        with suppress(FileNotFoundError):  # its writer was faster
            removed += _remove_if_dead(os.path.join(folder, name), name.startswith(_own_prefix()))
    return removed


def _remove_if_dead(path: str, own: bool) -> bool:
    try:
        handle = os.open(path, os.O_RDWR)  # on NFS a file open only for reading cannot be locked (EBADF)
    except PermissionError:
        return False  # another user's: left to them
    try:
        if not own and time.time() - os.fstat(handle).st_mtime < FOREIGN_LIFE_S:
            return False
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    finally:
        os.close(handle)


def sync_folder(folder: str) -> None:
    """Write a folder to disk: only then is a rename in it durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network filesystems do not sync folders
            raise
    finally:
        os.close(handle)
