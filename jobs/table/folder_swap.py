"""Swap two folders on one local disk in one step, so that no reader sees a state in between.

Python has no call for this, but Linux does: renameat2 with RENAME_EXCHANGE (since 3.15; ext4, xfs, btrfs, tmpfs,
overlayfs).
"""

import ctypes
import os
from collections.abc import Iterable

from jobs.storage.local_files import sync_folder
from jobs.table.parts import MERGED_NAME, PART_NAME

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def swap_folder(folder: str, beside: str, kept: Iterable[str]) -> bool:
    """Complete the folder `beside` with the files `kept` of `folder`, as hard links, and swap the two folders.

    Returns:
        False if this system cannot do it; then `folder` is unchanged.
    """
    try:
        for name in kept:
            _link(f"{folder}/{name}", f"{beside}/{name}")
    except OSError:
        return False  # a disk without hard links
    sync_folder(beside)
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None or rename(AT_FDCWD, os.fsencode(folder), AT_FDCWD, os.fsencode(beside), RENAME_EXCHANGE):
        return False
    sync_folder(os.path.dirname(folder))
    return True


def _link(source: str, target: str) -> None:
    """Make a hard link; one left by an earlier try may lead to a file that has been replaced since."""
    if os.path.exists(target) and not os.path.samefile(source, target):
        os.unlink(target)
    if not os.path.exists(target):
        os.link(source, target)


def recover_folder(folder: str, old: str, shards: set[str]) -> None:
    """Move from `old` into `folder` what belongs there: parts that a job committed during the swap, and what other
    programs have put beside the files of the table, such as `_SUCCESS` or `_delta_log/`.

    Args:
        shards: the shards that `folder` holds.
    """
    for name in os.listdir(old):
        found, there = PART_NAME.match(name), f"{folder}/{name}"
        if MERGED_NAME.match(name):
            continue
        if found is None:
            late = not os.path.lexists(there)
        elif os.path.exists(there):
            late = os.stat(f"{old}/{name}").st_mtime_ns > os.stat(there).st_mtime_ns
        else:
            late = found["shard"] not in shards
        if late:
            os.replace(f"{old}/{name}", there)
