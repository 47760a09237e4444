"""Kills at chosen moments of commits on local disk. Python loads it in every process that has its folder on its path.

FAULT_PLAN    which commits, counted over all processes from 1, and when: "2:half,5:before,8:after"
              half: as if half of the part had been written to its temporary file; before: all of it, the rename comes
              next; after: it is renamed, nobody knows
FAULT_VICTIM  worker: the process that commits; session: it, the driver and all of Ray
FAULT_COUNTER a file that counts commits by its bytes
"""

import os
import signal
from pathlib import Path

_replace = os.replace
_plan = dict(entry.split(":") for entry in os.environ.get("FAULT_PLAN", "").split(",") if entry)


def _replacing(source, target, **options) -> None:
    moment = _plan.get(_count()) if "/transcripts/part-" in str(target) else None
    if moment == "half":
        os.truncate(source, os.stat(source).st_size // 2)
    if moment in ("half", "before"):
        _kill()
    _replace(source, target, **options)
    if moment == "after":
        _kill()


def _count() -> str:
    """The number of this commit."""
    counter = os.open(os.environ["FAULT_COUNTER"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(counter, b".")
    number = os.fstat(counter).st_size
    os.close(counter)
    return str(number)


def _kill() -> None:
    if os.environ["FAULT_VICTIM"] == "session":
        for process in (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()):
            try:
                if process != os.getpid() and os.getsid(process) == os.getsid(0):
                    os.kill(process, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue
    os.kill(os.getpid(), signal.SIGKILL)


if _plan:
    os.replace = _replacing
