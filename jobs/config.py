"""The options of the transcription job: one dataclass, checked when it is built, and the command line from it.

What other jobs share of them is in `StorageConfig`.
"""

import os
from dataclasses import dataclass
from typing import Annotated, Literal
from urllib.parse import urlsplit

import tyro

from jobs.inputs.scan import InputOptions
from jobs.planning.shards import PlanOptions
from jobs.storage.connections import StorageOptions
from jobs.storage.retrying import PATIENCE_S
from parakeet_core.errors import ConfigError

RAYS_OWN = frozenset({"", "CPU", "memory", "object_store_memory"})  # Ray refuses them among custom resources

PoolSize = tuple[int, int]  # fewest and most actors


def _parse_pool(text: list[str]) -> PoolSize:
    parts = text[0].split(":")
    low, high = parts[0], parts[-1]
    if len(parts) > 2 or not (low.isdigit() and high.isdigit()):
        raise ValueError(f"{text[0]!r}: expected MIN:MAX or N actors")
    return int(low), int(high)


PoolOption = Annotated[
    PoolSize,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="MIN:MAX",
        instance_from_str=_parse_pool,
        is_instance=lambda value: isinstance(value, tuple) and len(value) == 2,
        str_from_instance=lambda value: [f"{value[0]}:{value[1]}"],
    ),
]


@dataclass(frozen=True, kw_only=True)
class StorageConfig:
    """How object stores are reached."""

    s3_endpoint_url: str | None = None
    """S3 endpoint, if not AWS; default AWS_ENDPOINT_URL. Credentials come from the usual AWS variables only."""
    s3_region: str | None = None
    """S3 region; default AWS_REGION."""
    s3_anonymous: bool = False
    """Send unsigned requests, for public buckets."""
    storage_patience_s: float = PATIENCE_S
    """Seconds to retry failing storage before an item becomes an error row or the job stops."""

    def __post_init__(self):
        if not self.storage_patience_s >= 0:
            raise ConfigError(f"--storage-patience-s {self.storage_patience_s}: expected 0 or more")
        endpoint = self.storage().endpoint_url
        parts = urlsplit(endpoint or "")
        if "@" in (endpoint or ""):  # it would stand in every error of botocore
            raise ConfigError("the S3 endpoint holds a user or password; credentials come from AWS_* variables only")
        if endpoint and not (parts.scheme in ("http", "https") and parts.netloc):
            raise ConfigError(f"the S3 endpoint is {endpoint!r}; expected a URL, as http://localhost:9000")

    def storage(self) -> StorageOptions:
        """How to reach object stores, with the credentials of this process, so that workers need none of their own."""
        return StorageOptions(
            endpoint_url=self.s3_endpoint_url
            or os.environ.get("AWS_ENDPOINT_URL_S3")
            or os.environ.get("AWS_ENDPOINT_URL"),
            region=self.s3_region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
            key=os.environ.get("AWS_ACCESS_KEY_ID"),
            secret=os.environ.get("AWS_SECRET_ACCESS_KEY"),
            token=os.environ.get("AWS_SESSION_TOKEN"),
            anonymous=self.s3_anonymous,
            patience_s=self.storage_patience_s,
        )


