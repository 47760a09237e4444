"""The kills that the job must survive, each by real signals to real processes. For the tests and for long_run.py."""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.dataset as ds
from job_process import JobProcess, count_parts, transcription, wait_until
from ray_nodes import RayNodes

HOOKS = Path(__file__).with_name("hooks")
DEVICE_HOOKS = Path(__file__).with_name("device_hooks")
APART = ("--feature-actors", "1:1", "--model-actors", "1:1")  # the three stages as separate actors
ACTORS = {"model": "RecogniseShards", "feature": "PrepareShards", "commit": "CommitShards"}


@dataclass
class Trial:
    """One output, transcribed through a fault.

    Attributes:
        rng: the source of every random moment.
        printed: what the runs of the job have printed.
    """

    source: Path
    output: Path
    options: tuple[str, ...]
    rng: random.Random
    printed: list[str] = field(default_factory=list)

    def start(self, *options: str, variables: dict[str, str] | None = None) -> JobProcess:
        return JobProcess(self.source, self.output, *self.options, *options, variables=variables)

    def wait_for_middle(self, job: JobProcess) -> None:
        """Wait until a random moment after its next part."""
        job.wait_for_parts(job.parts() + self.rng.randint(1, 3))
        time.sleep(self.rng.random())

    def end(self, job: JobProcess) -> int:
        """Wait until the job has ended; returns its exit status."""
        status, printed = job.finish()
        self.printed.append(printed)
        return status

    def resume(self, *options: str, variables: dict[str, str] | None = None) -> None:
        """Run the same command again, to its end."""
        status, printed = self.start(*options, variables=variables).finish()
        self.printed.append(printed)
        assert status == 0, printed


Fault = Callable[[Trial], None]  # runs the job and kills


def resumed(fault: Fault) -> Fault:
    """A fault that ends the run, followed by the same command again."""

    def both(trial: Trial) -> None:
        fault(trial)
        trial.resume()

    return both


def kill_driver(trial: Trial) -> None:
    """Kill the driver only: the processes of its Ray then end by themselves."""
    job = trial.start()
    trial.wait_for_middle(job)
    job.kill_driver()
    assert trial.end(job) == -signal.SIGKILL


def kill_all(trial: Trial) -> None:
    job = trial.start()
    trial.wait_for_middle(job)
    job.kill_all()
    assert trial.end(job) == -signal.SIGKILL


def terminate_driver(trial: Trial) -> None:
    job = trial.start()
    trial.wait_for_middle(job)
    job.kill_driver(signal.SIGTERM)
    started = time.monotonic()
    assert trial.end(job) == 1
    assert time.monotonic() - started < 60  # a spot notice gives two minutes
    assert "run the same command again" in trial.printed[-1]


def kill_actor(kind: str) -> Fault:
    """Kill an actor of the three separate stages. The run continues by itself."""

    def fault(trial: Trial) -> None:
        job = trial.start(*APART)
        trial.wait_for_middle(job)
        kill_one(job, ACTORS[kind], trial.rng)
        status = trial.end(job)
        assert status == 0, trial.printed[-1]

    return fault


def kill_chained_actor(trial: Trial) -> None:
    job = trial.start()
    trial.wait_for_middle(job)
    kill_one(job, "ChainedStages", trial.rng)
    status = trial.end(job)
    assert status == 0, trial.printed[-1]


def fail_device(trial: Trial) -> None:
    """The model's device fails in one of its workers (tests/faults/device_hooks). The run continues by itself."""
    counter = trial.output.with_name(f"{trial.output.name}.failures")
    counter.mkdir()
    hooks = {
        "DEVICE_FAILURES": "1",
        "DEVICE_COUNTER": str(counter),
        "PYTHONPATH": f"{DEVICE_HOOKS}:{os.environ.get('PYTHONPATH', '')}",
    }
    status = trial.end(trial.start(*APART, variables=hooks))
    assert len(list(counter.iterdir())) == 1
    assert status == 0, trial.printed[-1]


def kill_one(job: JobProcess, name: str, rng: random.Random) -> None:
    victims = job.members(name)
    assert victims, f"no process {name} found"
    os.kill(rng.choice(victims), signal.SIGKILL)


