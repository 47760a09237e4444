"""jobs/command_line.py: how a command of a job ends."""

import os
import signal

import pytest

from jobs.command_line import JobStoppedError, exit_status, interrupt_on_sigterm
from parakeet_core.errors import CheckpointError, ConfigError, ErrorKind, InputError, WorkerError


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (JobStoppedError("two parts are left; go on so"), 1, "stopped: two parts are left; go on so"),
        (InputError(ErrorKind.STORAGE, "s3://b: the storage failed"), 1, "the storage failed; do it again"),
        (WorkerError("Ray did not start"), 1, "stopped: Ray did not start; do it again"),
        (KeyboardInterrupt(), 1, "stopped: interrupted; do it again"),
        (ConfigError("--limit 0: expected more"), 2, "error: --limit 0: expected more"),
        (CheckpointError("no weights"), 2, "error: no weights"),
    ],
)
def test_a_failure_is_one_line_and_a_status(capsys, error, status, line):
    def work() -> int:
        raise error

    assert exit_status(work, "do it again") == status
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.rstrip("\n").endswith(line)
    assert printed.err.count("\n") == 1


def test_what_work_returns_is_the_status(capsys):
    assert exit_status(lambda: 3) == 3
    assert capsys.readouterr().err == ""


def test_secrets_of_a_url_are_not_printed(capsys):
    def work() -> int:
        raise ConfigError("https://bucket.example/a.flac?X-Amz-Signature=canary: not found")

    assert exit_status(work) == 2
    assert "canary" not in capsys.readouterr().err


def test_an_error_of_the_program_itself_is_not_hidden():
    def work() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        exit_status(work)


def test_sigterm_says_its_notice_and_interrupts(capfd):
    before = signal.getsignal(signal.SIGTERM)
    try:
        interrupt_on_sigterm("SIGTERM: run it again")
        assert exit_status(lambda: os.kill(os.getpid(), signal.SIGTERM) or 0, "go on") == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capfd.readouterr().err == "SIGTERM: run it again\nstopped: interrupted; go on\n"
