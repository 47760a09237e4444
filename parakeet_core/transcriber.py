"""The steps composed: audio in, transcripts out, in this process. The Python API; knows nothing of Ray or storage."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from parakeet_core.audio import MAX_LEVEL, load_audio
from parakeet_core.checkpoint import Checkpoint, load_checkpoint
from parakeet_core.engine import Engine
from parakeet_core.errors import ErrorKind, InputError
from parakeet_core.words import Tokens, Word, group_words

AudioItem = str | os.PathLike | bytes | np.ndarray | Tensor
WINDOW_AUDIO_S = (
    1800.0  # seconds decoded before the model runs: 58 MB of features, enough to form batches of similar length
)


@dataclass(frozen=True)
class Transcript:
    """The transcript of one item, or why there is none.

    Attributes:
        text: "" if nothing was said, or if `error` is set.
        token_ids: collapsed, without blanks.
        words: with times in seconds from the item's start.
        confidence: mean posterior of the tokens, in [0, 1]; None without tokens.
        duration_s: of the audio; None if it could not be decoded.
        blank_ratio: share of encoder frames without a token.
        error: set instead of a text.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    words: list[Word] = field(default_factory=list)
    confidence: float | None = None
    duration_s: float | None = None
    blank_ratio: float | None = None
    error: InputError | None = None


class Transcriber:
    """A loaded checkpoint that transcribes audio.

    transcriber = Transcriber.load("nvidia-parakeet-ctc-0.6b/", device="cpu", dtype="bfloat16")
    for transcript in transcriber.transcribe(["a.flac", "b.mp3"]):
        print(transcript.text)
    """

    def __init__(self, checkpoint: Checkpoint, compiled: bool | None = None):
        self.checkpoint = checkpoint
        self.engine = Engine(checkpoint, compiled=compiled)

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        compiled: bool | None = None,
    ) -> "Transcriber":
        """Load a checkpoint directory or .nemo file; see `load_checkpoint`. Raises CheckpointError.

        Args:
            compiled: see `Engine`. It is the default on CUDA, and takes a minute in the first process on a node.
        """
        return cls(load_checkpoint(path, dtype=dtype, device=device), compiled)

    def transcribe(self, items: Iterable[AudioItem], batch_audio_s: float | None = None) -> list[Transcript]:
        """Transcripts of `items`, in their order.

        Args:
            items: paths, encoded audio as bytes, or mono waveforms [S] at the model's rate (float in [-1, 1], or
                integer at the full scale of its type).
            batch_audio_s: seconds of padded audio that go through the model at once; by default what suits the device.

        Returns:
            One transcript per item; an item that cannot be decoded has its `error` set, the others are not affected.
        """
        return list(self.transcribe_stream(items, batch_audio_s))

    def transcribe_stream(self, items: Iterable[AudioItem], batch_audio_s: float | None = None) -> Iterator[Transcript]:
        """As `transcribe`, yielding in order after every WINDOW_AUDIO_S of audio, so that memory does not grow."""
        decoded: list[tuple[Tensor | InputError, float]] = []  # features or error, seconds
        waiting_s = 0.0
        for item in items:
            decoded.append(self._prepare(item))
            waiting_s += decoded[-1][1]
            if waiting_s >= WINDOW_AUDIO_S:
                yield from self._recognise(decoded, batch_audio_s)
                decoded, waiting_s = [], 0.0
        yield from self._recognise(decoded, batch_audio_s)

    def _prepare(self, item: AudioItem) -> tuple[Tensor | InputError, float]:
        try:
            waveform, duration_s = self._waveform(item)
        except InputError as error:
            return error, 0.0
        except FileNotFoundError:
            return InputError(ErrorKind.MISSING_OBJECT, f"{item}: no such file; check the path"), 0.0
        except OSError as error:
            return InputError(ErrorKind.STORAGE, f"{item}: cannot be read ({error.strerror}); check the path"), 0.0
        features, _ = self.checkpoint.frontend([waveform])
        return features[0], duration_s

    def _waveform(self, item: AudioItem) -> tuple[np.ndarray, float]:
        rate_hz = self.checkpoint.config.frontend.sample_rate_hz
        if isinstance(item, np.ndarray | Tensor):
            waveform = as_waveform(item)
            return waveform, len(waveform) / rate_hz
        audio = load_audio(item, rate_hz)
        return audio.waveform, audio.duration_s

    def _recognise(
        self, decoded: Sequence[tuple[Tensor | InputError, float]], batch_audio_s: float | None
    ) -> Iterator[Transcript]:
        features = [tensor for tensor, _ in decoded if isinstance(tensor, Tensor)]
        budget = None if batch_audio_s is None else batch_audio_s / self.checkpoint.config.frontend.frame_s
        results = iter(self.engine.recognise(features, budget))
        for prepared, duration_s in decoded:
            result = prepared if isinstance(prepared, InputError) else next(results)
            if isinstance(result, InputError):
                yield Transcript(error=result, duration_s=duration_s or None)
            else:
                yield build_transcript(self.checkpoint, result, duration_s)


def build_transcript(checkpoint: Checkpoint, tokens: Tokens, duration_s: float) -> Transcript:
    """Text, words and confidence of one item's tokens."""
    ids = tokens.ids.tolist()
    return Transcript(
        text=checkpoint.tokenizer.decode(ids),
        token_ids=ids,
        words=group_words(tokens, checkpoint.tokenizer, checkpoint.config.encoder_frame_s),
        confidence=float(tokens.scores.mean()) if ids else None,
        duration_s=duration_s,
        blank_ratio=tokens.blank_ratio,
    )


def as_waveform(samples: np.ndarray | Tensor) -> np.ndarray:
    """Mono float32 in [-1, 1] from an array of samples on any device: [S] -> [S].

    Raises:
        InputError: more than one dimension, a type without a full scale, or samples that are not finite or beyond
            any full scale.
    """
    if isinstance(samples, Tensor):
        samples = samples.detach().cpu()
        samples = (samples.float() if samples.is_floating_point() else samples).numpy()  # numpy has no bfloat16
    if samples.ndim != 1:
        raise InputError(
            ErrorKind.BAD_RECORD,
            f"array of shape {samples.shape}: expected one dimension of mono samples; mix the channels first",
        )
    if samples.dtype.kind not in "if":
        raise InputError(
            ErrorKind.BAD_RECORD, f"array of {samples.dtype}: expected float samples in [-1, 1] or signed integers"
        )
    if samples.dtype.kind == "i":
        return samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
    waveform = np.ascontiguousarray(samples, dtype=np.float32)  # a view can run backwards, which torch refuses
    if not (np.abs(waveform) <= MAX_LEVEL).all():  # NaN compares as false
        found = f"array holds NaN, infinity or values over {MAX_LEVEL:.0e}"
        raise InputError(ErrorKind.NON_FINITE, f"{found}; expected finite samples in [-1, 1]")
    return waveform
