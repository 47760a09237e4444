"""What a job costs as it grows: hours of audio, CPU workers, planned items. Time should be linear, memory flat.

    python tests/bench/bench_scale.py [--quick] [--workers 1 2 4] [--hours 0.1 0.3 1 2.7 9 27] [--items 1000 … 1000000]

The audio is the LibriSpeech clips beside the checkout, listed as often as needed, each time under other ids; without
them, the bundled prompts. A straight line fitted to time over hours gives the cost of starting and of an hour; a point
off the line shows where growth is not linear. Planning is measured on synthetic listings, without audio.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import cycle
from pathlib import Path

import numpy as np
from bench_job import command_run, steady_s
from harness import ROOT, SPEECH, print_machine, print_table

HOURS, QUICK_HOURS = (0.1, 0.3, 1.0, 2.7, 9.0, 27.0), (0.1, 0.2, 0.3)
WORKERS, WORKERS_HOURS = (1, 2, 4), 1.0
ITEMS, QUICK_ITEMS = (1_000, 10_000, 100_000, 1_000_000), (1_000, 10_000, 100_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="minutes rather than an hour")
    parser.add_argument("--workers", type=int, nargs="+", help="CPU workers, of those that the machine has cores for")
    parser.add_argument("--hours", type=float, nargs="+")
    parser.add_argument("--items", type=int, nargs="+")
    options = parser.parse_args()
    hours = options.hours or (QUICK_HOURS if options.quick else HOURS)
    items = options.items or (QUICK_ITEMS if options.quick else ITEMS)
    workers = [count for count in options.workers or WORKERS if count <= os.cpu_count()]  # Ray has no CPUs for more
    print_machine()
    over_hours(hours)
    over_workers(workers, WORKERS_HOURS if not options.quick else QUICK_HOURS[0])
    over_items(items)


def over_hours(hours: tuple[float, ...]) -> None:
    """Time and memory of whole runs, with one worker per CPU."""
    runs = [(one, *run_hours(one)) for one in hours]
    rows = []
    for one, receipt, peaks in runs:
        work_s = sum(receipt["stage_seconds"].values())
        rows.append(
            (f"{one:g}", receipt["items_in"], receipt["shards"], receipt["command_s"], work_s / one,
             peaks["driver"], peaks.get("actors", 0), peaks["all together"])
        )  # fmt: skip
    columns = ("hours", "items", "shards", "command s", "work s per hour", "driver MiB", "actors MiB", "all MiB")
    print_table("Cost against hours", columns, rows)
    if len(runs) > 2:
        command_s = np.array([receipt["command_s"] for _, receipt, _ in runs])
        slope, start_s = np.polyfit(hours, command_s, 1)
        off = np.abs(command_s - (start_s + slope * np.array(hours))) / command_s
        print(
            f"\nLine: {start_s:.1f} s to start and {slope:.1f} s for each hour; points are up to {off.max():.0%} off."
        )


def over_workers(workers: list[int], hours: float) -> None:
    """The same hours with different numbers of CPU workers."""
    rows = []
    for count in workers:
        receipt, peaks = run_hours(hours, "--model-actors", f"{count}:{count}")
        rows.append((count, receipt["steady_s"], hours * 3600 / receipt["steady_s"], peaks["all together"]))
    table = [(*row, rows[0][1] / row[1]) for row in rows]
    print_table(
        f"{hours:g} h on CPU workers, once started", ("workers", "s", "RTFx", "all MiB", "speed / first row"), table
    )


def run_hours(hours: float, *options: str) -> tuple[dict, dict[str, int]]:
    """A run over that many hours: its receipt with seconds added, and peak memory by kind of process."""
    with tempfile.TemporaryDirectory() as folder:
        write_hours(Path(folder, "items.jsonl"), hours)
        receipt, peaks = command_run(Path(folder, "items.jsonl"), Path(folder, "out"), *options, memory=True)
        return receipt | {"steady_s": steady_s(Path(folder, "out"))}, peaks


def write_hours(path: Path, hours: float) -> None:
    """Write a manifest of clips that add up to that many hours."""
    manifest = SPEECH / "librispeech-dev-clean.jsonl"
    if not manifest.exists():
        manifest = ROOT / "tests/data/prompts/prompts.jsonl"
    records = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    left_s = hours * 3600
    with path.open("w", encoding="utf-8") as file:
        for number, record in enumerate(cycle(records)):
            if left_s <= 0:
                break
            name = record["audio_filepath"]
            record = record | {"id": f"{number}/{name}", "audio_filepath": str(manifest.parent / name)}
            file.write(json.dumps(record) + "\n")
            left_s -= record["duration"]


def over_items(items: tuple[int, ...]) -> None:
    """Planning alone: seconds and peak memory of a process that plans a synthetic listing."""
    rows = []
    for count in items:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(ROOT / "tests/jobs/plan_synthetic.py"), str(count), folder]
            finished = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        facts = json.loads(finished.stdout.splitlines()[-1])
        seconds = facts["list_s"] + facts["plan_s"] + facts["store_s"]
        rows.append(
            (f"{count:,}", facts["shards"], seconds, 1e6 * seconds / count, facts["peak_mib"], facts["base_mib"])
        )
    columns = ("items", "shards", "s", "us per item", "peak MiB", "of it before the plan")
    print_table("Planning", columns, rows)


if __name__ == "__main__":
    main()
