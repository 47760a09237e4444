"""Whole transcription of real clips with the small trained model: `Transcriber` beside transformers in one run.

    python tests/bench/bench_transcribe.py [--quick] [--threads N] [--dtype float32 bfloat16]

transformers means extractor, `generate` with the attention mask and `batch_decode`, at several batch sizes, in the
order given and sorted by length. Both sides get decoded waveforms; decoding of the files is timed separately.
"""

import json
import logging
from pathlib import Path

import harness
import numpy as np
import torch
from harness import print_table, race
from transformers import ParakeetForCTC, ParakeetProcessor

from parakeet_core import Transcriber, decode_audio

BATCH_SIZES = (1, 2, 4, 8, 16, 32)


def main() -> None:
    parser = harness.bench_arguments(__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    harness.print_machine()
    paths = _clips(options.clips)
    decode_s = race({"decode": lambda: [decode_audio(path) for path in paths]}, 1)["decode"]
    waveforms = [decode_audio(path) for path in paths]
    audio_s = sum(map(len, waveforms)) / 16000
    print(f"{len(paths)} clips, {audio_s:.0f} s of audio; decoding the files: {audio_s / decode_s:,.0f} x real time")
    for dtype in options.dtype:
        _compare(waveforms, audio_s, dtype, options)


def _clips(count: int) -> list[Path]:
    """`count` clips at even steps from the LibriSpeech manifest, else from the bundled prompts."""
    manifest = harness.SPEECH / "librispeech-dev-clean.jsonl"
    if not manifest.exists():
        manifest = harness.ROOT / "tests" / "data" / "prompts" / "prompts.jsonl"
    names = [json.loads(line)["audio_filepath"] for line in manifest.read_text().splitlines()]
    count = min(count, len(names))
    return [manifest.parent / names[i * len(names) // count] for i in range(count)]


def _compare(waveforms: list[np.ndarray], audio_s: float, dtype: str, options) -> None:
    model = ParakeetForCTC.from_pretrained(harness.TINY_CHECKPOINT, dtype=getattr(torch, dtype)).eval()
    processor = ParakeetProcessor.from_pretrained(harness.TINY_CHECKPOINT)
    transcriber = Transcriber.load(harness.TINY_CHECKPOINT, dtype=dtype)

    def reference_run(size: int, ordered: list[int]):
        def run() -> list[str]:
            texts = [""] * len(waveforms)
            for start in range(0, len(ordered), size):
                members = ordered[start : start + size]
                batch = processor.feature_extractor(
                    [waveforms[i] for i in members], sampling_rate=16000, return_tensors="pt"
                )
                ids = model.generate(batch["input_features"].to(model.dtype), attention_mask=batch["attention_mask"])
                for i, text in zip(members, processor.batch_decode(ids, skip_special_tokens=True), strict=True):
                    texts[i] = text
            return texts

        return run

    given = list(range(len(waveforms)))
    by_length = sorted(given, key=lambda i: len(waveforms[i]))
    sizes = BATCH_SIZES[::2] if options.quick else BATCH_SIZES
    contenders = {f"transformers, as given, {size}": reference_run(size, given) for size in sizes}
    contenders |= {f"transformers, sorted, {size}": reference_run(size, by_length) for size in sizes}
    contenders["ours"] = lambda: transcriber.transcribe(waveforms)
    best = race(contenders, rounds=4 if options.quick else 8)
    rates = {name: audio_s / seconds for name, seconds in best.items()}
    rows = [[name, rate, rates["ours"] / rate] for name, rate in rates.items()]
    print_table(f"Transcription, {dtype}", ["order and batch size", "x real time", "ours is faster by"], rows)
    for order in ("as given", "sorted"):
        fastest = max((rate, name) for name, rate in rates.items() if order in name)
        print(f"against transformers at its best, {order}: {rates['ours'] / fastest[0]:.2f}x ({fastest[1]})")
    expected = reference_run(1, given)()
    texts = [transcript.text for transcript in transcriber.transcribe(waveforms)]
    same = sum(found == text for found, text in zip(texts, expected, strict=True))
    print(f"texts equal to transformers' one by one: {same} of {len(texts)}")


if __name__ == "__main__":
    main()
