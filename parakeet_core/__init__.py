"""Parakeet CTC speech recognition: the model and its steps, without Ray and without object stores.

Names are imported on first use, so that a step which needs no audio library runs without one.
"""

from importlib import import_module

_HOME = {
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "ErrorKind": "errors",
    "InputError": "errors",
    "ParakeetError": "errors",
    "Transcriber": "transcriber",
    "Transcript": "transcriber",
    "decode_audio": "audio",
    "load_checkpoint": "checkpoint",
}
__all__ = list(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
