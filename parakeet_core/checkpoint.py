"""A checkpoint on disk -> config, model, tokenizer and front end. Knows no foreign tensor names.

`checkpoint_hf.py` reads Hugging Face directories and `checkpoint_nemo.py` NeMo archives; only they know foreign names,
and both return a `CheckpointSource`. No pickled code is ever run, and no archive member is written to disk.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from parakeet_core.config import ModelConfig
from parakeet_core.ctc import ParakeetCTC
from parakeet_core.errors import CheckpointError, ConfigError
from parakeet_core.features import LogMelFrontend
from parakeet_core.quantised import INSTRUCTIONS, processor_multiplies_bytes
from parakeet_core.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INT8 = "int8"  # used like the name of a dtype: weights in bfloat16, the layers' linears in 8-bit integers
LISTED_NAMES = 20  # tensor names of one kind that a message lists; any more are only counted
HASH_BLOCK = 1 << 22  # bytes


@dataclass(frozen=True)
class CheckpointSource:
    """What the reader of a checkpoint format found; tensor names are those of `ParakeetCTC`.

    Attributes:
        shapes: name -> shape of every weight.
        tensors: yields (name, tensor) of every weight, each at most once in memory beside what the caller keeps.
        digest: sha256 of the stored weights, hexadecimal.
        files: name -> sha256 of the other files that affect the texts: configuration, front end and tokenizer.
    """

    config: ModelConfig
    tokenizer: Tokenizer
    shapes: dict[str, tuple[int, ...]]
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]
    digest: Callable[[], str]
    files: dict[str, str]


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint; the model is in eval mode."""

    path: Path
    config: ModelConfig
    model: ParakeetCTC
    tokenizer: Tokenizer
    frontend: LogMelFrontend
    source: CheckpointSource
    int8: bool = False  # whether to run the layers' linears in 8-bit integers

    @cached_property
    def digest(self) -> str:
        """sha256 of the weights file, hexadecimal; if there are several, of their `sha256sum` lines in order of name.

        Computed on first use: 2.4 GB take some seconds.
        """
        return self.source.digest()


def load_checkpoint(
    path: str | Path, dtype: torch.dtype | str = torch.float32, device: torch.device | str = "cpu"
) -> Checkpoint:
    """Load a checkpoint.

    Args:
        path: a directory as transformers writes it (config.json, safetensors, tokenizer) or a `.nemo` archive.
        dtype: of the model's weights, whatever the file's dtype. If both are the same, weights stay in the
            memory-mapped file. "int8" is possible on a CPU: `Engine` quantises what it runs.
        device: where the model goes.

    Raises:
        CheckpointError: it cannot be read, or it describes a model that is not implemented. One message names all
            missing, unexpected and misshapen tensors.
        ConfigError: this machine lacks the device, or its processor lacks the instructions for "int8".
    """
    path, int8, dtype, device = Path(path), dtype == INT8, resolve_dtype(dtype), resolve_device(device)
    if int8:
        _check_int8(device)
    source = read_source(path)
    with torch.device("meta"):
        model = ParakeetCTC(source.config)
    _check_tensors(path, model, source.shapes)
    for name, tensor in source.tensors():
        if not tensor.is_floating_point():
            raise CheckpointError(f"{path}: {name} holds {tensor.dtype}; quantised weights are not implemented")
        _set_tensor(model, name, tensor.to(device=device, dtype=dtype))
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:  # BatchNorm's counter of training steps
            _set_tensor(model, name, torch.zeros(buffer.shape, dtype=buffer.dtype, device=device))
    model.eval()
    return Checkpoint(
        path, source.config, model, source.tokenizer, LogMelFrontend(source.config.frontend), source, int8
    )


def read_source(path: Path) -> CheckpointSource:
    """Read a directory or an archive with the reader of its format. Raises CheckpointError."""
    from parakeet_core.checkpoint_hf import read_hf_directory  # both import this module's types
    from parakeet_core.checkpoint_nemo import read_nemo_archive

    if path.is_dir():
        return read_hf_directory(path)
    if path.is_file():
        return read_nemo_archive(path)
    raise CheckpointError(f"{path}: no such checkpoint; expected a Hugging Face directory or a .nemo file")


def resolve_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A torch dtype from itself or its name; for "int8", the dtype of everything except the linears.

    Raises:
        CheckpointError: models do not run in this dtype.
    """
    if dtype == INT8:
        return torch.bfloat16
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    if dtype in DTYPES.values():
        return dtype
    raise CheckpointError(f"dtype {dtype!r}: expected one of {', '.join([*DTYPES, INT8])}")


def _check_int8(device: torch.device) -> None:
    if device.type != "cpu":
        raise ConfigError(f"int8 on {device}: it is for CPUs; use bfloat16")
    if not processor_multiplies_bytes():
        raise ConfigError(f"int8: this processor has none of {', '.join(INSTRUCTIONS)}; use bfloat16 or float32")


def resolve_device(device: torch.device | str) -> torch.device:
    """A device that can be used here. Raises ConfigError for any other."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA fails an assertion
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device {str(device)!r} cannot be used ({reason}); expected cpu, or cuda on a GPU"
        ) from error


def layer_count(names: Iterable[str]) -> int:
    """Number of encoder layers, from the tensor names."""
    layers = {int(match[1]) for name in names if (match := re.match(r"encoder\.layers\.(\d{1,6})\.", name))}
    return max(layers, default=-1) + 1


def sha256_of(stream: BinaryIO) -> str:
    """sha256 of a stream's content, hexadecimal."""
    digest = hashlib.sha256()
    while block := stream.read(HASH_BLOCK):
        digest.update(block)
    return digest.hexdigest()


def _check_tensors(path: Path, model: nn.Module, found: dict[str, tuple[int, ...]]) -> None:
    expected = {
        name: tuple(t.shape) for name, t in model.state_dict().items() if not name.endswith("num_batches_tracked")
    }
    problems = [
        ("missing", [name for name in expected if name not in found]),
        ("unexpected", [name for name in found if name not in expected]),
        (
            "misshapen",
            [
                f"{name} (found {list(found[name])}, expected {list(shape)})"
                for name, shape in expected.items()
                if name in found and found[name] != shape
            ],
        ),
    ]
    if any(names for _, names in problems):
        listed = "; ".join(f"{len(names)} {kind}: {_listing(names)}" for kind, names in problems if names)
        raise CheckpointError(
            f"{path}: the weights are not those of the model that its configuration describes: {listed}. "
            "Expected a Parakeet CTC checkpoint whose configuration and weights belong together."
        )


def _listing(names: list[str]) -> str:
    more = f" and {len(names) - LISTED_NAMES} more" if len(names) > LISTED_NAMES else ""
    return ", ".join(names[:LISTED_NAMES]) + more


def _set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter or buffer with a tensor, without copying it."""
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if leaf in owner._buffers:
        owner._buffers[leaf] = tensor
    else:
        owner._parameters[leaf] = nn.Parameter(tensor)
