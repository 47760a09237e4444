"""Parakeet CTC speech recognition: the model and its steps, without Ray and without object stores."""

from parakeet_core.audio import decode_audio
from parakeet_core.checkpoint import load_checkpoint
from parakeet_core.errors import CheckpointError, ConfigError, ErrorKind, InputError, ParakeetError
from parakeet_core.transcriber import Transcriber, Transcript

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ErrorKind",
    "InputError",
    "ParakeetError",
    "Transcriber",
    "Transcript",
    "decode_audio",
    "load_checkpoint",
]
__version__ = "0.1.0"
