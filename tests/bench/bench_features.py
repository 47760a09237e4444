"""Log-mel features: this library's front end beside transformers' extractor, on the same clips in one run.

python tests/bench/bench_features.py [--quick] [--threads N]
"""

import logging

import harness
import numpy as np
import torch
from harness import print_table, race
from transformers import ParakeetFeatureExtractor

from parakeet_core.config import FrontendConfig
from parakeet_core.features import LogMelFrontend

CLIP_S = 10
BATCHES = (1, 16)


def main() -> None:
    options = harness.bench_arguments(__doc__.splitlines()[0]).parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    for threads in sorted({1, options.threads}):
        torch.set_num_threads(threads)
        harness.print_machine()
        rows = [_compare(batch, rounds=5 if options.quick else 20) for batch in BATCHES]
        columns = ["clips of 10 s", "transformers, x real time", "ours, x real time", "ratio", "largest difference"]
        print_table(f"Features, {threads} threads", columns, rows)


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


if __name__ == "__main__":
    main()
