"""Make the sample prompts again from Debian's Asterisk packages: audio files and their NeMo manifest.

Needs `dpkg-deb` (and `apt-get`, unless --debs names a folder with the packages), PyAV and soundfile. Knows nothing of
the model: the prompts were chosen by hand, as ATTRIBUTION.md describes.
"""

import argparse
import gzip
import json
import re
import subprocess
import tempfile
from pathlib import Path

import av
import numpy as np
import soundfile

PACKAGES = ("asterisk-core-sounds-en", "asterisk-core-sounds-en-g722")  # the transcripts; the 16 kHz recordings
SOUNDS = Path("usr/share/asterisk/sounds/en_US_f_Allison")
TRANSCRIPTS = Path("usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz")
SAMPLE_RATE_HZ = 16_000  # what G.722 decodes to
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FORMATS = {  # suffix -> soundfile's format and subtype
    "flac": ("FLAC", "PCM_16"),
    "wav": ("WAV", "PCM_16"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "opus": ("OGG", "OPUS"),
}
PROMPTS = {
    "flac": """
        agent-incorrect cannot-complete-as-dialed conf-noempty conf-onlyone conf-roll-callcomplete
        confbridge-lock-extended confbridge-pin-bad confbridge-remove-last-in demo-echodone demo-nogo demo-thanks
        dir-nomore entr-num-rmv-blklist followme/options followme/status one-moment-please pbx-invalidpark
        pls-hold-while-try priv-callpending privacy-prompt privacy-unident queue-youarenext simul-call-limit-reached
        something-terribly-wrong speed-dial-empty ss-noservice transfer tt-weasels vm-forward vm-newuser vm-nobox
        vm-nonumber vm-sorry vm-tempgreetactive""",
    "wav": "conf-invalid followme/sorry tt-monkeysintro vm-newpassword",
    "mp3": "confbridge-mute-extended dir-instr vm-invalid-password",
    "opus": "priv-introsaved tt-allbusy vm-saveoper",
}


def unpack(debs: Path, into: Path, packages: tuple[str, ...] = PACKAGES) -> None:
    """Unpack the packages found in `debs` below `into`, running none of their scripts."""
    for package in packages:
        found = sorted(debs.glob(f"{package}_*.deb"))
        if len(found) != 1:
            raise SystemExit(f"{debs}: {len(found)} files match {package}_*.deb, expected one")
        subprocess.run(["dpkg-deb", "-x", found[0], into], check=True)


def read_transcripts(path: Path) -> dict[str, str]:
    """Lines `name: spoken text`, and comments that start with `;` -> {name: spoken text}."""
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    pairs = (line.split(":", 1) for line in lines if ":" in line and not line.startswith(";"))
    return {name.strip(): prompt.strip() for name, prompt in pairs}


def normalise(prompt: str) -> str:
    """Lower case, digits as words, and nothing but letters, apostrophes and single spaces."""
    spelled = re.sub(r"\d", lambda digit: f" {DIGITS[int(digit[0])]} ", prompt.lower())
    return " ".join(re.sub(r"[^a-z']", " ", spelled).split())


def decode_g722(path: Path) -> np.ndarray:
    """Headerless G.722 at 64 kbit/s -> int16 [S] at 16 kHz."""
    with av.open(str(path), format="g722") as container:
        return np.concatenate([frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)])


def make_prompt(root: Path, name: str, prompt: str, suffix: str, output: Path) -> dict:
    """Write one prompt's audio file and return its manifest line."""
    path = output / f"{name.replace('/', '-')}.{suffix}"
    file_format, subtype = FORMATS[suffix]
    samples = decode_g722(root / SOUNDS / f"{name}.g722")
    soundfile.write(path, samples, SAMPLE_RATE_HZ, format=file_format, subtype=subtype)
    duration_s = round(soundfile.info(path).duration, 3)
    return {"audio_filepath": path.name, "duration": duration_s, "text": normalise(prompt), "prompt": prompt}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--debs", type=Path, help="folder with the two .deb files (default: fetch them with apt-get)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="where to write (default: here)")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        if args.debs is None:
            subprocess.run(["apt-get", "download", *PACKAGES], cwd=scratch, check=True)
        root = Path(scratch, "root")
        unpack(args.debs or Path(scratch), root)
        transcripts = read_transcripts(root / TRANSCRIPTS)
        rows = [
            make_prompt(root, name, transcripts[name], suffix, args.output)
            for suffix, names in PROMPTS.items()
            for name in names.split()
        ]
    rows.sort(key=lambda row: row["audio_filepath"])
    (args.output / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{len(rows)} prompts, {sum(row['duration'] for row in rows):.1f} s, in {args.output}")


if __name__ == "__main__":
    main()
