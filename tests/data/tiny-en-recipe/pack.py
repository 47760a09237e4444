"""Pack what the recipe needs on a machine with one GPU that lacks Ray, a network and some of the project's packages.

    python pack.py --data FOLDER --output BUNDLE [--python 3.12]

FOLDER contains the output of real_speech.py and texts.py. The bundle is some 45 MB: the recorded speech as Opus, the
sentences, and the Python packages that such a machine lacks (it has torch, numpy, pyarrow, safetensors, sentencepiece,
tokenizers, fsspec, aiohttp, onnxruntime, scipy, yaml, rich). `run_packed.sh` uses it.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import soundfile

MANIFESTS = ("read", "prompts", "prompts-8khz", "carried-prompts", "held-out")
OPUS_LEVEL = 0.97  # of libsndfile; gives some 15 kbit/s, enough for read speech at 16 kHz
PACKAGES = (
    "soundfile", "cffi", "pycparser", "soxr", "jiwer", "rapidfuzz", "tyro", "docstring-parser", "typeguard",
    "botocore", "jmespath", "hibari-tts==0.2.1",
)  # fmt: skip
GLIBC = (39, 35, 34, 31, 28, 27, 24, 17)  # minor versions that wheel names use and a machine of 2026 supports
NOT_NEEDED = ("botocore/data", "bin")  # botocore's descriptions of all AWS services take 30 MB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--python", default="3.12", help="of the machine with the GPU")
    options = parser.parse_args()
    (options.output / "speech").mkdir(parents=True, exist_ok=True)
    for name in MANIFESTS:
        pack_speech(options.data / f"{name}.jsonl", options.output / "speech")
    shutil.copy(options.data / "sentences.txt", options.output)
    with tempfile.TemporaryDirectory() as scratch:
        pack_packages(Path(scratch), options.python, options.output / "packages.tar.xz")
    size = sum(path.stat().st_size for path in options.output.rglob("*") if path.is_file())
    print(f"{size / 1e6:.1f} MB: {options.output}")


def pack_speech(manifest: Path, folder: Path) -> None:
    """The audio of a manifest as Opus, and the manifest with paths relative to it."""
    lines = []
    (folder / manifest.stem).mkdir(exist_ok=True)
    for number, text in enumerate(manifest.read_text(encoding="utf-8").splitlines()):
        line = json.loads(text)
        path = folder / manifest.stem / f"{number:05d}.opus"
        samples, rate_hz = soundfile.read(manifest.parent / line["audio_filepath"], dtype="float32")
        if rate_hz not in (8000, 12000, 16000, 24000, 48000):  # all rates that Opus supports
            samples, rate_hz = _resampled(samples, rate_hz)
        soundfile.write(path, samples, rate_hz, format="OGG", subtype="OPUS", compression_level=OPUS_LEVEL)
        lines.append(json.dumps(line | {"audio_filepath": f"{manifest.stem}/{path.name}"}))
    (folder / manifest.name).write_text("\n".join(lines), encoding="utf-8")


def _resampled(samples, rate_hz: int):
    import soxr

    return soxr.resample(samples, rate_hz, 16_000), 16_000


def pack_packages(scratch: Path, python: str, archive: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", str(scratch)]
    command += ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", "--platform", "any"]
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in GLIBC] + ["manylinux2014_x86_64", "manylinux1_x86_64"]
    command += [word for platform in platforms for word in ("--platform", platform)]
    subprocess.run([*command, *PACKAGES], check=True)
    for name in NOT_NEEDED:
        shutil.rmtree(scratch / name, ignore_errors=True)
    with tarfile.open(archive, "w:xz") as tar:
        tar.add(scratch, ".")


if __name__ == "__main__":
    main()
