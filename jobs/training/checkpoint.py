"""Checkpoints of a run: everything that a killed run needs to continue as if it had not been killed.

    OUTPUT/checkpoints/step-00001000-00.safetensors   weights, statistics and the optimiser's state, up to 1 GiB a file
    OUTPUT/checkpoints/step-00001000.json             the commit point, written last: the files with their digests, the
                                                      position in the data, the best measurement so far

Random numbers need no state: they are seeded by (seed, step, worker) and (seed, epoch, utterance). Nothing is pickled.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from jobs.storage.files import Storage
from jobs.training.batches import Position
from parakeet_core.errors import CheckpointError

FOLDER = "checkpoints"
FILE_BYTES = 1 << 30  # a put request allows at most 5 GiB, and a file is held in memory while it is written
KEPT = 2  # checkpoints: the last and the one before it
COMMIT_NAME = re.compile(r"^step-(\d{8})\.json$")


@dataclass(frozen=True)
class Progress:
    """Where a run is, besides its tensors.

    Attributes:
        step: optimiser steps done.
        position: of the next batch.
        skipped: steps whose gradient was not finite and was not applied.
        best_wer: the lowest of all measurements so far, taken after `best_step`; None before the first.
        measured_step: the last step after which the error rate was measured.
        without_gain: number of measurements since the best one.
    """

    step: int = 0
    position: Position = field(default_factory=Position)
    skipped: int = 0
    best_wer: float | None = None
    best_step: int = 0
    measured_step: int = 0
    without_gain: int = 0


def save_checkpoint(output: Storage, progress: Progress, model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Write a checkpoint, atomically, and delete all but the last two."""
    stem, files = f"step-{progress.step:08d}", []
    for number, tensors in enumerate(_grouped(_state(model, optimiser))):
        content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        files.append({"name": f"{stem}-{number:02d}.safetensors", "sha256": hashlib.sha256(content).hexdigest()})
        output.write_atomic(f"{FOLDER}/{files[-1]['name']}", content)
    record = json.dumps({"files": files, "progress": asdict(progress)}, indent=1)
    output.write_atomic(f"{FOLDER}/{stem}.json", record.encode())
    for old in list_checkpoints(output)[:-KEPT]:
        output.delete(f"{FOLDER}/step-{old:08d}.json")  # first: files without a commit point do not count
    kept = {stem} | {f"step-{step:08d}" for step in list_checkpoints(output)}
    for name in output.list_names(FOLDER):
        if name[: len(stem)] not in kept:
            output.delete(f"{FOLDER}/{name}")


def list_checkpoints(output: Storage) -> list[int]:
    """Steps of the committed checkpoints, ascending."""
    found = (COMMIT_NAME.match(name) for name in output.list_names(FOLDER))
    return sorted(int(match[1]) for match in found if match)


def read_progress(output: Storage) -> Progress | None:
    """Progress of the last checkpoint; None if there is none. Raises CheckpointError."""
    steps = list_checkpoints(output)
    return _record(output, steps[-1])[1] if steps else None


def load_checkpoint_into(output: Storage, model: nn.Module, optimiser: torch.optim.Optimizer) -> Progress | None:
    """Load the last checkpoint into a model and an optimiser of the same shapes; None if there is none.

    Raises:
        CheckpointError: it is damaged, or belongs to another model.
    """
    steps = list_checkpoints(output)
    if not steps:
        return None
    digests, progress = _record(output, steps[-1])
    tensors: dict[str, Tensor] = {}
    for name, digest in digests.items():
        content = output.read_bytes(f"{FOLDER}/{name}")
        if hashlib.sha256(content).hexdigest() != digest:
            raise _damaged(output, steps[-1], f"{name} is not what was written")
        tensors |= load(content)
    names = {name for name, _ in model.named_parameters()}
    states: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    weights = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "model":
            weights[rest] = tensor
        else:
            key, _, parameter = rest.partition(".")
            states.setdefault(parameter, {})[key] = tensor
    if weights.keys() != model.state_dict().keys() or states.keys() != names:
        raise _damaged(output, steps[-1], "it holds another model")
    model.load_state_dict(weights)
    for name, parameter in model.named_parameters():
        if states[name]:
            # `step` stays on the host, where the optimiser keeps it.
            optimiser.state[parameter] = {
                key: tensor if tensor.ndim == 0 else tensor.to(parameter.device) for key, tensor in states[name].items()
            }
    return progress


def _state(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors by name: `model.<name>`, `optimiser.<key>.<name>`."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, tensor in optimiser.state.get(parameter, {}).items():
            tensors[f"optimiser.{key}.{name}"] = tensor
    return tensors


def _grouped(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors in groups of at most FILE_BYTES; a larger tensor is a group of its own."""
    groups: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > FILE_BYTES:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += tensor.nbytes
    return groups


def _record(output: Storage, step: int) -> tuple[dict[str, str], Progress]:
    """(file -> its sha256, progress)."""
    try:
        record = json.loads(output.read_bytes(f"{FOLDER}/step-{step:08d}.json"))
        values = record["progress"]
        progress = Progress(**values | {"position": Position(**values["position"])})
        return {file["name"]: file["sha256"] for file in record["files"]}, progress
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(output, step, f"not a record of this version ({error!r})") from error


def _damaged(output: Storage, step: int, what: str) -> CheckpointError:
    path = output.source(f"{FOLDER}/step-{step:08d}.json")
    return CheckpointError(f"{path}: {what}; delete it to go on from the checkpoint before")
