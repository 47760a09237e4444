"""Damaged input, and a process under limits that tries what our code makes of it.

The short form tries the same EXAMPLES of each target in every run. The long form, `pytest -m slow -k fuzz -s`, tries
others each time, for FUZZ_SECONDS on each target; FUZZ_SEED, which it prints, repeats them.

A target is a function of a test module that takes the damaged input. It may return, or raise an error of our tree; it
may not raise anything else, crash, take longer than a limit, or more memory than one.
"""

import multiprocessing
import os
import random
import resource
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from parakeet_core.errors import ParakeetError

EXAMPLES = 60  # of the short form
ROUND = 500  # of each round of the long form
FUZZ_SECONDS = float(os.environ.get("FUZZ_SECONDS", "60"))
FUZZ_SEED = int(os.environ.get("FUZZ_SEED", random.SystemRandom().randrange(2**32)))
PHASES = [Phase.generate, Phase.shrink]  # explaining a failure takes minutes where an example is a large file
MEMORY_BYTES = 1 << 30  # beside what the process uses before: 1000 times what the seeds need
LIMIT_S = 30.0  # seeds take 10 ms; the rest is for a busy machine
IMPORT_S = 300.0  # before the first target: Python, torch and hypothesis on a busy machine
JUNK_BYTES = [b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", bytes(8), b"\0\0\0\x80", b"\x80\0\0\0"]
JUNK_BYTES += [b"\xff" * 8, b"\0\0\x01\0", b"{", b"]", b'"', b"\\u0000", b"9" * 400, b"\x80\x02."]


def _nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


JUNK_VALUES = [
    None,
    True,
    -1,
    0,
    1,
    2,
    3,
    2**24 - 1,
    2**31,
    2**63,
    10**30,
    0.5,
    -0.5,
    1e308,
    float("inf"),
    float("nan"),
]
JUNK_VALUES += ["", "\0", "é", "9" * 50, "../../etc/passwd", "a" * 100_000, [], {}, [None], [[1, 2]], {"": {}}]
JUNK_VALUES += [_nested(50)]


@st.composite
def damaged_bytes(draw, seeds: list[bytes]) -> bytes:
    """A seed with a few bytes changed, lost, repeated or added, mostly near its start; seldom random bytes."""
    if draw(st.integers(0, 19)) == 0:
        return draw(st.binary(max_size=1000))
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 4]))):
        at = draw(st.integers(0, min(len(data), draw(st.sampled_from([64, 600, 5000, 1 << 30, 1 << 30])))))
        action = draw(st.integers(0, 6))
        junk = draw(st.one_of(st.sampled_from(JUNK_BYTES), st.binary(min_size=1, max_size=8)))
        if action <= 2:
            data[at : at + len(junk)] = junk
        elif action == 3:
            data[at:at] = junk
        elif action == 4:
            del data[at : at + draw(st.integers(1, 64))]
        elif action == 5:
            data[at:at] = data[at : at + draw(st.integers(1, 600))]
        else:
            del data[at:]
    return bytes(data)


@st.composite
def damaged_tree(draw, seed: dict | list) -> dict | list:
    """A JSON-like value of which a few members anywhere are replaced by junk, lost, or put elsewhere."""
    tree = _copy(seed)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 4]))):
        node, steps = tree, draw(st.integers(0, 6))
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if steps and isinstance(node[key], dict | list) and len(node[key]):
                node, steps = node[key], steps - 1
                continue
            if draw(st.integers(0, 5)) == 0:
                del node[key]
            else:
                node[key] = _copy(draw(st.sampled_from(JUNK_VALUES)))
            break
    return tree


def _copy(value: object) -> object:
    if isinstance(value, dict):
        return {key: _copy(member) for key, member in value.items()}
    return [_copy(member) for member in value] if isinstance(value, list) else value


class Sandbox:
    """One process after another that runs targets under limits."""

    def __init__(self, memory_bytes: int = MEMORY_BYTES, limit_s: float = LIMIT_S):
        self.memory_bytes, self.limit_s = memory_bytes, limit_s
        self._process = None

    def run(self, target: Callable, *arguments) -> str:
        """What became of it: "result", or "refused" and by which error.

        Raises:
            AssertionError: anything else.
        """
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, self.memory_bytes), daemon=True)
            self._process.start()
            theirs.close()
        outcome = self._outcome(target, arguments)
        if not outcome.startswith(("result", "refused")):
            self.close()
            raise AssertionError(outcome)
        return outcome

    def _outcome(self, target: Callable, arguments: tuple) -> str:
        try:
            self._connection.send((target, arguments))
            for limit_s in (IMPORT_S, self.limit_s):
                if not self._connection.poll(limit_s):
                    return f"ran longer than {limit_s:.0f} s"
                outcome = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join(10)
            return f"ended its process, status {self._process.exitcode}"
        return outcome

    def fuzz(
        self, target: Callable, arguments: st.SearchStrategy[tuple], examples: int = EXAMPLES, chosen_seed: int = 0
    ) -> dict[str, int]:
        """Try some of the arguments; how often there was which outcome."""
        outcomes: dict[str, int] = {}
        checks = list(HealthCheck)

        @seed(chosen_seed)
        @settings(max_examples=examples, phases=PHASES, suppress_health_check=checks, derandomize=False, database=None)
        @given(arguments)
        def check(values):
            outcome = self.run(target, *values)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1

        check()
        return outcomes

    def fuzz_long(self, target: Callable, arguments: st.SearchStrategy[tuple]) -> dict[str, int]:
        """The same again and again for FUZZ_SECONDS, from FUZZ_SEED on."""
        outcomes: dict[str, int] = {}
        deadline, round_seed = time.monotonic() + FUZZ_SECONDS, FUZZ_SEED
        while time.monotonic() < deadline:
            print(f"FUZZ_SEED={round_seed}")
            for outcome, count in self.fuzz(target, arguments, ROUND, round_seed).items():
                outcomes[outcome] = outcomes.get(outcome, 0) + count
            round_seed += 1
        return outcomes

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None


def _serve(connection: Connection, memory_bytes: int) -> None:
    while True:
        try:
            target, arguments = connection.recv()  # imports the target's module
        except EOFError:
            return
        connection.send("started")
        limits = resource.getrlimit(resource.RLIMIT_AS)
        used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used_bytes + memory_bytes, limits[1]))
        try:
            target(*arguments)
            outcome = "result"
        except ParakeetError as error:
            outcome = f"refused by {type(error).__name__}"
        except BaseException:  # noqa: BLE001 - panics of Rust libraries are no Exceptions; all become the test's failure
            outcome = traceback.format_exc(limit=-6)[-3000:]
        resource.setrlimit(resource.RLIMIT_AS, limits)
        connection.send(outcome)
