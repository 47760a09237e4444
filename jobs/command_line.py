"""How the command of a job ends: its exit status, and a one-line reason on standard error. Knows nothing of Ray."""

import os
import signal
import sys
from collections.abc import Callable

from jobs.storage.connections import scrub
from parakeet_core.errors import InputError, ParakeetError, WorkerError

EXIT_STOPPED, EXIT_REFUSED = 1, 2


class JobStoppedError(ParakeetError):
    """The job ended before its work was done; what is committed stays, and the message says how to continue."""


def exit_status(work: Callable[[], int], resume_hint: str = "run the same command again") -> int:
    """What `work` returns; if it fails, print the reason in one line and return the status for that failure.

    Args:
        resume_hint: how to continue after failures that may be temporary.
    """
    try:
        return work()
    except JobStoppedError as error:
        reason, status = f"stopped: {error}", EXIT_STOPPED
    except (InputError, WorkerError) as error:  # the output's storage failed, or Ray did not start
        reason, status = f"stopped: {error}; {resume_hint}", EXIT_STOPPED
    except KeyboardInterrupt:
        reason, status = f"stopped: interrupted; {resume_hint}", EXIT_STOPPED
    except ParakeetError as error:
        reason, status = f"error: {error}", EXIT_REFUSED
    print(scrub(reason), file=sys.stderr)
    return status


def interrupt_on_sigterm(notice: str) -> None:
    """Make SIGTERM, which comes with a spot node's notice or from `ray job stop`, end the command as an interrupt does.

    `notice` is printed first, because `ray job stop` kills after 3 s; by `os.write`, because `print` may be what was
    interrupted.
    """

    def stop(signal_number: int, frame) -> None:
        os.write(2, f"{notice}\n".encode())
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
