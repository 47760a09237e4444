"""The bundled model adapted to one domain in minutes: Asterisk's menu prompts ("press one to ...") with their digits.

    python tests/bench/bench_finetune.py [--debs FOLDER] [--output FOLDER]

Trains on menus and the ten spoken digits, about four minutes of one speaker, and measures other menus, none with the
same text as one of these. The recordings come from Debian's packages, see tests/data/prompts/make_prompts.py.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import soundfile
from harness import ROOT, TINY_CHECKPOINT, print_machine, print_table

sys.path.insert(0, str(ROOT / "tests" / "data" / "prompts"))
import make_prompts  # noqa: E402

MENU = re.compile(r"\b(press|dial)\b")
LAST_TRAINED = "vm-o"  # menus are split by name: vm-prev to vm-undelete are measured
LONGEST_S = 25.0
OPTIONS = {
    "max-steps": 120, "batch-audio-s": 60, "learning-rate": 5e-4, "warmup-steps": 20, "freq-width": 15, "time-masks": 5,
    "validate-steps": 20, "log-steps": 10, "cpus-per-worker": 1,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debs", type=Path, help="folder with the two .deb files (default: fetch them with apt-get)")
    parser.add_argument("--output", type=Path, help="where the run goes (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        train, validation = write_menus(options.debs, Path(scratch))
        output = options.output or Path(scratch, "run")
        command = [sys.executable, "-m", "jobs.finetune", "--train", str(train), "--validation", str(validation)]
        command += ["--model", str(TINY_CHECKPOINT), "--output", str(output), "--freeze-batch-norm"]
        command += [word for name, value in OPTIONS.items() for word in (f"--{name}", str(value))]
        started = time.monotonic()
        subprocess.run(command, cwd=ROOT, check=True)
        minutes = (time.monotonic() - started) / 60
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    print_machine()
    measured = [line for line in lines if "validation_wer" in line]
    rows = [(line["step"], f"{line['validation_wer']:.1%}", f"{line['validation_cer']:.1%}") for line in measured]
    print_table(f"Held-out menus, {minutes:.0f} minutes in all", ("step", "WER", "CER"), rows)


def write_menus(debs: Path | None, folder: Path) -> tuple[Path, Path]:
    """Manifests for training and for measuring, with their audio as FLAC."""
    if debs is None:
        subprocess.run(["apt-get", "download", *make_prompts.PACKAGES], cwd=folder, check=True)
    root = folder / "root"
    make_prompts.unpack(debs or folder, root)
    train, validation = [], []
    lines = (ROOT / "tests" / "data" / "prompts" / "prompts.jsonl").read_text().splitlines()
    carried = {json.loads(line)["text"] for line in lines}
    for name, prompt in sorted(make_prompts.read_transcripts(root / make_prompts.TRANSCRIPTS).items()):
        text = make_prompts.normalise(prompt)
        is_digit = re.fullmatch(r"digits/\d", name) is not None
        if not is_digit and not (MENU.search(text) and set(make_prompts.DIGITS) & set(text.split())):
            continue
        samples = make_prompts.decode_g722(root / make_prompts.SOUNDS / f"{name}.g722")
        if text in carried or len(samples) > LONGEST_S * make_prompts.SAMPLE_RATE_HZ:
            continue
        path = folder / f"{name.replace('/', '-')}.flac"
        soundfile.write(path, samples, make_prompts.SAMPLE_RATE_HZ)
        split = train if is_digit or name <= f"{LAST_TRAINED}~" else validation
        split.append({"audio_filepath": path.name, "text": text})
    for split, rows in (("train", train), ("validation", validation)):
        (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder / "train.jsonl", folder / "validation.jsonl"


if __name__ == "__main__":
    main()
