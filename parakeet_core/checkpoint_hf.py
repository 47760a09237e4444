"""Hugging Face directories: config.json, processor files, tokenizer, safetensors (one file, or shards under an index).

Source of the names and defaults: transformers `models/parakeet`, and the public checkpoints nvidia/parakeet-ctc-*.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import safetensors
from torch import Tensor

from parakeet_core.checkpoint import CheckpointSource, layer_count, sha256_of
from parakeet_core.config import EncoderConfig, FrontendConfig, ModelConfig
from parakeet_core.errors import CheckpointError
from parakeet_core.tokenizer import check_pieces, load_tokenizer

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MAPPED_BYTES = 64 << 20  # weights read through one mapping; its pages count as this process's memory until it is closed
IGNORED_SUFFIX = "num_batches_tracked"  # a training counter

MODEL_KEYS = {  # ours -> theirs
    "vocab_size": "vocab_size",
    "blank_id": "pad_token_id",
    "loss_reduction": "ctc_loss_reduction",
    "loss_zero_infinity": "ctc_zero_infinity",
}
ENCODER_KEYS = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "d_ff": "intermediate_size",
    "conv_kernel": "conv_kernel_size",
    "n_mels": "num_mel_bins",
    "subsampling_factor": "subsampling_factor",
    "subsampling_channels": "subsampling_conv_channels",
    "subsampling_kernel": "subsampling_conv_kernel_size",
    "subsampling_stride": "subsampling_conv_stride",
    "attention_bias": "attention_bias",
    "convolution_bias": "convolution_bias",
    "scale_input": "scale_input",
    "dropout": "dropout",
    "dropout_positions": "dropout_positions",
    "activation_dropout": "activation_dropout",
    "attention_dropout": "attention_dropout",
    "layerdrop": "layerdrop",
}
FRONTEND_KEYS = {
    "sample_rate_hz": "sampling_rate",
    "n_mels": "feature_size",
    "n_fft": "n_fft",
    "win_length": "win_length",
    "hop_length": "hop_length",
    "preemphasis": "preemphasis",
}


def read_hf_directory(path: Path) -> CheckpointSource:
    """Read a checkpoint directory, except for its weights.

    Raises:
        CheckpointError: a file is missing or damaged, or the model is not a Parakeet CTC model as implemented here.
    """
    config = _read_json(path / CONFIG)
    files = _weight_files(path)
    names = _tensor_files(path, files)
    shapes = _shapes(path, names)
    frontend_file, frontend = _frontend_config(path)
    model_config = _model_config(path, config, frontend, shapes)
    tokenizer_file = _tokenizer_file(path)
    tokenizer = load_tokenizer(path / tokenizer_file)
    check_pieces(tokenizer, model_config.vocab_size, str(path), model_config.blank_id)
    decisive = {name: _sha256(path / name) for name in (CONFIG, frontend_file, tokenizer_file)}
    return CheckpointSource(
        model_config, tokenizer, shapes, lambda: _tensors(path, names, shapes), lambda: _digest(path, files), decisive
    )


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing; a checkpoint directory needs it") from error
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _model_config(
    path: Path, config: dict, frontend: FrontendConfig, shapes: dict[str, tuple[int, ...]]
) -> ModelConfig:
    encoder = config.get("encoder_config")
    refused = []
    if config.get("model_type") != "parakeet_ctc" or not isinstance(encoder, dict):
        refused.append(f"model_type {config.get('model_type')!r} (expected 'parakeet_ctc' with its encoder_config)")
        encoder = {}
    _refuse(refused + _unlike_ours(encoder), f"{path}/config.json")
    found_layers = layer_count(shapes)
    if encoder.get("num_hidden_layers", EncoderConfig.n_layers) != found_layers:
        raise CheckpointError(
            f"{path}: config.json says {encoder.get('num_hidden_layers', EncoderConfig.n_layers)} layers, "
            f"the weights hold {found_layers}: they do not belong together"
        )
    depthwise = shapes.get("encoder.layers.0.conv.depthwise_conv.weight", ())
    if len(depthwise) == 3:  # some published configs omit the kernel
        encoder = encoder | {"conv_kernel_size": depthwise[-1]}
    where = f"{path}/config.json"
    built = {"encoder": typed_dataclass(EncoderConfig, encoder, ENCODER_KEYS, where), "frontend": frontend}
    return typed_dataclass(ModelConfig, config, MODEL_KEYS, where, **built)


def _unlike_ours(encoder: dict) -> list[str]:
    """What an encoder_config asks for that `EncoderConfig` cannot express."""
    found = []
    if encoder.get("hidden_act", "silu") != "silu":
        found.append(f"activation {encoder['hidden_act']!r} (expected 'silu')")
    heads = encoder.get("num_attention_heads", EncoderConfig.n_heads)
    if encoder.get("num_key_value_heads", heads) != heads:
        found.append(f"{encoder['num_key_value_heads']} key-value heads for {heads} heads (expected as many)")
    return found


def _refuse(reasons: list[str], where: str) -> None:
    if reasons:
        raise CheckpointError(f"{where}: not implemented: {'; '.join(reasons)}")


def read_encoder_config(path: Path) -> EncoderConfig:
    """The encoder that a config.json describes; no weights are needed.

    Raises:
        CheckpointError: it neither has nor is an encoder_config, or it asks for something that is not implemented.
    """
    config = _read_json(path)
    encoder = config.get("encoder_config", config)
    if not isinstance(encoder, dict) or not encoder.keys() & ENCODER_KEYS.values():
        raise CheckpointError(f"{path}: no encoder; expected a config.json with an encoder_config")
    _refuse(_unlike_ours(encoder), str(path))
    return typed_dataclass(EncoderConfig, encoder, ENCODER_KEYS, str(path))


def _frontend_config(path: Path) -> tuple[str, FrontendConfig]:
    """(file, front end), from the nested form (processor_config.json) or the older, flat preprocessor_config.json."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (path / name).exists():
            content = _read_json(path / name)
            content = content.get("feature_extractor", content)
            if isinstance(content, dict) and "feature_size" in content:
                filtered = {"preemphasis": 0.0} if content.get("preemphasis", 0.0) is None else {}  # null: no filter
                return name, typed_dataclass(FrontendConfig, content | filtered, FRONTEND_KEYS, f"{path}/{name}")
    raise CheckpointError(
        f"{path}: no front end; expected processor_config.json or preprocessor_config.json with a feature_size"
    )


