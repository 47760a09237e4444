"""The whole job against a plain loop and against transformers, over real speech, in one run.

    python tests/bench/bench_job.py [--quick] [--repeat N] [--shard-audio-s SECONDS] [--dtype float32 bfloat16 int8]
        [--tries 2]

Prints, for the same clips and the same small model: the job with and without Ray's start-up, in each dtype; our own
`Transcriber` in one process, and a script with transformers' extractor and `generate` at its best batch size, in
float32; then where the job's time goes and how much memory driver, actors and object store took at their peak.
`--repeat` lists every clip that many times, to show that memory does not grow with hours. Each time is the best of
`--tries`: the cores of a rented machine are not equally fast at every moment.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from harness import ROOT, SPEECH, TINY_CHECKPOINT, print_machine, print_table

SAMPLE_EVERY_S = 0.2  # of memory; sampling costs the job up to a tenth of its speed: times come from runs without it
DTYPES = ("float32", "bfloat16", "int8")
REFERENCE_BATCHES = (1, 4, 16)  # sizes tried; the best one is reported


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the clips")
    parser.add_argument("--repeat", type=int, default=1, help="times that each clip is listed")
    parser.add_argument("--only-job", action="store_true", help="no comparison, e.g. for memory with --repeat 10")
    parser.add_argument("--shard-audio-s", type=float, help="as the job's: memory is compared at one size of shards")
    parser.add_argument(
        "--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16", "int8"], help="of the job"
    )
    parser.add_argument("--tries", type=int, default=2, help="runs of each, of which the fastest counts")
    options = parser.parse_args()
    lines = (SPEECH / "librispeech-dev-clean.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines][:: 10 if options.quick else 1]
    for record in records:
        record["audio_filepath"] = str(SPEECH / record["audio_filepath"])
    audio_s = sum(record["duration"] for record in records)
    print_machine()
    rows = []
    if not options.only_job:
        paths = [record["audio_filepath"] for record in records]
        rows = [
            ("plain loop of Transcriber", min(plain_loop_s(paths) for _ in range(options.tries))),
            transformers_row(paths, options.tries),
        ]
    jobs = {}
    for dtype in options.dtype:
        manifest = (records, options.repeat, options.shard_audio_s, dtype)
        runs = [job_run(*manifest, memory=False)[0] for _ in range(options.tries)]
        _, peaks = job_run(*manifest, memory=True)
        jobs[dtype] = min(runs, key=lambda receipt: receipt["steady_s"]), peaks
    audio_s *= options.repeat
    for dtype, (job, _) in jobs.items():
        rows += [(f"job in {dtype}, without start-up", job["steady_s"]), (f"job in {dtype}, whole", job["command_s"])]
    loop_s = rows[0][1]
    table = [(name, seconds, audio_s / seconds, loop_s / seconds) for name, seconds in rows]
    hours = audio_s / 3600
    print_table(f"{len(records) * options.repeat} clips, {hours:.2f} h", ("", "s", "RTFx", "speed / first row"), table)
    for dtype, (job, memory) in jobs.items():
        stages = list(job["stage_seconds"].items())
        print_table(f"Stages of the job in {dtype}, summed over actors", ("stage", "s"), stages)
        print_table(f"Peak memory in {dtype}, MiB (proportional set size)", ("process", "MiB"), list(memory.items()))


def plain_loop_s(paths: list[str]) -> float:
    """Our own API in one process, all cores; loading is not counted."""
    from parakeet_core import Transcriber

    transcriber = Transcriber.load(TINY_CHECKPOINT)
    transcriber.transcribe(paths[:20])
    start = time.perf_counter()
    transcriber.transcribe(paths)
    return time.perf_counter() - start


def transformers_row(paths: list[str], tries: int) -> tuple[str, float]:
    """The reference at its best batch size: decoding by soundfile, sorted by length, extractor, generate, decode."""
    import soundfile
    from transformers import ParakeetForCTC, ParakeetProcessor

    processor = ParakeetProcessor.from_pretrained(TINY_CHECKPOINT)
    model = ParakeetForCTC.from_pretrained(TINY_CHECKPOINT, dtype=torch.float32).eval()

    def run(some: list[str], size: int) -> float:
        start = time.perf_counter()
        waveforms = sorted((soundfile.read(path, dtype="float32")[0] for path in some), key=len)
        for first in range(0, len(waveforms), size):
            inputs = processor(waveforms[first : first + size], sampling_rate=16000, return_tensors="pt")
            processor.batch_decode(model.generate(**inputs), skip_special_tokens=True)
        return time.perf_counter() - start

    trial = paths[:: max(1, len(paths) // 60)]
    best = min(REFERENCE_BATCHES, key=lambda size: run(trial, size))
    return f"transformers, batch {best}", min(run(paths, best) for _ in range(tries))


def job_run(
    records: list[dict], repeat: int, shard_audio_s: float | None, dtype: str, memory: bool
) -> tuple[dict, dict[str, int]]:
    """The job as a separate command; its receipt with seconds added, and peak memory by kind of process if asked."""
    with tempfile.TemporaryDirectory() as folder:
        manifest, output = Path(folder, "items.jsonl"), Path(folder, "out")
        with open(manifest, "w", encoding="utf-8") as file:
            for number in range(repeat):
                for record in records:
                    identity = f"{number}/{Path(record['audio_filepath']).stem}"
                    file.write(json.dumps(record | {"id": identity}) + "\n")
        shards = () if shard_audio_s is None else ("--shard-audio-s", str(shard_audio_s))
        receipt, peaks = command_run(manifest, output, "--dtype", dtype, *shards, memory=memory)
        return receipt | {"steady_s": steady_s(output)}, peaks


def command_run(manifest: Path, output: Path, *options: str, memory: bool) -> tuple[dict, dict[str, int]]:
    """The command over a manifest; its receipt with the seconds of the whole command, and peak memory by process."""
    command = [sys.executable, "-m", "jobs.transcribe", "--input", str(manifest), "--output", str(output)]
    start = time.perf_counter()
    process = subprocess.Popen([*command, "--model", str(TINY_CHECKPOINT), *options], cwd=ROOT, start_new_session=True)
    peaks: dict[str, int] = {}
    if memory:
        watch_memory(process, peaks)
    status = process.wait()
    if status:
        raise SystemExit(f"the job ended with {status}")
    command_s = time.perf_counter() - start
    return json.loads((output / "receipt.json").read_text()) | {"command_s": command_s}, peaks


def steady_s(output: Path) -> float:
    """Seconds the job would take at the rate between its first and its last committed shard."""
    events = [
        json.loads(line) for file in sorted((output / "events").iterdir()) for line in file.read_text().splitlines()
    ]
    shards = [event for event in events if event["event"] == "shard"]
    at = [time_of(event["at"]) for event in shards]
    audio = [json.loads(event["facts"])["audio_s"] for event in shards]
    return (at[-1] - at[0]) * sum(audio) / sum(audio[1:])


def time_of(stamp: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(stamp).timestamp()


def watch_memory(process: subprocess.Popen, peaks: dict[str, int]) -> None:
    """Sample the proportional set size of the job's processes until it ends; MiB by kind."""
    while process.poll() is None:
        sums: dict[str, int] = {}
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and os.getsid(int(entry.name)) == process.pid:
                    kind = kind_of((entry / "cmdline").read_bytes(), int(entry.name) == process.pid)
                    size = next(
                        line for line in (entry / "smaps_rollup").read_text().splitlines() if line.startswith("Pss:")
                    )
                    sums[kind] = sums.get(kind, 0) + int(size.split()[1]) // 1024
            except (ProcessLookupError, FileNotFoundError, PermissionError, StopIteration):
                continue
        for kind, size in [*sums.items(), ("all together", sum(sums.values()))]:
            peaks[kind] = max(peaks.get(kind, 0), size)
        time.sleep(SAMPLE_EVERY_S)


def kind_of(command: bytes, driver: bool) -> str:
    if driver:
        return "driver"
    if b"ray::" in command and b"IDLE" not in command:
        return "actors"
    return "raylet and object store" if b"raylet" in command else "other processes of Ray"


if __name__ == "__main__":
    main()
