"""NeMo archives (.nemo): a tar, sometimes gzipped, of a YAML config, torch.save'd weights and a SentencePiece model.

Source of the names: NeMo `collections/asr` (ConformerEncoder, ConvASRDecoder, AudioToMelSpectrogramPreprocessor).
"""

import hashlib
import lzma
import math
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
import yaml
from torch import Tensor

from parakeet_core.checkpoint import CheckpointSource, layer_count, sha256_of
from parakeet_core.checkpoint_hf import typed_dataclass
from parakeet_core.config import EncoderConfig, FrontendConfig, ModelConfig
from parakeet_core.errors import CheckpointError
from parakeet_core.features import LOG_GUARD
from parakeet_core.tokenizer import SentencePieceTokenizer, check_pieces

CONFIG, WEIGHTS = "model_config.yaml", "model_weights.ckpt"
UNREADABLE = (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError)  # what damaged archives raise
SMALL_MEMBER_BYTES = 64 << 20  # of the tokenizer; public ones are under 2 MB
CONFIG_BYTES = 4 << 20  # public ones are under 100 KB; reading 1 MB of YAML takes seconds
NUMBER_CHARACTERS = 100  # most in a number of the configuration

RENAMES = (  # theirs -> ours, applied in order
    (r"^encoder\.pre_encode\.conv\.", "encoder.subsampling.layers."),
    (r"^encoder\.pre_encode\.out\.", "encoder.subsampling.linear."),
    (r"\.conv\.batch_norm\.", ".conv.norm."),
    (r"\.linear_([qkv])\.", r".\1_proj."),
    (r"\.linear_out\.", ".o_proj."),
    (r"\.linear_pos\.", ".relative_k_proj."),
    (r"\.pos_bias_([uv])$", r".bias_\1"),
    (r"^(ctc_)?decoder\.decoder_layers\.0\.", "ctc_head."),
)
DROPPED = r"^preprocessor\.|num_batches_tracked$"  # the front end's window and mel bank; a training counter
DROPPED_IN_HYBRIDS = r"^(decoder|joint)\."  # the transducer beside the CTC head


def read_nemo_archive(path: Path) -> CheckpointSource:
    """Read a .nemo archive; its weights are read here, once, because only then are their shapes known.

    Raises:
        CheckpointError: the archive is damaged, or its model is not implemented here. All reasons are named.
    """
    try:
        with tarfile.open(path, "r:*") as archive:
            members = _members(archive)
            config_content = _small(path, archive, members, CONFIG, CONFIG_BYTES)
            config = _config(path, config_content)
            _refuse(path, config)
            tokenizer_name = config["tokenizer"]["model_path"].removeprefix("nemo:")
            tokenizer_content = _small(path, archive, members, tokenizer_name)
            tokenizer = SentencePieceTokenizer(tokenizer_content, f"{path}: {tokenizer_name}")
            tensors = _weights(path, archive, members, hybrid="aux_ctc" in config)
    except UNREADABLE as error:
        raise CheckpointError(f"{path}: not a readable .nemo archive ({error}); fetch it again") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    model_config = _model_config(path, config, shapes)
    check_pieces(tokenizer, model_config.vocab_size, str(path))
    decisive = {CONFIG: config_content, tokenizer_name: tokenizer_content}
    decisive = {name: hashlib.sha256(content).hexdigest() for name, content in decisive.items()}
    return CheckpointSource(model_config, tokenizer, shapes, lambda: _drain(tensors), lambda: _digest(path), decisive)


def _members(archive: tarfile.TarFile) -> dict[str, tarfile.TarInfo]:
    """Regular files by the last part of their path; links are left out, because they can point outside the archive."""
    return {Path(member.name).name: member for member in archive.getmembers() if member.isfile()}


def _member(path: Path, archive: tarfile.TarFile, members: dict[str, tarfile.TarInfo], name: str) -> BinaryIO:
    """A member opened by name; the path it would be extracted to is never used."""
    if name not in members:
        raise CheckpointError(f"{path}: no {name!r} in the archive; it holds {sorted(members)[:20]}")
    return archive.extractfile(members[name])


def _small(
    path: Path,
    archive: tarfile.TarFile,
    members: dict[str, tarfile.TarInfo],
    name: str,
    most_bytes: int = SMALL_MEMBER_BYTES,
) -> bytes:
    with _member(path, archive, members, name) as stream:
        content = stream.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise CheckpointError(f"{path}: {name} has {members[name].size} bytes, expected at most {most_bytes}")
    return content


