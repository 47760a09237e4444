"""The job as a separate process, with its own Ray, to be killed; and the processes that belong to it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
PROMPTS, TINY_EN = REPO / "tests/data/prompts", REPO / "tests/data/tiny-en"
WAIT_S = 240  # a run takes some 20 s on two free cores


def session_members(session: int, name: str = "") -> list[int]:
    """Processes of a session whose command line holds `name`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                same_session = os.getsid(int(entry.name)) == session
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except (ProcessLookupError, FileNotFoundError, PermissionError):
                continue
            if same_session and name in command:
                found.append(int(entry.name))
    return found


def count_parts(output: Path) -> int:
    """Parts committed so far."""
    return len(list(Path(output, "transcripts").glob("part-*.parquet")))


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"no {what} within {WAIT_S} s")
        time.sleep(0.05)


def transcription(source: Path, output: Path) -> list[str]:
    """Module and arguments of the job with the bundled model."""
    given = ["--input", str(source), "--output", str(output), "--model", str(TINY_EN), "--device", "cpu"]
    return ["jobs.transcribe", *given]


class JobProcess:
    """`python -m jobs.transcribe` in a session of its own, so that everything it starts can be found and ended."""

    def __init__(self, source: Path, output: Path, *options: str, variables: dict[str, str] | None = None):
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        environment |= variables or {}
        self.output = output
        self.process = subprocess.Popen(
            [sys.executable, "-m", *self.command(source, output), *options],
            cwd=REPO,
            env=environment,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def command(self, source: Path, output: Path) -> list[str]:
        """Module and arguments; a subclass for another job returns others."""
        return transcription(source, output)

    def parts(self) -> int:
        """Parts committed so far."""
        return count_parts(self.output)

    def wait_for_parts(self, count: int) -> None:
        """Wait until so many parts are committed; fails if the job ends before that."""
        self.wait_until(lambda: self.parts() >= count, f"{count} parts")

    def wait_until(self, condition, what: str) -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            if self.process.poll() is not None:
                raise AssertionError(f"the job ended with {self.process.returncode} before {what}:\n{self.finish()[1]}")
            if time.monotonic() > deadline:
                self.kill_all()
                raise AssertionError(f"no {what} within {WAIT_S} s")
            time.sleep(0.02)

    def members(self, name: str = "") -> list[int]:
        """Processes of the job's session whose command line holds `name`."""
        return session_members(self.process.pid, name)

    def kill_driver(self, with_signal: int = signal.SIGKILL) -> None:
        os.kill(self.process.pid, with_signal)

    def kill_all(self) -> None:
        """kill -9 of the driver and of every process of its Ray."""
        for pid in sorted(self.members(), reverse=True):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def finish(self) -> tuple[int, str]:
        """(exit status, what the job printed), after its last process has gone."""
        printed, _ = self.process.communicate(timeout=WAIT_S)
        deadline = time.monotonic() + 30
        while self.members() and time.monotonic() < deadline:
            time.sleep(0.1)
        self.kill_all()
        return self.process.returncode, printed


def run_job(source: Path, output: Path, *options: str, variables: dict[str, str] | None = None) -> tuple[int, str]:
    """Run the job to its end, with additional environment variables."""
    return JobProcess(source, output, *options, variables=variables).finish()


def write_manifest(path: Path, repeats: int) -> int:
    """Write a manifest of the bundled prompts, each several times under its own id; returns the number of items."""
    lines = (PROMPTS / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    with open(path, "w", encoding="utf-8") as file:
        for repeat in range(repeats):
            for line in lines:
                record = json.loads(line)
                name = record["audio_filepath"]
                record |= {"id": f"{repeat}/{name}", "audio_filepath": str(PROMPTS / name)}
                file.write(json.dumps(record) + "\n")
    return repeats * len(lines)
