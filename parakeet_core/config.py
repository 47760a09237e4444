"""Model constants, read from a checkpoint into frozen dataclasses. They are never options of a job.

Defaults are those of the reference configuration (transformers `models/parakeet/configuration_parakeet.py`), because
published checkpoints omit values that equal them.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from parakeet_core.errors import CheckpointError

MAX_N_FFT = 1 << 14  # 1 s at 16 kHz; published front ends have 512. With 2^24 the mel bank would take 5 GiB
MAX_RATE_HZ = 1_000_000  # the same limit as for recordings (audio_info.py)
Reduction = Literal["mean", "sum", "none"]


@dataclass(frozen=True)
class FrontendConfig:
    """Waveform to log-mel constants; lengths in samples."""

    sample_rate_hz: int = 16000
    n_mels: int = 80
    n_fft: int = 512
    win_length: int = 400  # 25 ms
    hop_length: int = 160  # 10 ms
    preemphasis: float = 0.97

    def __post_init__(self):
        if not 0 < self.hop_length <= self.win_length <= self.n_fft:
            raise CheckpointError(
                f"front end: expected 0 < hop <= window <= n_fft samples, found hop {self.hop_length}, "
                f"window {self.win_length}, n_fft {self.n_fft}"
            )
        if self.n_fft > MAX_N_FFT or not 1 <= self.n_mels <= self.n_fft // 2 + 1:
            raise CheckpointError(
                f"front end: expected n_fft up to {MAX_N_FFT} and 1 to n_fft / 2 + 1 mel bins, "
                f"found n_fft {self.n_fft}, {self.n_mels} bins"
            )
        if not 1 <= self.sample_rate_hz <= MAX_RATE_HZ or not 0 <= self.preemphasis <= 1:
            raise CheckpointError(
                f"front end: expected 1 to {MAX_RATE_HZ} Hz and a preemphasis from 0 to 1, found "
                f"{self.sample_rate_hz} Hz, {self.preemphasis}"
            )

    @property
    def frame_s(self) -> float:
        """Seconds from one feature frame to the next."""
        return self.hop_length / self.sample_rate_hz

    def frames(self, samples: int) -> int:
        """Valid feature frames of `samples` samples."""
        return samples // self.hop_length


@dataclass(frozen=True)
class EncoderConfig:
    """FastConformer sizes (arXiv:2305.05084)."""

    d_model: int = 1024
    n_layers: int = 24
    n_heads: int = 8
    d_ff: int = 4096
    conv_kernel: int = 9  # frames
    n_mels: int = 80
    subsampling_factor: int = 8
    subsampling_channels: int = 256
    subsampling_kernel: int = 3
    subsampling_stride: int = 2
    attention_bias: bool = True  # on the attention and feed-forward linears
    convolution_bias: bool = True
    scale_input: bool = True  # multiply the subsampled states by sqrt(d_model)
    dropout: float = 0.1
    dropout_positions: float = 0.0
    activation_dropout: float = 0.1
    attention_dropout: float = 0.1
    layerdrop: float = 0.1

    def __post_init__(self):
        sizes = ("d_model", "n_layers", "n_heads", "d_ff", "conv_kernel", "n_mels")
        sizes += ("subsampling_channels", "subsampling_kernel")
        wrong = [f"{name} is {getattr(self, name)} (expected 1 or more)" for name in sizes if getattr(self, name) < 1]
        if not wrong and (self.d_model % self.n_heads or self.d_model % 2):
            wrong.append(f"width {self.d_model} is not even or not a multiple of its {self.n_heads} heads")
        if self.conv_kernel % 2 == 0 or self.subsampling_kernel % 2 == 0:
            wrong.append(f"kernels must be odd, found {self.conv_kernel} and {self.subsampling_kernel}")
        powers = [self.subsampling_stride**stages for stages in range(1, 9)]
        if self.subsampling_stride < 2 or self.subsampling_factor not in powers:
            wrong.append(
                f"subsampling factor {self.subsampling_factor} is not a power of its stride {self.subsampling_stride}"
            )
        rates = ("dropout", "dropout_positions", "activation_dropout", "attention_dropout", "layerdrop")
        wrong += [
            f"{name} is {getattr(self, name)} (expected 0 to 1)" for name in rates if not 0 <= getattr(self, name) <= 1
        ]
        if wrong:
            raise CheckpointError("encoder configuration: " + "; ".join(wrong))

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_heads

    @property
    def n_subsampling_stages(self) -> int:
        """Strided convolutions that make up the subsampling factor."""
        return round(math.log(self.subsampling_factor, self.subsampling_stride))

    def subsample(self, frames):
        """Encoder frames of `frames` feature frames; `frames` is an int or an integer tensor."""
        for _ in range(self.n_subsampling_stages):
            frames = self.subsample_once(frames)
        return frames

    def subsample_once(self, frames):
        """Length after one strided convolution with (kernel - 1) / 2 padding on both sides."""
        return (frames + 2 * (self.subsampling_kernel // 2) - self.subsampling_kernel) // self.subsampling_stride + 1


@dataclass(frozen=True)
class ModelConfig:
    """All constants of the model and its front end."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    frontend: FrontendConfig = field(default_factory=FrontendConfig)
    vocab_size: int = 1025  # with blank
    blank_id: int = 1024
    loss_reduction: Reduction = "mean"
    loss_zero_infinity: bool = True

    def __post_init__(self):
        if not 0 <= self.blank_id < self.vocab_size:
            raise CheckpointError(f"blank id {self.blank_id} is outside the vocabulary of {self.vocab_size}")
        if self.loss_reduction not in get_args(Reduction):
            raise CheckpointError(f"loss reduction {self.loss_reduction!r}: expected one of {get_args(Reduction)}")
        if self.encoder.n_mels != self.frontend.n_mels:
            raise CheckpointError(
                f"the encoder takes {self.encoder.n_mels} mel bins, the front end makes {self.frontend.n_mels}"
            )

    @property
    def encoder_frame_s(self) -> float:
        """Seconds from one encoder frame to the next."""
        return self.frontend.frame_s * self.encoder.subsampling_factor


def differing_files(files: dict[str, str], others: dict[str, str]) -> str:
    """Names of files whose digests differ between two checkpoints, or that only one of them has; for a message."""
    return ", ".join(sorted(name for name in files | others if files.get(name) != others.get(name)))