class _PlainLoader(yaml.SafeLoader):
    """Refuses constructs in which few bytes cost much: aliases, which NeMo does not write, and numbers such as
    1:1:1:..., whose evaluation takes time quadratic in their length."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(
                f"alias *{self.peek_event().anchor:.50}: aliases are not read, write out what it means"
            )
        return super().compose_node(parent, index)

    def compose_scalar_node(self, anchor):
        node = super().compose_scalar_node(anchor)
        if node.tag != "tag:yaml.org,2002:str" and len(node.value) > NUMBER_CHARACTERS:
            raise yaml.YAMLError(f"a number of {len(node.value)} characters")
        return node


def _config(path: Path, content: bytes) -> dict:
    try:
        config = _PlainLoader(content).get_single_data()
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise CheckpointError(f"{path}: {CONFIG} is not readable YAML ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: {CONFIG}: expected a mapping, found {type(config).__name__}")
    return config


def _at(config: dict, dotted: str, default: Any = None) -> Any:
    """Value at a dotted path; `default` if it, or a section on the way, is absent or null."""
    for key in dotted.split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return default if config is None else config


IMPLEMENTED = {  # option -> implemented values; the first also stands for an absent option
    "tokenizer.type": ("bpe",),
    "preprocessor.normalize": ("per_feature",),
    "preprocessor.window": ("hann",),
    "preprocessor.log": (True,),
    "preprocessor.log_zero_guard_type": ("add",),
    "preprocessor.log_zero_guard_value": (LOG_GUARD,),
    "preprocessor.mag_power": (2.0,),
    "preprocessor.frame_splicing": (1,),
    "preprocessor.exact_pad": (False,),
    "preprocessor.lowfreq": (0,),
    "preprocessor.mel_norm": ("slaney",),
    "encoder.subsampling": ("dw_striding",),
    "encoder.causal_downsampling": (False,),
    "encoder.reduction": ("none",),
    "encoder.self_attention_model": ("rel_pos",),
    "encoder.untie_biases": (True,),
    "encoder.conv_norm_type": ("batch_norm",),
    "encoder.conv_context_size": ("symmetric",),
    "encoder.feat_out": (-1,),
    "decoder.add_blank": (True,),
    "aux_ctc.decoder.add_blank": (True,),
}


def _refuse(path: Path, config: dict) -> None:
    """Raise one CheckpointError that names every option whose value is not implemented."""
    refused = []
    for option, values in IMPLEMENTED.items():
        value = _at(config, option, values[0])
        if value not in values:
            refused.append(f"{option} {value!r} (expected {values[0]!r})")
    context = _at(config, "encoder.att_context_size", [-1, -1])
    sizes = context if isinstance(context, list) else [context]
    if any(size not in (-1, [-1, -1]) for size in sizes):
        refused.append(f"encoder.att_context_size {context!r} (expected [-1, -1], unlimited)")
    for section in ("encoder", "preprocessor", "tokenizer"):
        if not isinstance(config.get(section), dict):
            refused.append(f"no {section} section (expected a CTC model over SentencePiece pieces)")
    if not isinstance(_at(config, "tokenizer.model_path"), str):
        refused.append("no tokenizer.model_path (expected the name of a SentencePiece model)")
    if refused:
        raise CheckpointError(f"{path}: {CONFIG}: not implemented: {'; '.join(refused)}")


def _weights(path: Path, archive: tarfile.TarFile, members: dict, hybrid: bool) -> dict[str, Tensor]:
    """All weights under our names."""
    with _member(path, archive, members, WEIGHTS) as stream:
        try:
            found = torch.load(stream, map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: BLE001 - on damaged input torch's unpickler can raise any exception
            raise CheckpointError(f"{path}: {WEIGHTS} is not a file of tensors alone ({error!s:.500})") from error
    if not isinstance(found, dict) or not all(_is_dense(tensor) for tensor in found.values()):
        raise CheckpointError(f"{path}: {WEIGHTS}: expected a mapping of names to dense tensors")
    dropped = f"{DROPPED}|{DROPPED_IN_HYBRIDS}" if hybrid else DROPPED
    return {_our_name(str(name)): tensor for name, tensor in found.items() if not re.search(dropped, str(name))}


def _is_dense(value: object) -> bool:
    """Whether it is a tensor that stores every element: a view can stretch a single number to terabytes."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta or value.is_nested:
        return False
    return value.nbytes <= value.untyped_storage().nbytes()


def _our_name(name: str) -> str:
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


