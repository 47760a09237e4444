"""Train the small model for a given time on the data from the other scripts.

    python train.py --data FOLDER --output FOLDER (--minutes M | --steps N) [--alone] [--model FOLDER]
        [--times NAME=N ...] [--without MANIFEST] [-- OPTIONS OF THE JOB]

With --minutes, a trial run of `MEASURED_STEPS` measures the speed of this machine. From that follows the number of
steps of the actual run, whose learning rate reaches zero when the time is over. With --alone the job is
`jobs.finetune_alone`, which needs no Ray. The same command resumes from the last checkpoint. The model is written to
OUTPUT/model.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
MEASURED_STEPS = 30
USED = 0.93  # share of the time; the rest is for measurements, checkpoints and the end
TIMES = {"read": 3, "prompts": 4, "prompts-8khz": 4, "carried-prompts": 4, "synthetic": 1}  # per epoch, by manifest
OPTIONS = {
    "vocab-size": 256, "batch-audio-s": 160, "micro-batch-audio-s": 160, "learning-rate": 2e-3, "warmup-steps": 300,
    "precision": "bfloat16", "freq-width": 15, "time-masks": 4, "dropout": 0, "max-audio-s": 20,
    "export-dtype": "float16", "seed": 0, "log-steps": 20,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="with read.jsonl, prompts.jsonl, held-out.jsonl, ...")
    parser.add_argument("--output", type=Path, required=True)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float)
    length.add_argument("--steps", type=int)
    parser.add_argument("--alone", action="store_true", help="in one process, without Ray")
    parser.add_argument("--model", help="a folder to start from, instead of random weights (see model.json)")
    parser.add_argument("--times", nargs="+", default=[], metavar="NAME=N", help=f"beside or instead of {TIMES}")
    parser.add_argument("--without", type=Path, help="a manifest whose texts are left out of all inputs")
    parser.add_argument("options", nargs="*", help="options of the job, after --, which come before those of this file")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # which also ends the trial run
    output = arguments.output.resolve()  # the job runs in the repository root
    output.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "jobs.finetune_alone" if arguments.alone else "jobs.finetune"]
    times = TIMES | {name: int(number) for name, number in (word.split("=") for word in arguments.times)}
    inputs = training_inputs(arguments.data, times, arguments.without, output / "inputs")
    command += job_options(inputs, arguments.data, arguments.model, arguments.options)
    steps_file = output / "steps.json"
    if not steps_file.exists():
        steps = arguments.steps or steps_in(arguments.minutes, command, output)
        steps_file.write_text(json.dumps(steps))
    steps = json.loads(steps_file.read_text())
    command += ["--output", str(output), "--max-steps", str(steps)]
    if "--validate-steps" not in arguments.options:
        command += ["--validate-steps", str(max(1, steps // 8))]
    os.chdir(ROOT)
    os.execv(sys.executable, command)  # replaces this process, so that signals reach the job


def training_inputs(data: Path, times: dict[str, int], without: Path | None, folder: Path) -> list[Path]:
    """The manifests that exist, each repeated `times`; with `without`, copies in `folder` that lack its texts."""
    paths = [data / f"{name}.jsonl" for name, number in times.items() for _ in range(number)]
    inputs = [path for path in paths if path.exists()]
    if without is None:
        return inputs
    left_out = {json.loads(line)["text"] for line in without.read_text(encoding="utf-8").splitlines()}
    folder.mkdir(exist_ok=True)
    for path in set(inputs):
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if json.loads(line)["text"] not in left_out]
        (folder / path.name).write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    return [folder / path.name for path in inputs if (folder / path.name).stat().st_size]


def job_options(inputs: list[Path], data: Path, model: str | None, given: list[str]) -> list[str]:
    """The job's arguments: inputs, the model to start from, and options, of which those in `given` take precedence."""
    command = ["--train", *(str(path.resolve()) for path in inputs)]
    command += ["--validation", str((data / "held-out.jsonl").resolve())]
    options = dict(OPTIONS)
    if model is None:
        command += ["--model-config", str(Path(__file__).with_name("model.json"))]
    else:
        command += ["--model", str(Path(model).resolve())]
        del options["vocab-size"]
    named = {word.removeprefix("--") for word in given if word.startswith("--")}
    command += [word for name, value in options.items() if name not in named for word in (f"--{name}", str(value))]
    return command + given


def steps_in(minutes: float, command: list[str], output: Path) -> int:
    """Optimiser steps that this machine completes in the time.

    The audio that the trial run has prepared is kept for the actual run.
    """
    trial = output / "trial"
    limits = ["--output", str(trial), "--max-steps", str(MEASURED_STEPS), "--validate-steps", str(MEASURED_STEPS)]
    limits += ["--log-steps", str(MEASURED_STEPS // 3)]  # the first third is not timed, the other two are
    subprocess.run([*command, *limits], cwd=ROOT, check=True)
    lines = [json.loads(line) for line in (trial / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    step_s = (logged[-1]["at"] - logged[0]["at"]) / (logged[-1]["step"] - logged[0]["step"])
    steps = max(MEASURED_STEPS, round(USED * 60 * minutes / step_s))
    shutil.rmtree(output / "data", ignore_errors=True)
    (trial / "data").rename(output / "data")
    shutil.rmtree(trial)
    print(f"{step_s:.2f} s a step: {steps} steps in {minutes:g} minutes", file=sys.stderr, flush=True)
    return steps


if __name__ == "__main__":
    main()