@dataclass(frozen=True, kw_only=True)
class InputConfig(StorageConfig):
    """What to read, and how it is cut into shards."""

    input: str
    """Folder, glob, JSONL manifest, WebDataset tars or Parquet files: a path or URL (s3://bucket/prefix)."""
    format: Literal["auto", "files", "manifest", "webdataset", "parquet"] = "auto"
    """Layout of the input; auto detects it from the listing."""
    shard_audio_s: float | None = None
    """Seconds of audio per shard, the unit of commit; default a 64th of the input, between 120 and 1800."""
    allow_local_paths: bool = False
    """Allow a manifest in an object store to name local files."""
    allow_http: bool = False
    """Allow manifests to name http(s) URLs of public hosts."""
    rtfx: float | None = None
    """For a dry run: seconds of audio that one GPU is expected to process per second."""
    gpus: int = 1
    """For a dry run: number of GPUs in use at a time."""
    gpu_hour_price: float | None = None
    """For a dry run: price of one GPU hour, in any currency."""

    def __post_init__(self):
        super().__post_init__()
        if not self.input:
            raise ConfigError("--input is empty")
        for name in ("rtfx", "gpus", "gpu_hour_price"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: expected more than 0")
        self.planning(), self.reading()  # their own checks

    def reading(self) -> InputOptions:
        return InputOptions(
            url=self.input,
            format=self.format,
            allow_local_paths=self.allow_local_paths,
            allow_http=self.allow_http,
            storage=self.storage(),
        )

    def planning(self, sources: StorageOptions | None = None) -> PlanOptions:
        """How to cut shards; `sources` if they are reached otherwise than by `storage()`."""
        return PlanOptions(shard_audio_s=self.shard_audio_s, storage=sources or self.storage())


@dataclass(frozen=True, kw_only=True)
class TranscribeConfig(InputConfig):
    """Transcribe audio in object storage into one Parquet table."""

    output: str
    """Folder for the table (OUTPUT/transcripts/) and everything that belongs to it: a path or URL."""
    model: str
    """Checkpoint: a Hugging Face directory or .nemo file (path or URL), or a Hugging Face model id."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda if the cluster has a GPU now, else cpu. Choose cuda on a cluster that starts without GPU nodes."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto"
    """The model's dtype. auto: the dtype that the output was begun with; for a new output, bfloat16 on cuda and float32
    on the CPU. int8 (CPUs only): the layers' matrix products in 8-bit integers, faster than bfloat16, but a few more
    words change."""
    dry_run: bool = False
    """Only list the input, read headers and report what the job would do. Writes nothing."""
    new_version: bool = False
    """If the output belongs to another model or dtype, write to OUTPUT/versions/<fingerprint>/ beside its table."""
    retry_errors: bool = False
    """Compute again the shards that have errors whose cause may be gone: missing or forbidden objects, failing storage,
    decoders that were not installed, crashed or reached their limits, items too large for the device, unexpected
    errors."""
    verify: int = 0
    """Items to sample after the run and transcribe again, each alone in float32; reports how many texts differ."""
    max_error_rate: float = 0.01
    """Share of items that may become error rows before the job exits with 3. About 1 % of crawled audio is bad; a
    higher share more likely means a wrong path, format or credential, which someone should look at. A run stops early
    if, after a thousand items or more, over half of them are errors, and more than this share."""
    feature_actors: PoolOption | None = None
    """Number of CPU actors that read, decode and compute features; default from the cluster's CPUs."""
    features: Literal["cpu", "gpu"] = "cpu"
    """Where log-mel features are computed. cpu: by the feature actors. gpu: by the model actors, which then receive
    16-bit samples (float32 samples with dtype float32), so that fewer CPUs keep a GPU busy."""
    model_actors: PoolOption | None = None
    """Number of actors that run the model, with one GPU or one CPU thread each; default from the cluster."""
    model_resource: str | None = None
    """Custom Ray resource of which each model actor takes one, in addition to a GPU on cuda: model actors are placed on
    the nodes that offer it."""
    ray_address: str | None = None
    """Cluster to join; default RAY_ADDRESS (set by `ray job submit`), else a new local cluster."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.max_error_rate <= 1:
            raise ConfigError(f"--max-error-rate {self.max_error_rate}: expected a share from 0 to 1")
        if self.model_resource in RAYS_OWN:
            raise ConfigError(f"--model-resource {self.model_resource}: expected the name of a custom resource of Ray")
        if self.verify < 0:
            raise ConfigError(f"--verify {self.verify}: expected a number of items")
        for name in ("feature_actors", "model_actors"):
            pool = getattr(self, name)
            if pool is not None and not 1 <= pool[0] <= pool[1]:
                raise ConfigError(f"--{name.replace('_', '-')} {pool[0]}:{pool[1]}: expected 1 <= MIN <= MAX")
        for name in ("output", "model"):
            if not getattr(self, name):
                raise ConfigError(f"--{name} is empty")