# NeMo's values for options that a section leaves out, where our own defaults differ.
ENCODER_DEFAULTS = {
    "subsampling_factor": 4, "subsampling_conv_channels": -1, "n_heads": 4, "xscaling": True, "dropout_emb": 0.1,
    "dropout_att": 0.0, "stochastic_depth_drop_prob": 0.0,
}  # fmt: skip
PREPROCESSOR_DEFAULTS = {"sample_rate": 16000, "window_size": 0.02, "window_stride": 0.01, "features": 64}


def _model_config(path: Path, config: dict, shapes: dict[str, tuple[int, ...]]) -> ModelConfig:
    """From the YAML; from the tensors for options that NeMo leaves out or derives."""
    where = f"{path}: {CONFIG}"
    encoder = ENCODER_DEFAULTS | config["encoder"]
    head, depthwise = shapes.get("ctc_head.weight", ()), shapes.get("encoder.layers.0.conv.depthwise_conv.weight", ())
    feed_forward = shapes.get("encoder.layers.0.feed_forward1.linear1.weight", ())
    if len(head) != 3 or len(depthwise) != 3 or len(feed_forward) != 2:
        raise CheckpointError(
            f"{path}: {WEIGHTS}: expected a FastConformer encoder with a CTC head, found {len(shapes)} tensors without"
        )
    if encoder.get("n_layers") != layer_count(shapes):
        raise CheckpointError(f"{where}: says {encoder.get('n_layers')} layers, the weights hold {layer_count(shapes)}")
    encoder["d_ff"], encoder["kernel"] = feed_forward[0], depthwise[-1]
    encoder["attention_bias"] = "encoder.layers.0.feed_forward1.linear1.bias" in shapes
    encoder["convolution_bias"] = "encoder.layers.0.conv.depthwise_conv.bias" in shapes
    if encoder.get("subsampling_conv_channels") == -1:  # in NeMo: the model's width
        encoder["subsampling_conv_channels"] = encoder.get("d_model")
    names = {
        "d_model": "d_model", "n_layers": "n_layers", "n_heads": "n_heads", "d_ff": "d_ff", "conv_kernel": "kernel",
        "n_mels": "feat_in", "subsampling_factor": "subsampling_factor",
        "subsampling_channels": "subsampling_conv_channels", "attention_bias": "attention_bias",
        "convolution_bias": "convolution_bias", "scale_input": "xscaling", "dropout": "dropout_pre_encoder",
        "dropout_positions": "dropout_emb", "activation_dropout": "dropout", "attention_dropout": "dropout_att",
        "layerdrop": "stochastic_depth_drop_prob",
    }  # fmt: skip
    built = {
        "encoder": typed_dataclass(EncoderConfig, encoder, names, where),
        "frontend": _frontend_config(config["preprocessor"], where),
    }
    found = {"vocab_size": head[0], "blank_id": head[0] - 1}  # NeMo appends the blank to the pieces
    return typed_dataclass(ModelConfig, found, {name: name for name in found}, where, **built)


def _frontend_config(preprocessor: dict, where: str) -> FrontendConfig:
    found = PREPROCESSOR_DEFAULTS | preprocessor
    rate = found["sample_rate"]
    try:
        found["win_length"] = int(found["window_size"] * rate)  # seconds -> samples; NeMo drops the fraction
        found["hop_length"] = int(found["window_stride"] * rate)
        if found.get("n_fft") is None:  # in NeMo: the next power of two
            found["n_fft"] = 2 ** math.ceil(math.log2(found["win_length"]))
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{where}: the preprocessor's rate and window are not positive numbers ({error})"
        ) from error
    if found.get("highfreq") not in (None, 0, rate / 2):
        raise CheckpointError(
            f"{where}: not implemented: preprocessor.highfreq {found['highfreq']!r} (expected {rate / 2})"
        )
    if "preemph" in found and found["preemph"] is None:  # no filter
        found["preemph"] = 0.0
    names = {
        "sample_rate_hz": "sample_rate", "n_mels": "features", "n_fft": "n_fft", "win_length": "win_length",
        "hop_length": "hop_length", "preemphasis": "preemph",
    }  # fmt: skip
    return typed_dataclass(FrontendConfig, found, names, where)


def _drain(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights and release each, so that a converted copy replaces its original."""
    while tensors:
        yield tensors.popitem()


def _digest(path: Path) -> str:
    with tarfile.open(path, "r:*") as archive, _member(path, archive, _members(archive), WEIGHTS) as stream:
        return sha256_of(stream)
