"""Waveforms to normalised log-mel features. Knows nothing of files, batches or models.

Shapes: `B` batch, `S` samples, `T` feature frames, `M` mel bins.

The numbers are those of NeMo's `AudioToMelSpectrogramPreprocessor` as transformers' `ParakeetFeatureExtractor` computes
them, on the CPU to the last bit. What differs is the work: frames are a strided view of the waveform, only the frames
that count are computed, and each clip is processed in blocks that stay in the cache.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from parakeet_core.config import FrontendConfig

LOG_GUARD = 2.0**-24  # added to mel energies before the logarithm; NeMo's log_zero_guard_value
STD_GUARD = 1e-5  # added to the standard deviation; NeMo's CONSTANT in normalize_batch
BLOCK_FRAMES = 512  # frames transformed at a time on the CPU: 1 MB of frames and 1 MB of spectrum stay in the L2 cache
BATCH_BLOCK_FRAMES = 120_000  # the same for a whole batch on other devices: 250 MB of frames and 250 MB of spectrum


class LogMelFrontend:
    """Waveforms -> (features, lens), each item normalised over its own frames.

    Args:
        config: constants of the checkpoint's front end.
    """

    def __init__(self, config: FrontendConfig):
        self.config = config
        self._constants: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(
        self, waveforms: Sequence[np.ndarray | Tensor], device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features of several items, padded with zeros to the longest.

        Args:
            waveforms: B waveforms [S], float, mono, at the front end's rate, full scale 1.0.
            device: where to compute; by default the device of the first tensor, else the CPU.

        Returns:
            features [B, T, M] float32 and lens [B] int64. An item of S samples has S // hop frames; an item of one
            frame is all zeros, as in NeMo, where the reference gives NaN.

        Raises:
            ValueError: a waveform is not one-dimensional.
        """
        tensors = [torch.as_tensor(waveform, dtype=torch.float32) for waveform in waveforms]
        for index, tensor in enumerate(tensors):
            if tensor.ndim != 1:
                raise ValueError(f"waveform {index}: expected one dimension [S], found shape {tuple(tensor.shape)}")
        if device is None:
            device = tensors[0].device if tensors else "cpu"
        device = torch.device(device)
        lens = torch.tensor([self.config.frames(len(tensor)) for tensor in tensors], dtype=torch.int64)
        if device.type == "cpu":
            return self._one_by_one(tensors, lens), lens
        there = send(lens, device)
        return self._padded([tensor.to(device) for tensor in tensors], lens.tolist(), there), there

    def _one_by_one(self, waveforms: list[Tensor], lens: Tensor) -> Tensor:
        """[B, T, M]: clip by clip, so that a clip's buffers stay in the cache and no padding is computed."""
        features = torch.zeros(len(waveforms), int(lens.max()) if len(lens) else 0, self.config.n_mels)
        for row, waveform, frames in zip(features, waveforms, lens.tolist(), strict=True):
            emphasised = self._emphasise(waveform)
            for start in range(0, frames, BLOCK_FRAMES):
                end = min(start + BLOCK_FRAMES, frames)
                row[start:end] = self._log_mel(emphasised, start, end)
            if frames:
                _normalise_(row[:frames])
        return features

    def _padded(self, waveforms: list[Tensor], frames: list[int], lens: Tensor) -> Tensor:
        """[B, T, M]: the whole batch in one go, for devices that favour few large operations.

        Args:
            waveforms: on the device.
            frames: of each waveform, on the host.
            lens: the same on the device; their values are not waited for.
        """
        longest, device = max(frames, default=0), lens.device
        if not longest:
            return torch.zeros(len(waveforms), 0, self.config.n_mels, device=device)
        emphasised = self._emphasise(torch.nn.utils.rnn.pad_sequence(waveforms, True))
        behind = send(torch.tensor([len(waveform) for waveform in waveforms]), device) + self.config.n_fft // 2
        emphasised.scatter_(1, behind[:, None], 0.0)  # where the last sample was subtracted from the padding
        step = max(1, BATCH_BLOCK_FRAMES // len(waveforms))
        blocks = [(start, min(start + step, longest)) for start in range(0, longest, step)]
        features = torch.cat([self._log_mel(emphasised, *block) for block in blocks], 1)  # [B, T, M]
        valid = (torch.arange(longest, device=device) < lens[:, None])[:, :, None]
        counts = lens[:, None, None].clamp(min=1)
        mean = (features * valid).sum(1, keepdim=True) / counts
        centred = (features - mean) * valid
        variance = centred.square().sum(1, keepdim=True) / (counts - 1).clamp(min=1)
        return centred / (variance.sqrt() + STD_GUARD)

    def _emphasise(self, waveforms: Tensor) -> Tensor:
        """Pre-emphasis, then zeros of half a transform on both sides: [..., S] -> [..., S + n_fft]."""
        half = self.config.n_fft // 2
        padded = F.pad(waveforms, (half, half))
        padded[..., half + 1 : half + waveforms.shape[-1]] -= self.config.preemphasis * waveforms[..., :-1]
        return padded

    def _log_mel(self, emphasised: Tensor, start: int, end: int) -> Tensor:
        """Log-mel frames [start, end) of padded waveforms [..., S + n_fft] -> [..., T, M].

        The window is in the middle of the transform, as in the reference. Elsewhere the power would be the same except
        for rounding, but bins without energy hold nothing else: it amounted to 2.5e-4 in a chirp's normalised features.
        """
        hop, n_fft = self.config.hop_length, self.config.n_fft
        window, mel_bank = self._constants_on(emphasised.device)
        span = emphasised[..., start * hop : (end - 1) * hop + n_fft]
        frames = span.unfold(-1, n_fft, hop) * window  # [..., T, n_fft]
        squares = torch.view_as_real(torch.fft.rfft(frames)).square_()  # [..., T, bins, 2]
        power = squares[..., 0].add(squares[..., 1])
        power.sqrt_().square_()  # rounds like the reference, which squares the magnitude
        return power.matmul(mel_bank).add_(LOG_GUARD).log_()

    def _constants_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Window [n_fft] and mel bank [bins, M]."""
        if device not in self._constants:
            margin = self.config.n_fft - self.config.win_length
            window = torch.hann_window(self.config.win_length, periodic=False)
            window = F.pad(window, (margin // 2, margin - margin // 2))
            bank = torch.from_numpy(mel_filter_bank(self.config))
            self._constants[device] = (window.to(device), bank.to(device))
        return self._constants[device]


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device; does not wait for a GPU, which may be busy with what was sent before."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _normalise_(features: Tensor) -> None:
    """In place, [T, M]: zero mean and unit standard deviation of each mel bin over the frames (ddof 1).

    Sums run in the reference's order: along time, over the valid frames and one more, masked frame. Bins that a lossy
    codec left empty hold log(2^-24) and hardly deviate, so the last bit of their mean becomes 0.03 of a feature: with
    sums in another order, 2 of 100 MP3 clips got another text.
    """
    frames = features.shape[0]
    by_bin = F.pad(features.T, (0, 1))  # [M, T + 1]
    by_bin.sub_(by_bin.sum(-1, keepdim=True).div_(frames))
    by_bin[:, -1] = 0
    variance = by_bin.square().sum(-1, keepdim=True).div_(max(frames - 1, 1))
    features.copy_(by_bin.div_(variance.sqrt_().add_(STD_GUARD))[:, :-1].T)


def mel_filter_bank(config: FrontendConfig) -> np.ndarray:
    """Triangular filters [bins, M], float32, 0 Hz to half the sample rate, of unit area (Slaney's norm).

    Every step is rounded as in transformers' `audio_utils.mel_filter_bank`, so that features are equal to the last bit.

    Source: Slaney's Auditory Toolbox, as in librosa.filters.mel(htk=False, norm="slaney").
    """
    nyquist_hz = config.sample_rate_hz / 2
    bins_hz = np.linspace(0, nyquist_hz, config.n_fft // 2 + 1)
    edges_hz = _mel_to_hz(np.linspace(0, _hz_to_mel(nyquist_hz), config.n_mels + 2))
    lower, centre, upper = edges_hz[:-2], edges_hz[1:-1], edges_hz[2:]
    rising = (bins_hz[:, None] - lower) / (centre - lower)
    falling = (upper - bins_hz[:, None]) / (upper - centre)
    triangles = np.maximum(0, np.minimum(rising, falling)).astype(np.float32)
    return (triangles * (2 / (upper - lower))).astype(np.float32)


_BREAK_HZ, _BREAK_MEL = 1000.0, 15.0  # linear below, 200/3 Hz per mel; logarithmic above, 27 mels per factor of 6.4


def _hz_to_mel(hz: float) -> float:
    return 3 * hz / 200 if hz < _BREAK_HZ else _BREAK_MEL + np.log(hz / _BREAK_HZ) * (27 / np.log(6.4))


def _mel_to_hz(mel: np.ndarray) -> np.ndarray:
    above = _BREAK_HZ * np.exp(np.log(6.4) / 27 * (mel - _BREAK_MEL))
    return np.where(mel < _BREAK_MEL, 200 * mel / 3, above)
