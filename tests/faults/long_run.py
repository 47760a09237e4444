"""Every kill several times, and one long run with many kills at random moments: the table of RESULTS.md.

    python tests/faults/long_run.py [--seed N] [--tries 5] [--kills 20] [--only NAME ...]

Prints a Markdown row per fault as soon as it is done, and exits with 1 if any item's row was missing or there twice.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO), str(REPO / "tests")]
os.environ["PYTHONPATH"] = str(REPO)

from job_process import JobProcess, write_manifest  # noqa: E402
from kills import (  # noqa: E402
    ACTORS,
    APART,
    Account,
    Fault,
    Trial,
    account,
    fail_device,
    kill_actor,
    kill_all,
    kill_chained_actor,
    kill_driver,
    kill_in_commits,
    kill_node,
    kill_one,
    on,
    parts_of,
    resumed,
    start_two,
    stop_job,
    submit,
    terminate_driver,
)
from ray_nodes import RayNodes  # noqa: E402

SHORT_REPEATS, LONG_REPEATS = 3, 80  # of 44 prompts: 10 minutes and 4.3 hours of audio
OPTIONS = ("--shard-audio-s", "30")
LONGEST_PAUSE_S = 6.0  # before a random kill
KILLS_AT_WORK = 0.8  # share of random kills that wait for a part first; the others hit the start, however slow it is


def local_faults() -> dict[str, tuple[Fault, str]]:
    """Name -> (fault, which undisturbed run it is timed against)."""
    faults = {
        "driver, kill -9": (resumed(kill_driver), "chained"),
        "driver and all of Ray, kill -9": (resumed(kill_all), "chained"),
        "driver, SIGTERM": (resumed(terminate_driver), "chained"),
        "actor of all stages, kill -9": (kill_chained_actor, "chained"),
        "GPU of a model actor fails": (fail_device, "apart"),
    }
    faults |= {f"{kind} actor, kill -9": (kill_actor(kind), "apart") for kind in ACTORS}
    for moment, words in {
        "half": "half of a part written",
        "before": "before the rename",
        "after": "after the rename",
    }.items():
        faults[f"worker in a commit, {words}"] = (kill_in_commits(moment, victim="worker"), "chained")
        faults[f"everything in a commit, {words}"] = (resumed(kill_in_commits(moment, victim="session")), "chained")
    return faults | {"two drivers at once, with two plans": (start_two, "chained")}


class LongRun:
    """Runs the faults and keeps their sums."""

    def __init__(self, folder: Path, seed: int, tries: int, only: list[str]):
        self.folder, self.seed, self.tries, self.only = folder, seed, tries, only
        self.source = folder / "short.jsonl"
        self.items = write_manifest(self.source, SHORT_REPEATS)
        self.baselines: dict[str, tuple[Path, float]] = {}
        self.failed = False

    def wanted(self, name: str) -> bool:
        return not self.only or any(part in name for part in self.only)

    def baseline(self, kind: str, run: Fault) -> None:
        """An undisturbed run, timed."""
        trial = self.trial(f"undisturbed-{kind}", 0)
        started = time.monotonic()
        run(trial)
        self.baselines[kind] = trial.output, time.monotonic() - started
        print(f"undisturbed, {kind}: {self.baselines[kind][1]:.0f} s, {self.items} items", flush=True)

    def trial(self, name: str, number: int) -> Trial:
        words = "-".join(name.replace(",", "").split())
        return Trial(
            self.source, self.folder / words / str(number), OPTIONS, random.Random(f"{self.seed} {name} {number}")
        )

    def fault(self, name: str, fault: Fault, kind: str) -> None:
        """Try one fault several times; prints its row."""
        undisturbed, undisturbed_s = self.baselines[kind]
        found, lost_s = [], []
        for number in range(self.tries):
            trial = self.trial(name, number)
            trial.output.parent.mkdir(parents=True, exist_ok=True)
            started = time.monotonic()
            fault(trial)
            lost_s.append(time.monotonic() - started - undisturbed_s)
            found.append(account(trial.output, undisturbed))
            if "plans" not in name and parts_of(trial.output) != parts_of(undisturbed):
                self.failed = True
                print(f"{name}, try {number}: parts are not byte-equal", flush=True)
        self.row(name, self.tries, found, lost_s)

    def row(self, name: str, times: int, found: list[Account], lost_s: list[float]) -> None:
        missing, twice, other = (sum(getattr(one, field) for one in found) for field in ("missing", "twice", "other"))
        self.failed |= not all(one.is_right for one in found)
        seconds = f"{sum(lost_s) / len(lost_s):.0f} ({min(lost_s):.0f} to {max(lost_s):.0f})"
        print(f"| {name} | {times} | {missing} | {twice} | {other} | {seconds} |", flush=True)

    def random_kills(self, kills: int) -> None:
        """One long run, in which the driver, all of Ray or an actor is killed at random moments."""
        self.source = self.folder / "long.jsonl"
        self.items = write_manifest(self.source, LONG_REPEATS)
        self.baseline("long", lambda trial: trial.resume(*APART))
        trial = self.trial("random", 0)
        done: list[str] = []
        started = time.monotonic()
        job = trial.start(*APART)
        while len(done) < kills:
            at, pause_s = job.parts(), trial.rng.uniform(0, LONGEST_PAUSE_S)
            at_work = trial.rng.random() < KILLS_AT_WORK
            while at_work and job.parts() == at and job.process.poll() is None:
                time.sleep(0.05)
            deadline = time.monotonic() + pause_s
            while time.monotonic() < deadline and job.process.poll() is None:
                time.sleep(0.05)
            if job.process.poll() is None:
                kind = trial.rng.choice(["driver", "all of Ray", *ACTORS])
                if (kind := strike(job, kind, trial.rng)) is not None:
                    done.append(kind)
                    print(f"kill {len(done)}: {kind}, after {pause_s:.1f} s, at {job.parts()} parts", flush=True)
            if job.process.poll() is not None or kind in ("driver", "all of Ray"):
                if trial.end(job) == 0:
                    break
                job = trial.start(*APART)
        status = trial.end(job) if job.process.poll() is None else job.process.returncode
        if status:
            trial.resume(*APART)
        undisturbed, undisturbed_s = self.baselines["long"]
        lost_s = time.monotonic() - started - undisturbed_s
        self.failed |= parts_of(trial.output) != parts_of(undisturbed)
        kinds = ", ".join(f"{done.count(kind)} {kind}" for kind in sorted(set(done)))
        name = f"one run, {len(done)} kills at random moments ({kinds})"
        self.row(name, 1, [account(trial.output, undisturbed)], [lost_s])


def strike(job: JobProcess, kind: str, rng: random.Random) -> str | None:
    """Kill one of the job's processes; None if there is none of that kind at the moment."""
    if kind == "driver":
        job.kill_driver()
    elif kind == "all of Ray":
        job.kill_all()
    elif not job.members(ACTORS[kind]):
        return None
    else:
        kill_one(job, ACTORS[kind], rng)
    return kind


