"""Small inputs made on the spot, and where the shared speech is, if present."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import soundfile

SHARED_SPEECH = Path(__file__).resolve().parents[2].parent / "shared" / "speech"


def tone(seconds: float, sample_rate_hz: int = 16_000, channels: int = 1, frequency_hz: float = 440.0) -> np.ndarray:
    """A sine, float32 [S] or [S, channels]."""
    wave = 0.3 * np.sin(2 * np.pi * frequency_hz * np.arange(int(seconds * sample_rate_hz)) / sample_rate_hz)
    wave = wave.astype(np.float32)
    return wave if channels == 1 else np.stack([wave] * channels, axis=1)


def audio_bytes(seconds: float = 1.0, kind: str = "WAV", sample_rate_hz: int = 16_000, channels: int = 1) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(seconds, sample_rate_hz, channels), sample_rate_hz, format=kind)
    return buffer.getvalue()


def tar_bytes(members: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return buffer.getvalue()


def jsonl(*records: dict | str) -> bytes:
    return "".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in records).encode()
