"""Joining or starting Ray, quietly. Knows nothing of what is run on it."""

import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import ray
import ray.data

from jobs.storage.files import Storage
from parakeet_core.errors import ConfigError, WorkerError

RAY_ADDRESS = "RAY_ADDRESS"  # set by `ray job submit` for the job's entry point
HEAD_PATIENCE_S = 15.0  # for the port of a cluster's head to open; a head that is starting takes 7 to 14 s
CONNECT_S = 5.0  # for one try
LOCAL = "local"  # Ray's word for a new cluster of this process's own
# By default Ray tries 20 times, for 35 s each and silently, to reach a head. One try is enough for something that
# listens but is no head, such as the dashboard's port, and for a head that "auto" remembers but that is gone.
TOO_SLOW = "timed out during startup"  # of a raylet; in Ray's words
JOIN_TRIES = "RAY_gcs_server_port_wait_time_s", "1"
_RAISED = re.compile(r"^[A-Za-z_][\w.]*: .+$", re.MULTILINE)  # the line of a traceback that names the exception


@contextmanager
def ray_session(address: str | None) -> Iterator[dict[str, float]]:
    """Ray for the length of the block: a session already running, the cluster at `address`, or a new local one.

    A local cluster that happens to run on this machine is not joined unless it is asked for.

    Yields:
        The cluster's resources as they are now.

    Raises:
        ConfigError: `address` is not an address.
        WorkerError: Ray did not start, or cannot be reached. Nothing has run on it; another try may succeed.
    """
    started = not ray.is_initialized()
    if started:
        address = _asked(address)
        _find_head(address)
        _start(address)
    quiet_ray_data()
    try:
        yield ray.cluster_resources()
    finally:
        if started:
            ray.shutdown()


def starts_alone(address: str | None) -> bool:
    """Whether `ray_session` will start a cluster of its own, which no node will join."""
    return not ray.is_initialized() and _asked(address) == LOCAL


def _asked(address: str | None) -> str:
    return address or os.environ.get(RAY_ADDRESS) or LOCAL


def alive_nodes() -> list[dict[str, float]]:
    """The resources of each node that the cluster has now."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def note_local_output(output: Storage, nodes: int) -> None:
    """Say on stderr what is required of an output on disk that several nodes are to write."""
    if output.is_local and nodes > 1:
        print(
            f"note       {output.url} is a path, and the cluster has {nodes} nodes: it must be one folder that all of "
            "them share; else give a URL",
            file=sys.stderr,
        )


def _find_head(address: str) -> None:
    """Make sure that something listens at HOST:PORT. `ray.init` would try silently for a quarter of an hour."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        return  # a word, a ray:// client's address, or something that Ray will refuse
    deadline = time.monotonic() + HEAD_PATIENCE_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
            return
        except OverflowError as error:
            raise ConfigError(f"Ray at {address!r} cannot be used: {error}") from error
        except OSError as error:
            if time.monotonic() > deadline:
                raise WorkerError(
                    f"no Ray cluster answers at {address} ({error}), and nothing has run on it; check the address, and "
                    "that the cluster runs and can be reached from here"
                ) from error
            time.sleep(1.0)


def _start(address: str) -> None:
    """`ray.init`, and the one place where its errors are mapped: they have no types of their own.

    A raylet that is not up after 30 s, a limit that cannot be changed in Ray 2.60, is a bare Exception; a GCS that does
    not answer is a RuntimeError, a cluster that cannot be joined a ConnectionError, a full disk an OSError.
    """
    # Ray's C++ core writes advice to the driver's stderr; errors that matter come back as exceptions.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        _init(address)
    except ValueError as error:
        raise ConfigError(f"Ray at {address!r} cannot be used: {_first_sentence(error)}") from error
    except Exception as error:
        if address == LOCAL:
            found, advice = "did not start on this machine", "it may be too busy, or short of memory, disk or processes"
        else:
            found, advice = f"at {address} was not joined", "check that the cluster runs and can be reached from here"
        raise WorkerError(f"Ray {found} ({_first_sentence(error)}), and nothing has run on it; {advice}") from error


def _init(address: str) -> None:
    """`ray.init`, a second time if the first was too slow: as a rule Ray's files are in memory then."""
    try:
        _init_once(address)
    except Exception as error:
        if TOO_SLOW not in str(error):
            raise
        print("note    Ray did not start within its 30 s; trying once more", file=sys.stderr)
        _init_once(address)


def _init_once(address: str) -> None:
    """`ray.init`: silent, because it would report that it has read the environment.

    Its SIGTERM handler is removed again, because that one aborts the process in the middle of a call.
    """
    local = {"include_dashboard": False} if address == LOCAL else {}
    with _without_stderr(), _keeping_sigterm(), nullcontext() if local else _joining_once():
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **local)


def _first_sentence(error: Exception) -> str:
    """The first sentence of Ray's message, which tracebacks and the ends of log files may follow."""
    return str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".") or type(error).__name__


@contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """Restore the SIGTERM handler that was set before the block."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():  # in others Ray sets none, and none may be set
            signal.signal(signal.SIGTERM, handler)


@contextmanager
def _joining_once() -> Iterator[None]:
    """Limit Ray's tries to reach a head. Not for starting one: there the variable limits how long that may take."""
    name, tries = JOIN_TRIES
    stated = name in os.environ
    os.environ.setdefault(name, tries)
    try:
        yield
    finally:
        if not stated:
            del os.environ[name]


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Silence file descriptor 2, which C++ code writes to directly, bypassing `sys.stderr`."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as sink:
            os.dup2(sink.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def quiet_ray_data() -> None:
    """No progress bars and no log lines below errors from Ray Data: the job prints its own."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # Only this argument can set how often a lost shard is tried again.
    warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")


def quiet_ray_train() -> None:
    """No log lines below errors from Ray Train; its workers stay in their folder, so relative paths stay valid."""
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    for name in ("RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING", "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING"):
        os.environ.setdefault(name, "0")
    logging.getLogger("ray.train").setLevel(logging.ERROR)


def root_cause(error: BaseException) -> str:
    """The error at the bottom of a chain of wrapped exceptions, in one line."""
    if not isinstance(error, ray.exceptions.RayError):
        return str(error).partition("\n")[0] or type(error).__name__
    # Ray passes on an actor's exceptions as a printed traceback; the last one in it is Ray's own, with advice.
    raised = [found for found in _RAISED.findall(str(error)) if not found.startswith("ray.exceptions.")]
    ours = [found for found in raised if found.startswith("parakeet_core.errors.")]
    if ours:
        return ours[-1].partition(": ")[2]
    return (raised or [str(error).strip().splitlines()[-1]])[-1]
