"""Generated audio in every format at hand, for the audio tests."""

import io
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import soundfile

from parakeet_core.errors import ErrorKind, InputError

SPEECH = Path(__file__).resolve().parents[2].parent / "shared" / "speech"
HEADERLESS = {"RAW", "SD2"}  # no header to recognise; SD2 keeps it in a second file, which it writes to the directory


def make_sound(seconds: float, rate: int = 16000, channels: int = 1, seed: int = 0) -> np.ndarray:
    """Return a rising tone in noise with pauses, [S] or [S, C] float32: nothing in it repeats."""
    rng = np.random.default_rng(seed)
    count = round(seconds * rate)
    time_s = np.arange(count) / rate
    tone = 0.3 * np.sin(2 * np.pi * (300 * time_s + 40 * time_s**2))
    pauses = np.repeat(rng.random(count // 1000 + 1) > 0.4, 1000)[:count]
    sound = ((tone + 0.05 * rng.standard_normal(count)) * pauses).astype(np.float32)
    if channels == 1:
        return sound
    return np.stack([np.roll(sound, 100 * index) / (index + 1) for index in range(channels)], axis=1)


def encode(sound: np.ndarray, rate: int = 16000, container: str = "WAV", codec: str = "PCM_16", **options) -> bytes:
    """Encode by libsndfile."""
    buffer = io.BytesIO()
    channels = 1 if sound.ndim == 1 else sound.shape[1]
    with soundfile.SoundFile(buffer, "w", rate, channels, codec, format=container, **options) as file:
        for start in range(0, len(sound), 1 << 16):  # libsndfile 1.2.2 crashes on minutes of Vorbis in one call
            file.write(sound[start : start + (1 << 16)])
    return buffer.getvalue()


@cache
def list_formats() -> list[tuple[str, str]]:
    """Return (container, codec) of all that libsndfile writes here."""
    formats = []
    for container in soundfile.available_formats():
        for codec in soundfile.available_subtypes(container) if container not in HEADERLESS else ():
            try:
                encode(make_sound(0.01), container=container, codec=codec)
            except soundfile.LibsndfileError:
                continue  # a list of libsndfile's readers, not all can write
            formats.append((container, codec))
    return formats


def encode_av(sound: np.ndarray, rate: int, container: str, codec: str) -> bytes:
    """Encode by FFmpeg."""
    import av

    channels = 1 if sound.ndim == 1 else sound.shape[1]
    layout = {1: "mono", 2: "stereo", 8: "7.1"}[channels]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, layout=layout)
        sample_format = "flt" if channels == 8 else stream.codec_context.format.name  # from_ndarray takes no 8 planes
        for start in range(0, len(sound), 1024):
            block = sound[start : start + 1024].reshape(-1, channels)
            if sample_format.startswith("s16"):
                block = (block * 32767).astype(np.int16)
            block = block.T if sample_format.endswith("p") else block.reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(block), format=sample_format, layout=layout)
            frame.sample_rate, frame.pts = rate, start
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def catch(call) -> InputError:
    """Return the InputError that a call raises; its message must be fit for an operator."""
    with pytest.raises(InputError) as caught:
        call()
    assert isinstance(caught.value.kind, ErrorKind)
    assert 20 < len(caught.value.message) < 400, caught.value.message
    return caught.value


class CountingFile(io.BytesIO):
    """Counts the bytes that are read, and fails where told to."""

    def __init__(self, data: bytes, fails_at: int | None = None, longest_read: int | None = None):
        super().__init__(data)
        self.bytes_read, self.fails_at, self.longest_read = 0, fails_at, longest_read

    def read(self, count: int = -1) -> bytes:
        if self.longest_read is not None and count > self.longest_read:
            count = self.longest_read
        part = super().read(count)
        self.bytes_read += len(part)
        if self.fails_at is not None and self.tell() > self.fails_at:
            raise ConnectionResetError("the storage went away")
        return part

    def readinto(self, buffer) -> int:
        part = self.read(len(buffer))
        buffer[: len(part)] = part
        return len(part)
