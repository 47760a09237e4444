"""Where a model comes from: a local path, a URL fetched once per node, or a Hugging Face id."""

import fcntl
import hashlib
import math
import os
import re
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jobs.storage.connections import OWN_ERRORS, StorageOptions, scheme_of
from jobs.storage.files import Storage
from jobs.storage.source_file import SourceFile
from parakeet_core.checkpoint import Checkpoint, load_checkpoint, read_source
from parakeet_core.config import ModelConfig, differing_files
from parakeet_core.errors import CheckpointError
from parakeet_core.tokenizer import Tokenizer

HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
CACHE_VARIABLE = "PARAKEET_CACHE"  # folder for fetched models; default ~/.cache/parakeet-batch
CHECKPOINT_FILES = (".json", ".safetensors", ".model", ".nemo")  # what a checkpoint directory may need
COPY_BYTES = 32 << 20  # per request; larger blocks gain nothing, and two of them are in memory


@dataclass(frozen=True)
class ModelReference:
    """A model as every worker can get it. Can be pickled.

    Attributes:
        name: a URL, an id of the Hugging Face hub or an absolute path.
        digest, files: sha256 of its weights, and of the files that affect texts besides them; a worker refuses others.
        config, tokenizer: what the stages without weights need.
        parameters: how many numbers its weights hold.
    """

    name: str
    digest: str
    config: ModelConfig
    tokenizer: Tokenizer
    parameters: int
    storage: StorageOptions
    files: dict[str, str]

    def load(self, dtype: str, device: str) -> Checkpoint:
        """The checkpoint on this node, fetched if need be. Raises CheckpointError."""
        checkpoint = load_checkpoint(local_model(self.name, self.storage), dtype=dtype, device=device)
        if checkpoint.digest != self.digest:
            raise CheckpointError(
                f"{self.name}: the weights on this node have sha256 {checkpoint.digest}, "
                f"the job began with {self.digest}; make the same checkpoint available to all nodes, best by a URL"
            )
        if changed := differing_files(self.files, checkpoint.source.files):
            raise CheckpointError(
                f"{self.name}: {changed} on this node is not what the job began with; make the same checkpoint "
                "available to all nodes, best by a URL"
            )
        return checkpoint


def resolve_model(name: str, storage: StorageOptions) -> ModelReference:
    """Find a model, check that it is implemented, and take its digest.

    Raises:
        CheckpointError: not found, not readable, or not a model that is implemented.
    """
    if (path := _path_here(name)) is not None:
        name = str(path)  # the same one in a worker, whatever its working directory
    source = read_source(local_model(name, storage))
    parameters = sum(math.prod(shape) for shape in source.shapes.values())
    return ModelReference(name, source.digest(), source.config, source.tokenizer, parameters, storage, source.files)


def local_model(name: str, storage: StorageOptions) -> Path:
    """A path on this node that holds the model.

    Raises:
        CheckpointError: it cannot be found or fetched.
    """
    if scheme_of(name) != "file":
        try:
            return _fetched(Storage(name, storage))
        except OWN_ERRORS as error:
            raise CheckpointError(f"model {name}: {error}") from error
        except OSError as error:
            raise CheckpointError(
                f"model {name}: the cache {cache_folder()} cannot be written ({error.strerror}); set {CACHE_VARIABLE}"
            ) from error
    if (path := _path_here(name)) is not None:
        return path
    if HUB_ID.match(name):
        return _from_hub(name)
    raise CheckpointError(f"model {name}: no such file or directory on this node; give a path, a URL or a model id")


def _path_here(name: str) -> Path | None:
    """The absolute path of a model on this node's disk; None for a URL, or if nothing is there."""
    if scheme_of(name) != "file":
        return None
    path = Path(name.removeprefix("file://")).expanduser()
    return path.resolve() if path.exists() else None


def cache_folder() -> Path:
    return Path(os.environ.get(CACHE_VARIABLE, "~/.cache/parakeet-batch")).expanduser()


def _fetched(source: Storage) -> Path:
    """A copy in this node's cache; actors of one node wait for the one that fetches.

    The copy's name is a digest of the URL, the files' names and sizes and what the store says of their content, so a
    model that was replaced under the same URL is fetched again.
    """
    files = _remote_files(source)
    key = hashlib.sha256(repr([source.url, files]).encode()).hexdigest()[:20]
    folder = cache_folder() / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f"{key}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            incomplete = folder.parent / f"{key}.partial"
            shutil.rmtree(incomplete, ignore_errors=True)
            incomplete.mkdir()
            for path, _, _ in files:
                _copy(source, path, incomplete / path.rsplit("/", 1)[-1])
            incomplete.rename(folder)
    return folder / files[0][0].rsplit("/", 1)[-1] if source.url.endswith(".nemo") else folder


def _copy(source: Storage, path: str, target: Path) -> None:
    """Fetch one file block by block: a connection that breaks after 2 GB costs one block."""
    url = f"{source.scheme}://{path}"
    with SourceFile(url, source.options, block_bytes=COPY_BYTES) as file, open(target, "wb") as copy:
        shutil.copyfileobj(file, copy, COPY_BYTES)


def _remote_files(source: Storage) -> list[tuple[str, int, str]]:
    """(path, bytes, version) of the files of a remote checkpoint."""
    if source.url.endswith(".nemo"):
        entries = [source.call("", source.fs.info, source.root)]
    else:
        listed = source.call("", partial(source.fs.ls, detail=True), source.root)
        entries = [entry for entry in listed if entry["type"] == "file"]
    entries = [entry for entry in entries if entry["name"].endswith(CHECKPOINT_FILES)]
    if not entries:
        raise CheckpointError(
            f"model {source.url}: no checkpoint there; expected config.json and weights, or a .nemo file"
        )
    versions = ((e["name"], e["size"], str(e.get("ETag") or e.get("LastModified") or e.get("mtime"))) for e in entries)
    return sorted(versions)


def _from_hub(name: str) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise CheckpointError(
            f"model {name}: no such path; to fetch it as a Hugging Face model id: pip install 'parakeet-batch[hub]'"
        ) from error
    try:
        patterns = [f"*{ending}" for ending in CHECKPOINT_FILES if ending != ".nemo"]
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
        if (folder / "config.json").exists() and any(folder.glob("*.safetensors")):
            return folder  # most repositories also hold the archive: as many gigabytes again
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=["*.nemo"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(
            f"model {name}: no such path, and the Hugging Face hub does not give it ({type(error).__name__}); "
            "check the id and the network, or download it once and give its path or URL"
        ) from error
    return next(iter(sorted(folder.glob("*.nemo"))), folder)  # older repositories hold nothing else


__all__ = ["ModelReference", "local_model", "resolve_model"]
