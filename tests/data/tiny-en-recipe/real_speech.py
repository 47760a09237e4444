"""Write manifests of the recipe's recorded speech, for training and held out, in NeMo's form.

    python real_speech.py --speech FOLDER --output FOLDER [--debs FOLDER]

The folder of --speech contains `librispeech-dev-clean.jsonl` and `ljspeech.jsonl` with their audio; the phone prompts
come from Debian's packages, see ../prompts/make_prompts.py.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile

PROMPTS_FOLDER = Path(__file__).resolve().parents[1] / "prompts"
sys.path.insert(0, str(PROMPTS_FOLDER))
import make_prompts  # noqa: E402

HELD_OUT_SPEAKERS = ("1988", "2035", "2428", "777")  # of LibriSpeech dev-clean: two women, two men, 8 minutes each
NARROW_PACKAGE = "asterisk-core-sounds-en-wav"  # the same prompts at 8 kHz
MENU = re.compile(r"\b(press|dial)\b")  # phone menus, which `train.py --without` leaves out: a domain to adapt to later
PROMPT_S = (0.5, 20.0)  # shorter ones are single letters and beeps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speech", type=Path, required=True, help="folder of the two manifests and their audio")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--debs", type=Path, help="folder with the .deb files (default: fetch them with apt-get)")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    read, held_out = split_read_speech(options.speech)
    write_manifest(options.output / "read.jsonl", read)
    write_manifest(options.output / "held-out.jsonl", held_out)
    wide, narrow = write_prompts(options.debs, options.output / "prompts")
    write_manifest(options.output / "prompts.jsonl", wide)
    write_manifest(options.output / "prompts-8khz.jsonl", narrow)
    write_manifest(options.output / "menus.jsonl", [line for line in wide if MENU.search(line["text"])])
    write_manifest(options.output / "carried-prompts.jsonl", carried_prompts())


def split_read_speech(folder: Path) -> tuple[list[dict], list[dict]]:
    """(lines to train on, lines of the held-out speakers), with absolute paths."""
    lines = [line for name in ("librispeech-dev-clean", "ljspeech") for line in read_manifest(folder / f"{name}.jsonl")]
    held_out = [line for line in lines if line["speaker"] in HELD_OUT_SPEAKERS]
    return [line for line in lines if line["speaker"] not in HELD_OUT_SPEAKERS], held_out


def carried_prompts() -> list[dict]:
    """The prompts in this repository; the other prompts leave out recordings with the same texts."""
    return read_manifest(PROMPTS_FOLDER / "prompts.jsonl")


def write_prompts(debs: Path | None, folder: Path) -> tuple[list[dict], list[dict]]:
    """Write the prompts to train on, as FLAC and WAV; returns the lines of their 16 kHz and their 8 kHz recordings."""
    carried = {line["text"] for line in carried_prompts()}
    wide, narrow = [], []
    with tempfile.TemporaryDirectory() as scratch:
        packages = (*make_prompts.PACKAGES, NARROW_PACKAGE)
        if debs is None:
            subprocess.run(["apt-get", "download", *packages], cwd=scratch, check=True)
        root = Path(scratch, "root")
        make_prompts.unpack(debs or Path(scratch), root, packages)
        folder.mkdir(exist_ok=True)
        for name, prompt in sorted(make_prompts.read_transcripts(root / make_prompts.TRANSCRIPTS).items()):
            text = make_prompts.normalise(prompt)
            source = root / make_prompts.SOUNDS / f"{name}.g722"
            if not text or text in carried or not source.exists():
                continue
            path = folder / f"{name.replace('/', '-')}.flac"
            wide += _prompt(path, make_prompts.decode_g722(source), make_prompts.SAMPLE_RATE_HZ, text)
            narrow += _prompt(path.with_suffix(".wav"), *soundfile.read(source.with_suffix(".wav")), text)
    return wide, narrow


def _prompt(path: Path, samples: np.ndarray, rate_hz: int, text: str) -> list[dict]:
    """Write a recording and return its manifest line; if its length is outside `PROMPT_S`, do neither."""
    duration_s = len(samples) / rate_hz
    if not PROMPT_S[0] <= duration_s <= PROMPT_S[1]:
        return []
    soundfile.write(path, samples, rate_hz)
    return [{"audio_filepath": str(path.resolve()), "duration": duration_s, "text": text}]


def read_manifest(path: Path) -> list[dict]:
    """The lines of a manifest, with absolute paths."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line | {"audio_filepath": str(path.parent.resolve() / line["audio_filepath"])} for line in lines]


def write_manifest(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    print(f"{len(lines)} items, {sum(line['duration'] for line in lines) / 3600:.2f} h: {path}")


if __name__ == "__main__":
    main()