@contextmanager
def cluster(dashboard: bool) -> Iterator[RayNodes]:
    """A head and two nodes."""
    with RayNodes(dashboard) as nodes:
        nodes.add_node()
        nodes.add_node()
        yield nodes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=20261122)
    parser.add_argument("--tries", type=int, default=5)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--only", nargs="*", default=[], help="parts of the names of faults")
    options = parser.parse_args()
    print(f"seed {options.seed}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
    with tempfile.TemporaryDirectory(prefix="parakeet-faults-") as folder:
        run = LongRun(Path(folder), options.seed, options.tries, options.only)
        print("| fault | times | rows missing | rows twice | other texts | seconds lost, mean (least to most) |")
        print("|---|---|---|---|---|---|", flush=True)
        faults = {name: fault for name, fault in local_faults().items() if run.wanted(name)}
        for kind in sorted({kind for _, kind in faults.values()}):
            stages = APART if kind == "apart" else ()
            run.baseline(kind, lambda trial, stages=stages: trial.resume(*stages))
        for name, (fault, kind) in faults.items():
            run.fault(name, fault, kind)
        if run.wanted("random"):
            run.random_kills(options.kills)
            run.source = run.folder / "short.jsonl"
        if run.wanted("node of three, kill -9"):
            with cluster(dashboard=False) as nodes:
                run.baseline("cluster", lambda trial: trial.resume(*on(nodes), variables=nodes.environment))
                run.fault("node of three, kill -9", kill_node(nodes), "cluster")
        if run.wanted("ray job stop"):
            with cluster(dashboard=True) as nodes:
                run.baseline("submitted", lambda trial: submit(trial, nodes, "undisturbed"))
                run.fault("ray job stop", stop_job(nodes), "submitted")
    return int(run.failed)


if __name__ == "__main__":
    sys.exit(main())
