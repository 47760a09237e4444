"""How the command of a job ends: its exit status, and one line of why on standard error. Knows nothing of Ray."""

import os
import signal
import sys
from collections.abc import Callable

from jobs.storage.connections import scrub
from parakeet_core.errors import InputError, ParakeetError, WorkerError

EXIT_STOPPED, EXIT_REFUSED = 1, 2


class JobStoppedError(ParakeetError):
    """The job ended before its work was done; what is committed stays, and the message says how to go on."""


def exit_status(work: Callable[[], int], resume_hint: str = "run the same command again") -> int:
    """What `work` returns; where it fails, the reason in one line and the status for that.

    Args:
        resume_hint: how to go on after failures that may pass.
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
    """SIGTERM, as a spot node's notice or `ray job stop` sends it, ends the command as an interrupt does.

    The notice comes first: `ray job stop` kills after 3 s. By `os.write`, because `print` may be what was interrupted.
    """

    def stop(signal_number: int, frame) -> None:
        os.write(2, f"{notice}\n".encode())
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
