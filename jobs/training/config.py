"""The options of the fine-tuning job: one dataclass, checked when it is built, and the command line from it."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import Literal

from jobs.config import StorageConfig
from jobs.storage.connections import scrub
from parakeet_core.augment import SpecAugment
from parakeet_core.errors import ConfigError
from parakeet_core.training import Schedule

# Options that decide which parameters result. Where, how often and on how many machines a run works does not: all other
# options may change when a run is resumed.
_DECISIVE = (
    "train", "validation", "model", "model_config", "vocab_size", "text_form", "min_confidence", "min_audio_s",
    "max_audio_s", "epochs", "max_steps", "batch_audio_s", "learning_rate", "schedule", "warmup_steps", "weight_decay",
    "clip_norm", "dropout", "freeze_batch_norm", "speed_factors", "freq_masks", "freq_width", "time_masks",
    "time_width", "precision", "seed",
)  # fmt: skip

MAX_CPUS_PER_GPU = 8  # audio is decoded beforehand; a thread computes features at some thousand times real time


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(StorageConfig):
    """Train a Parakeet CTC model on recordings with texts."""

    train: tuple[str, ...]
    """Inputs with texts, in any layout of the transcription job, or outputs of that job (pseudo-labels)."""
    validation: tuple[str, ...]
    """Inputs to measure the error rate on; none of them may be in --train."""
    output: str
    """Folder for the model (OUTPUT/model/), checkpoints and report: a path or URL."""
    model: str | None = None
    """Checkpoint to start from: a Hugging Face directory or .nemo file (path or URL), or a Hugging Face model id."""
    model_config: str | None = None
    """Instead of --model: a config.json with an encoder_config, to start from random weights; needs --vocab-size."""
    vocab_size: int | None = None
    """Number of pieces of a new tokenizer, built from the training texts; the model then gets a new head."""
    text_form: Literal["auto", "plain", "raw"] = "auto"
    """plain: lower case, letters, digits and apostrophes; auto: plain if the tokenizer has no capitals, else raw."""
    min_confidence: float = 0.9
    """Lowest confidence of pseudo-labels: rows of a transcript table below it are left out."""
    min_audio_s: float = 0.3
    """Minimum seconds of an utterance; shorter ones are left out of training."""
    max_audio_s: float = 30.0
    """Maximum seconds of an utterance; longer ones are left out of training and validation."""
    allow_local_paths: bool = False
    """Allow a manifest in an object store to name local files."""
    allow_http: bool = False
    """Allow manifests to name http(s) URLs of public hosts."""

    epochs: float = 10.0
    """Passes over the training set."""
    max_steps: int | None = None
    """Optimiser steps, instead of --epochs."""
    batch_audio_s: float = 320.0
    """Seconds of audio per optimiser step, over all workers: the same whatever their number."""
    micro_batch_audio_s: float | None = None
    """Seconds of padded audio that go through one copy of the model at once; larger steps accumulate gradients. Default
    80 on a CPU, 400 on a GPU."""
    learning_rate: float = 3e-4
    """Highest learning rate, reached after the warm-up."""
    schedule: Schedule = "cosine"
    """How the learning rate falls. cosine: to zero at the last step; noam: with the inverse square root of the step."""
    warmup_steps: int = 200
    """Steps over which the learning rate rises."""
    weight_decay: float = 1e-3
    """Weight decay of matrices and kernels."""
    clip_norm: float = 1.0
    """Largest norm of a step's gradient; longer gradients are scaled down to it."""
    dropout: float | None = None
    """One value for all dropout rates of the encoder; default: the checkpoint's rates."""
    freeze_batch_norm: bool = False
    """Keep BatchNorm's statistics from the checkpoint; for small batches and small changes of domain."""
    speed_factors: tuple[float, ...] = (0.9, 1.0, 1.1)
    """Speeds of which one is drawn for each utterance in every epoch; give only 1 for no change."""
    freq_masks: int = SpecAugment.freq_masks
    """Number of bands of mel bins masked in each utterance (SpecAugment)."""
    freq_width: int = SpecAugment.freq_width
    """Maximum mel bins in one band."""
    time_masks: int = SpecAugment.time_masks
    """Number of time spans masked in utterances of 10 s or more; fewer in shorter ones."""
    time_width: float = SpecAugment.time_width
    """Maximum share of an utterance in one span."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the forward and backward pass. auto: bfloat16 on a GPU, else float32. Weights and their updates are
    float32."""
    seed: int = 0
    """Seed of initial weights, order of data, augmentation and dropout."""

    log_steps: int = 20
    """Steps between two lines of training metrics."""
    validate_steps: int = 200
    """Steps between two measurements of the error rate; the last step is measured as well."""
    patience: int | None = None
    """Stop after this many measurements in a row without a lower error rate."""
    checkpoint_steps: int = 1000
    """Maximum steps between two checkpoints."""
    checkpoint_minutes: float = 10.0
    """Maximum minutes between two checkpoints."""
    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the weights in OUTPUT/model/."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda if the cluster has a GPU now, else cpu."""
    workers: int | None = None
    """Number of workers, each with a copy of the model and one GPU; default: one per GPU of the cluster, or a single
    worker on a CPU."""
    cpus_per_worker: int | None = None
    """Threads of each worker, for the model (on a CPU), decoding and features; default from the cluster."""
    max_restarts: int = 3
    """Maximum restarts of the workers, from the last checkpoint, after one of them was lost."""
    ray_address: str | None = None
    """Cluster to join; default RAY_ADDRESS (set by `ray job submit`), else a new local cluster."""

    def __post_init__(self):
        super().__post_init__()
        if (self.model is None) == (self.model_config is None):
            raise ConfigError("expected either --model, to start from a checkpoint, or --model-config, to start anew")
        if self.model_config is not None and self.vocab_size is None:
            raise ConfigError("--model-config needs --vocab-size: a model from random weights has no tokenizer yet")
        for name in ("train", "validation"):
            if not getattr(self, name) or "" in getattr(self, name):
                raise ConfigError(f"--{name} is empty")
        if not self.output:
            raise ConfigError("--output is empty")
        if set(self.train) & set(self.validation):
            raise ConfigError(f"--train and --validation both hold {sorted(set(self.train) & set(self.validation))[0]}")
        above_zero = (
            "vocab_size", "max_audio_s", "epochs", "max_steps", "batch_audio_s", "micro_batch_audio_s",
            "learning_rate", "clip_norm", "log_steps", "validate_steps", "patience", "checkpoint_steps",
            "checkpoint_minutes", "workers", "cpus_per_worker",
        )  # fmt: skip
        for name in above_zero:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: expected more than 0")
        for name in ("weight_decay", "freq_masks", "freq_width", "time_masks", "warmup_steps", "min_audio_s", "seed"):
            value = getattr(self, name)
            if not value >= 0:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: expected 0 or more")
        if self.epochs == math.inf or self.seed >= 1 << 63:
            raise ConfigError(f"--epochs {self.epochs} --seed {self.seed}: expected finite epochs, a seed under 2^63")
        for name in ("min_confidence", "time_width", "dropout"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: expected 0 to 1")
        if not self.speed_factors or not all(0.5 <= factor <= 2 for factor in self.speed_factors):
            raise ConfigError(f"--speed-factors {self.speed_factors}: expected one or more from 0.5 to 2")

    def spec_augment(self) -> SpecAugment:
        return SpecAugment(self.freq_masks, self.freq_width, self.time_masks, self.time_width)

    def decisive_options(self) -> dict:
        """The options that a resumed run must share with the run it continues, without the secrets that URLs can
        contain, because they are stored."""
        options = {name: value for name, value in asdict(self).items() if name in _DECISIVE}
        options |= {name: tuple(self._scrubbed(url) for url in options[name]) for name in ("train", "validation")}
        return options | {name: self._scrubbed(options[name]) for name in ("model", "model_config")}

    def _scrubbed(self, url: str | None) -> str | None:
        return None if url is None else scrub(url, self.storage())

    def fingerprint(self, weights_sha256: str) -> str:
        """Fingerprint of what decides the result, except the data.

        Args:
            weights_sha256: of the checkpoint that training starts from, or of --model-config.
        """
        record = json.dumps([self.decisive_options(), weights_sha256], sort_keys=True)
        return hashlib.sha256(record.encode()).hexdigest()[:16]
