"""Features equal the reference's: lengths and masks exactly, values within the stated tolerance.

On the machines seen so far, a single clip is bit-identical; the tolerance allows for another BLAS.
"""

import numpy as np
import pytest
import torch
from features_float64 import features_float64
from reference import RATE_HZ, extract
from transformers import ParakeetFeatureExtractor

from parakeet_core.audio import decode_audio
from parakeet_core.config import FrontendConfig
from parakeet_core.features import LogMelFrontend, mel_filter_bank

HOP = 160
LARGEST = 1e-4  # difference of any value
MEAN = 2e-6  # difference over a clip


def noise(samples: int, seed: int = 0) -> np.ndarray:
    rng = np.random.Generator(np.random.PCG64(seed))
    return (0.1 * rng.standard_normal(samples)).astype(np.float32)


def pair(mels: int) -> tuple[LogMelFrontend, ParakeetFeatureExtractor]:
    return (
        LogMelFrontend(FrontendConfig(n_mels=mels)),
        ParakeetFeatureExtractor(feature_size=mels, sampling_rate=RATE_HZ),
    )


def assert_equal(ours, lens, theirs, mask):
    assert lens.tolist() == mask.sum(-1).tolist()
    for row, length, reference in zip(ours, lens.tolist(), theirs, strict=True):
        assert not row[length:].any()
        difference = (row[:length] - reference[:length]).abs()
        assert float(difference.max()) <= LARGEST
        assert float(difference.mean()) <= MEAN


@pytest.mark.parametrize("mels", [64, 80, 128])
def test_mel_bank(mels):
    _, theirs = pair(mels)
    np.testing.assert_allclose(mel_filter_bank(FrontendConfig(n_mels=mels)).T, theirs.mel_filters, rtol=0, atol=2e-8)


@pytest.mark.parametrize("mels", [80, 128])
@pytest.mark.parametrize("offset", [-1, 0, 1])
@pytest.mark.parametrize("frames", [4, 7, 8, 9, 16, 17, 100, 513, 1025])
def test_lengths_around_every_hop(frames, offset, mels):
    ours, theirs = pair(mels)
    waveform = noise(frames * HOP + offset, seed=frames)
    features, lens = ours([waveform])
    assert features.shape[1] == len(waveform) // HOP  # trimmed: the reference's tensor has one more, masked frame
    assert_equal(features, lens, *extract(theirs, [waveform]))


@pytest.mark.parametrize("samples", [2 * HOP, 2 * HOP + 1, 3 * HOP - 1])
def test_two_frames(samples):
    """With two frames every value is +-1/sqrt(2), unless the two are nearly equal: then rounding is amplified."""
    ours, theirs = pair(80)
    features, lens = ours([noise(samples, seed=5)])
    assert_equal(features, lens, *extract(theirs, [noise(samples, seed=5)]))


def test_one_frame_is_zeros_where_the_reference_has_nan():
    ours, theirs = pair(80)
    for samples in (HOP, 2 * HOP - 1):
        features, lens = ours([noise(samples)])
        assert lens.tolist() == [1]
        assert not features.any()
        reference, _ = extract(theirs, [noise(samples)])
        assert reference.isnan().any()


@pytest.mark.parametrize("samples", [0, 1, HOP - 1])
def test_no_frame(samples):
    ours, _ = pair(80)
    features, lens = ours([noise(samples)])
    assert (features.shape, lens.tolist()) == ((1, 0, 80), [0])


@pytest.mark.parametrize("mels", [80, 128])
def test_padded_batch(mels):
    ours, theirs = pair(mels)
    waveforms = [noise(samples, seed=samples) for samples in (48_000, 1440, 320, 20_011, 16_000, 161_234)]
    features, lens = ours(waveforms)
    assert_equal(features, lens, *extract(theirs, waveforms))


def stationary(kind: str) -> np.ndarray:
    """Two seconds with mel bins that are empty, or nearly the same in every frame."""
    seconds = np.arange(2 * RATE_HZ) / RATE_HZ
    return {
        "tone": 0.3 * np.sin(2 * np.pi * 440 * seconds),
        "chirp": 0.4 * np.sin(2 * np.pi * (100 * seconds + 900 * seconds**2)),
        "clipped": np.clip(0.9 + 5 * noise(len(seconds)), -1, 1),
        "dc": 0.5 + 0.01 * noise(len(seconds)),
        "under_the_guard": 1e-4 * noise(len(seconds)),
    }[kind].astype(np.float32)


@pytest.mark.parametrize("kind", ["tone", "chirp", "clipped", "dc", "under_the_guard"])
def test_as_near_to_float64_as_the_reference(kind):
    """Normalisation amplifies the rounding of such bins to the size of a signal: both are off, each in its own way."""
    ours, theirs = pair(80)
    waveform = stationary(kind)
    exact = torch.from_numpy(features_float64(waveform))
    features, lens = ours([waveform])
    reference, _ = extract(theirs, [waveform])
    our_error, their_error = (features[0] - exact).abs(), (reference[0, : lens[0]] - exact).abs()
    assert float(our_error.mean()) <= 1.1 * float(their_error.mean())
    assert float(our_error.max()) <= 1.1 * float(their_error.max())


def test_digital_silence_is_finite_and_near_zero():
    """Every frame is log(2^-24): less the mean only rounding is left, which in the reference comes to up to 0.16."""
    ours, _ = pair(80)
    features, lens = ours([np.zeros(RATE_HZ, np.float32)])
    assert lens.tolist() == [100]
    assert float(features.abs().max()) <= 0.2


@pytest.mark.parametrize("options", [{"n_fft": 1024, "win_length": 1024, "hop_length": 256}, {"preemphasis": 0.5}])
def test_other_constants(options):
    ours = LogMelFrontend(FrontendConfig(**options))
    theirs = ParakeetFeatureExtractor(feature_size=80, sampling_rate=RATE_HZ, **options)
    features, lens = ours([noise(40_007)])
    assert_equal(features, lens, *extract(theirs, [noise(40_007)]))


def test_recorded_speech(prompts):
    """Including MP3 and Opus, in whose empty bins the order of a sum changes a feature by 0.06."""
    assert_clips_equal([decode_audio(clip.path) for clip in prompts])


def test_librispeech(librispeech):
    assert_clips_equal([decode_audio(clip.path) for clip in librispeech[::33]])


def assert_clips_equal(waveforms):
    ours, theirs = pair(80)
    batched, lens = ours(waveforms)
    for index, waveform in enumerate(waveforms):
        alone, _ = ours([waveform])
        torch.testing.assert_close(batched[index, : lens[index]], alone[0], rtol=0, atol=0)
        assert_equal(alone, lens[index : index + 1], *extract(theirs, [waveform]))
