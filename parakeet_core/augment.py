"""Augmentation for training: speed perturbation of waveforms and SpecAugment of features.

All random numbers come from the caller's generator, so that an utterance is changed the same way whoever prepares it.
Shapes: `S` samples, `T` feature frames, `M` mel bins.
"""

from dataclasses import dataclass

import numpy as np
import soxr
from torch import Tensor


@dataclass(frozen=True)
class SpecAugment:
    """How much of an utterance is masked; widths are drawn uniformly from 0 to the maximum given here.

    Defaults as in NeMo's FastConformer recipes. Source: SpecAugment (arXiv:1904.08779), without time warping; time
    masks that grow with the utterance (arXiv:1912.05533).

    Args:
        freq_masks: number of bands of mel bins.
        freq_width: maximum mel bins in one band.
        time_masks: number of spans of frames in an utterance of `TIME_MASKS_FRAMES` or more; fewer in shorter ones.
        time_width: maximum share of the utterance's frames in one span.
    """

    freq_masks: int = 2
    freq_width: int = 27
    time_masks: int = 10
    time_width: float = 0.05

    def __call__(self, features: Tensor, rng: np.random.Generator) -> Tensor:
        """Features [T, M] with bands and spans set to 0, each bin's mean after normalisation. Returns a new tensor."""
        frames, mels = features.shape
        features = features.clone()
        for start, end in _spans(rng, self.freq_masks, mels, min(self.freq_width, mels)):
            features[:, start:end] = 0
        masks = round(self.time_masks * min(1.0, frames / TIME_MASKS_FRAMES))
        for start, end in _spans(rng, masks, frames, int(self.time_width * frames)):
            features[start:end] = 0
        return features


TIME_MASKS_FRAMES = 1000  # 10 s: ten spans in a one-word clip would mask whole words


def _spans(rng: np.random.Generator, count: int, length: int, width: int) -> list[tuple[int, int]]:
    spans = []
    for _ in range(count):
        size = int(rng.integers(0, width, endpoint=True))
        start = int(rng.integers(0, length - size, endpoint=True))
        spans.append((start, start + size))
    return spans


def perturb_speed(waveform: np.ndarray, factor: float, sample_rate_hz: int) -> np.ndarray:
    """Play a waveform [S] `factor` times as fast, pitch included: [S / factor] float32.

    Source: Ko et al., Audio augmentation for speech recognition (Interspeech 2015).
    """
    if factor == 1:
        return waveform
    return soxr.resample(waveform, round(sample_rate_hz * factor), sample_rate_hz)
