"""Log-mel features: this library's front end beside transformers' extractor, on the same clips in one run.

python tests/bench/bench_features.py [--quick] [--threads N]

Then the whole chain of a feature actor on one core, from encoded audio to float16 features, with its parts.
"""

import io
import json
import logging

import harness
import numpy as np
import soundfile
import soxr
import torch
from harness import print_table, race
from transformers import ParakeetFeatureExtractor

from parakeet_core.audio import load_audio
from parakeet_core.config import FrontendConfig
from parakeet_core.features import LogMelFrontend

CLIP_S = 10
BATCHES = (1, 16)
ENCODINGS = (
    ("FLAC", 16000, None),
    ("FLAC", 48000, None),
    ("WAV", 16000, None),
    ("MP3", 16000, None),
    ("OGG", 16000, "OPUS"),
)
CHAIN_CLIPS = 20


def main() -> None:
    options = harness.bench_arguments(__doc__.splitlines()[0]).parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    for threads in sorted({1, options.threads}):
        torch.set_num_threads(threads)
        harness.print_machine()
        rows = [_compare(batch, rounds=5 if options.quick else 20) for batch in BATCHES]
        columns = ["clips of 10 s", "transformers, x real time", "ours, x real time", "ratio", "largest difference"]
        print_table(f"Features, {threads} threads", columns, rows)
    torch.set_num_threads(1)
    rounds = 3 if options.quick else 10
    rows = [_chain(kind, rate_hz, subtype, rounds) for kind, rate_hz, subtype in ENCODINGS]
    columns = ["audio", "decoding, x real time", "features, x real time", "whole chain, x real time"]
    print_table("Encoded audio to float16 features, one core, clips of real speech", columns, rows)


def _compare(batch: int, rounds: int) -> list[object]:
    config = FrontendConfig()
    noise = np.random.default_rng(0).standard_normal((batch, CLIP_S * config.sample_rate_hz), dtype=np.float32)
    clips = list(noise * 0.1)
    reference, ours = ParakeetFeatureExtractor(), LogMelFrontend(config)

    def run_reference():
        return reference(clips, sampling_rate=config.sample_rate_hz, return_tensors="pt")["input_features"]

    expected, (found, lens) = run_reference(), ours(clips)
    difference = (expected[:, : int(lens.max())] - found).abs().max().item()
    best = race({"reference": run_reference, "ours": lambda: ours(clips)}, rounds)
    rates = [batch * CLIP_S / seconds for seconds in best.values()]
    return [batch, *rates, rates[1] / rates[0], f"{difference:.1e}"]


def _chain(kind: str, rate_hz: int, subtype: str | None, rounds: int) -> list[object]:
    """The row of rates for one encoding."""
    config = FrontendConfig()
    clips = [_encode(waveform, kind, rate_hz, subtype) for waveform in _speech(config.sample_rate_hz)]
    frontend = LogMelFrontend(config)

    def decode() -> list[np.ndarray]:
        return [load_audio(clip, config.sample_rate_hz).waveform for clip in clips]

    def extract(waveforms: list[np.ndarray]) -> list[bytes]:
        return [frontend([waveform])[0][0].numpy().astype(np.float16).tobytes() for waveform in waveforms]

    waveforms = decode()
    audio_s = sum(map(len, waveforms)) / config.sample_rate_hz
    parts = {"decode": decode, "features": lambda: extract(waveforms), "chain": lambda: extract(decode())}
    return [f"{kind} {subtype or ''} {rate_hz / 1000:g} kHz", *(audio_s / s for s in race(parts, rounds).values())]


def _speech(rate_hz: int) -> list[np.ndarray]:
    """Real clips, decoded: at even steps from the LibriSpeech manifest, else from the bundled prompts."""
    manifest = harness.SPEECH / "librispeech-dev-clean.jsonl"
    if not manifest.exists():
        manifest = harness.ROOT / "tests" / "data" / "prompts" / "prompts.jsonl"
    names = [json.loads(line)["audio_filepath"] for line in manifest.read_text(encoding="utf-8").splitlines()]
    chosen = names[:: max(1, len(names) // CHAIN_CLIPS)]
    return [load_audio(manifest.parent / name, rate_hz).waveform for name in chosen]


def _encode(waveform: np.ndarray, kind: str, rate_hz: int, subtype: str | None) -> bytes:
    file = io.BytesIO()
    rate = FrontendConfig().sample_rate_hz
    samples = waveform if rate_hz == rate else soxr.resample(waveform, rate, rate_hz)
    soundfile.write(file, samples, rate_hz, format=kind, subtype=subtype)
    return file.getvalue()


if __name__ == "__main__":
    main()
