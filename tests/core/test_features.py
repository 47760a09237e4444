"""The front end alone: against float64, at its edges, alone and batched, and in its form for GPUs."""

import numpy as np
import pytest
import torch
from features_float64 import features_float64, slaney_bank
from hypothesis import given, settings
from hypothesis import strategies as st

from parakeet_core import features as features_module
from parakeet_core.config import FrontendConfig
from parakeet_core.errors import CheckpointError
from parakeet_core.features import BLOCK_FRAMES, LogMelFrontend, mel_filter_bank

HOP = 160
FLOAT32 = 5e-4  # largest difference of float32 features from float64 ones


def noise(samples: int, seed: int = 0) -> np.ndarray:
    rng = np.random.Generator(np.random.PCG64(seed))
    return (0.1 * rng.standard_normal(samples)).astype(np.float32)


@pytest.mark.parametrize("mels", [40, 80, 128])
def test_mel_bank(mels):
    np.testing.assert_allclose(mel_filter_bank(FrontendConfig(n_mels=mels)).T, slaney_bank(mels), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("offset", [-1, 0, 1])
@pytest.mark.parametrize("frames", [3, 8, 50, BLOCK_FRAMES, BLOCK_FRAMES + 1])
def test_against_float64(frames, offset):
    waveform = noise(frames * HOP + offset, seed=frames)
    features, lens = LogMelFrontend(FrontendConfig())([waveform])
    assert lens.tolist() == [len(waveform) // HOP]
    np.testing.assert_allclose(features[0], features_float64(waveform), rtol=0, atol=FLOAT32)


@pytest.mark.parametrize(("samples", "frames"), [(0, 0), (1, 0), (159, 0), (160, 1), (319, 1), (320, 2), (321, 2)])
def test_frames_of_few_samples(samples, frames):
    features, lens = LogMelFrontend(FrontendConfig())([noise(samples)])
    assert features.shape == (1, frames, 80)
    assert lens.tolist() == [frames]
    assert features.isfinite().all()


def test_no_waveforms():
    features, lens = LogMelFrontend(FrontendConfig())([])
    assert features.shape == (0, 0, 80)
    assert lens.tolist() == []


def test_more_than_one_dimension_is_refused():
    with pytest.raises(ValueError, match=r"waveform 1: expected one dimension .* found shape \(2, 160\)"):
        LogMelFrontend(FrontendConfig())([noise(160), np.zeros((2, 160), np.float32)])


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=6), st.randoms(use_true_random=False))
@settings(max_examples=25)
def test_alone_as_in_any_batch_and_order(lengths, random):
    frontend = LogMelFrontend(FrontendConfig())
    waveforms = [noise(length, seed) for seed, length in enumerate(lengths)]
    order = random.sample(range(len(lengths)), len(lengths))
    features, lens = frontend([waveforms[i] for i in order])
    for row, i in enumerate(order):
        alone, _ = frontend([waveforms[i]])
        torch.testing.assert_close(features[row, : lens[row]], alone[0], rtol=0, atol=0)
        assert not features[row, lens[row] :].any()


def test_tensors_and_arrays_give_the_same():
    frontend = LogMelFrontend(FrontendConfig())
    waveform = noise(5000)
    from_array, _ = frontend([waveform])
    from_tensor, _ = frontend([torch.from_numpy(waveform)])
    torch.testing.assert_close(from_tensor, from_array, rtol=0, atol=0)
    np.testing.assert_array_equal(waveform, noise(5000))  # the caller's samples are not changed


@pytest.mark.parametrize("block_frames", [features_module.BATCH_BLOCK_FRAMES, 6 * 70])
def test_whole_batch_in_one_go_as_on_a_gpu(block_frames, monkeypatch):
    """The form for GPUs, run here on the CPU: the same numbers except for the order of sums."""
    monkeypatch.setattr(features_module, "BATCH_BLOCK_FRAMES", block_frames)
    frontend = LogMelFrontend(FrontendConfig())
    waveforms = [torch.from_numpy(noise(length, length)) for length in (16_000, 160, 319, 100, 0, 48_001)]
    expected, lens = frontend(waveforms)
    features = frontend._padded(waveforms, lens.tolist(), lens)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-4)
    assert frontend._padded(waveforms[3:5], [0, 0], lens[3:5]).shape == (2, 0, 80)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    frontend = LogMelFrontend(FrontendConfig())
    waveforms = [noise(length, length) for length in (16_000, 160, 319, 100, 48_001)]
    expected, lens = frontend(waveforms)
    features, gpu_lens = frontend(waveforms, device="cuda")
    assert features.is_cuda
    assert gpu_lens.tolist() == lens.tolist()
    torch.testing.assert_close(features.cpu(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("sizes", [(0, 400, 512), (500, 400, 512), (160, 600, 512), (160, 0, 512)])
def test_impossible_windows_are_refused(sizes):
    hop, window, n_fft = sizes
    with pytest.raises(CheckpointError, match="hop <= window <= n_fft"):
        FrontendConfig(hop_length=hop, win_length=window, n_fft=n_fft)