def kill_in_commits(*moments: str, victim: str) -> Fault:
    """Kill at moments of commits on local disk (tests/faults/hooks): worker after worker, or everything at once."""

    def fault(trial: Trial) -> None:
        commits = [trial.rng.randint(1, 4) + 4 * number for number in range(len(moments))]
        counter = trial.output.with_name(f"{trial.output.name}.commits")
        hooks = {
            "FAULT_PLAN": ",".join(f"{commit}:{moment}" for commit, moment in zip(commits, moments, strict=True)),
            "FAULT_VICTIM": victim,
            "FAULT_COUNTER": str(counter),
            "PYTHONPATH": f"{HOOKS}:{os.environ.get('PYTHONPATH', '')}",
        }
        job = trial.start(variables=hooks)
        status = trial.end(job)
        assert counter.stat().st_size >= commits[-1], "too few commits were counted"
        assert status == (0 if victim == "worker" else -signal.SIGKILL), trial.printed[-1]

    return fault


def on(cluster: RayNodes) -> tuple[str, ...]:
    return "--ray-address", cluster.address, "--model-actors", "1:2"


def kill_node(cluster: RayNodes) -> Fault:
    """Kill one of two worker nodes beside a head. The run continues on the other; the next trial gets a new node."""

    def fault(trial: Trial) -> None:
        job = trial.start(*on(cluster), variables=cluster.environment)
        trial.wait_for_middle(job)
        node = cluster.nodes.pop(trial.rng.randrange(len(cluster.nodes)))
        cluster.kill_node(node)
        status = trial.end(job)
        cluster.add_node()
        assert status == 0, trial.printed[-1]

    return fault


def stop_job(cluster: RayNodes) -> Fault:
    """`ray job submit`, `ray job stop` in the middle, and the same command under another name."""

    def fault(trial: Trial) -> None:
        name = f"{trial.output.parent.name}-{trial.output.name}".replace("_", "-")
        submit(trial, cluster, f"{name}-1", "--no-wait")
        wait_until(lambda: count_parts(trial.output) >= trial.rng.randint(1, 3), "the first parts")
        stopped = cluster.run_ray("job", "stop", f"{name}-1")
        assert stopped.returncode == 0, stopped.stderr
        logs = cluster.run_ray("job", "logs", f"{name}-1").stdout
        assert "run the same command again" in logs, logs
        done = submit(trial, cluster, f"{name}-2")
        assert "succeeded" in done, done

    return fault


def submit(trial: Trial, cluster: RayNodes, name: str, *options: str) -> str:
    """`ray job submit` of the job from a working directory; returns what it printed."""
    command = ["python", "-m", *transcription(trial.source, trial.output), *trial.options]
    upload = ["--working-dir", str(Path(__file__).resolve().parents[2])]
    done = cluster.run_ray("job", "submit", "--submission-id", name, *options, *upload, "--", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    trial.printed.append(done.stdout)
    return done.stdout


def start_two(trial: Trial) -> None:
    """Two drivers that cut the input differently, on one output at the same moment: one continues, one is refused."""
    jobs = [JobProcess(trial.source, trial.output, "--shard-audio-s", seconds) for seconds in ("50", "60")]
    statuses = [trial.end(job) for job in jobs]
    assert 0 in statuses, trial.printed
    for status, printed in zip(statuses, trial.printed[-2:], strict=True):
        assert status == 0 or (status == 2 and "at the same moment" in printed), printed
    trial.resume()


@dataclass(frozen=True)
class Account:
    """What a table lacks or holds twice, compared with an undisturbed run."""

    missing: int
    twice: int
    other: int  # rows whose text differs from the undisturbed ones

    @property
    def is_right(self) -> bool:
        return self == Account(0, 0, 0)


def account(output: Path, undisturbed: Path) -> Account:
    """Compare two tables row by row."""
    found, wanted = (
        ds.dataset(folder / "transcripts", format="parquet").to_table(columns=["id", "status", "text"]).to_pylist()
        for folder in (output, undisturbed)
    )
    counts = Counter(row["id"] for row in found)
    wanted_rows = {row["id"]: row for row in wanted}
    return Account(
        missing=len(wanted_rows.keys() - counts.keys()),
        twice=sum(count - 1 for count in counts.values()),
        other=sum(row != wanted_rows.get(row["id"]) for row in found),
    )


def parts_of(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((output / "transcripts").iterdir())}
