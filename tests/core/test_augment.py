"""Augmentation: what it masks, what it keeps, and that its random numbers come only from the caller."""

import numpy as np
import pytest
import torch

from parakeet_core.augment import SpecAugment, perturb_speed


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_masks_are_whole_bands_and_spans_within_their_widths():
    augment = SpecAugment(freq_masks=2, freq_width=20, time_masks=5, time_width=0.04)
    for seed in range(50):
        features = torch.ones(1200, 80)
        masked = augment(features, rng(seed))
        assert (features == 1).all()  # a new tensor
        bins = (masked == 0).all(0)
        frames = (masked == 0).all(1)
        assert int(bins.sum()) <= 40
        assert int(frames.sum()) <= 5 * 48
        expected = torch.ones(1200, 80)
        expected[:, bins] = 0
        expected[frames] = 0
        assert torch.equal(masked, expected)
        assert masked.any()


def test_the_same_generator_gives_the_same_masks():
    augment, features = SpecAugment(), torch.randn(700, 80)
    assert torch.equal(augment(features, rng(3)), augment(features, rng(3)))
    assert not torch.equal(augment(features, rng(3)), augment(features, rng(4)))


@pytest.mark.parametrize("frames", [0, 1, 19, 20, 99])
def test_short_utterances_keep_their_time(frames):
    masked = SpecAugment(freq_masks=0)(torch.ones(frames, 80), rng())
    assert masked.shape == (frames, 80)
    assert int((masked == 0).all(1).sum()) <= max(1, frames // 20)


def test_nothing_is_hidden_where_nothing_is_asked_for():
    features = torch.randn(300, 80)
    assert torch.equal(SpecAugment(freq_masks=0, time_masks=0)(features, rng()), features)


@pytest.mark.parametrize("factor", [0.9, 1.1, 1.5])
def test_speed_changes_length_and_pitch(factor):
    """A sine of 440 Hz becomes one of 440 Hz times the factor, with its length divided by the factor."""
    rate = 16_000
    waveform = np.sin(2 * np.pi * 440 * np.arange(2 * rate) / rate).astype(np.float32)
    faster = perturb_speed(waveform, factor, rate)
    assert faster.dtype == np.float32
    assert len(faster) == pytest.approx(2 * rate / factor, abs=1)
    spectrum = np.abs(np.fft.rfft(faster))
    assert spectrum.argmax() * rate / len(faster) == pytest.approx(440 * factor, abs=1)


def test_normal_speed_is_the_same_array():
    waveform = np.zeros(100, np.float32)
    assert perturb_speed(waveform, 1.0, 16_000) is waveform