def typed_dataclass(cls: type, found: dict, names: dict[str, str], where: str, **built: object):
    """Build a config dataclass from foreign keys; absent keys take its defaults, one error names all ill-typed ones.

    Args:
        names: our field -> their key.
        where: the file, for the message.
        built: fields that are config dataclasses themselves.
    """
    values, wrong = dict(built), []
    for field in dataclasses.fields(cls):
        key = names.get(field.name)
        if key is None or found.get(key) is None:
            continue
        value, kind = found[key], type(field.default)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not kind or (kind is int and not 0 <= value < 1 << 24):
            wrong.append(f"{key} is {value!r} (expected {kind.__name__}{' of 0 or more' if kind is int else ''})")
        values[field.name] = value
    if wrong:
        raise CheckpointError(f"{where}: {'; '.join(wrong)}")
    try:
        return cls(**values)
    except CheckpointError as error:  # the dataclass knows what is wrong, but not in which file
        raise CheckpointError(f"{where}: {error}") from error


def _tokenizer_file(path: Path) -> str:
    for name in ("tokenizer.json", "tokenizer.model"):
        if (path / name).exists():
            return name
    raise CheckpointError(f"{path}: no tokenizer; expected tokenizer.json or tokenizer.model")


def _weight_files(path: Path) -> list[str]:
    """Names of the weight files, sorted."""
    if (path / WEIGHTS).exists():
        return [WEIGHTS]
    if not (path / INDEX).exists():
        raise CheckpointError(f"{path}: no weights; expected {WEIGHTS} or {INDEX} (pickled weights are not read)")
    weight_map = _read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / INDEX}: expected a weight_map of tensor names to files")
    files = sorted({str(name) for name in weight_map.values()})
    outside = [name for name in files if Path(name).name != name]
    missing = [name for name in files if name not in outside and not (path / name).is_file()]
    if outside or missing:
        raise CheckpointError(
            f"{path / INDEX}: names files that are missing {missing} or outside the directory {outside}"
        )
    return files


def _tensor_files(path: Path, files: list[str]) -> dict[str, str]:
    """Tensor name -> file that holds it, from the files themselves."""
    names: dict[str, str] = {}
    for file in files:
        with _opened(path / file) as weights:
            for name in weights.keys():  # noqa: SIM118 - not a dict
                if name in names:
                    raise CheckpointError(f"{path}: tensor {name} is in {names[name]} and in {file}")
                if not name.endswith(IGNORED_SUFFIX):
                    names[name] = file
    return names


def _opened(path: Path):
    try:
        return safetensors.safe_open(path, framework="pt")
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error}); fetch it again") from error


def _shapes(path: Path, names: dict[str, str]) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for file in sorted(set(names.values())):
        with _opened(path / file) as weights:
            for name in (name for name, holder in names.items() if holder == file):
                shapes[name] = tuple(weights.get_slice(name).get_shape())
    return shapes


def _tensors(path: Path, names: dict[str, str], shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """Every weight, through mappings of about MAPPED_BYTES each, so that a conversion never holds two full copies."""
    for file in sorted(set(names.values())):
        pending = [name for name, holder in names.items() if holder == file]
        while pending:
            taken = 0
            with _opened(path / file) as weights:
                while pending and taken < MAPPED_BYTES:
                    tensor = weights.get_tensor(pending[0])
                    taken += tensor.nbytes
                    yield pending.pop(0), tensor


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return sha256_of(stream)


def _digest(path: Path, files: list[str]) -> str:
    digests = [_sha256(path / file) for file in files]
    if len(files) == 1:
        return digests[0]
    lines = "".join(f"{digest}  {file}\n" for digest, file in zip(digests, files, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()
