"""Small models with random weights, and checkpoints written from them in both foreign forms.

The names and keys are spelled out here a second time on purpose: a writer made from the reader's own tables would share
the reader's mistakes. `tests/parity` also reads what the reference itself writes.
"""

import gzip
import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from parakeet_core.config import EncoderConfig, FrontendConfig, ModelConfig
from parakeet_core.ctc import ParakeetCTC

TINY_EN = Path(__file__).resolve().parent / "data" / "tiny-en"
VOCAB_SIZE = 129  # with blank: the carried tokenizer's 128 pieces fit it


def small_config(mels: int = 80, **encoder) -> ModelConfig:
    """A model of some thousand weights; `encoder` changes its sizes and switches."""
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 64, "subsampling_channels": 8} | encoder
    return ModelConfig(EncoderConfig(n_mels=mels, **sizes), FrontendConfig(n_mels=mels), VOCAB_SIZE, VOCAB_SIZE - 1)


def small_model(seed: int = 0, mels: int = 80, **encoder) -> ParakeetCTC:
    """As `small_config`, with random weights, in eval mode."""
    return randomise(ParakeetCTC(small_config(mels, **encoder)), seed)


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Weights of the size that training gives, so that no part of the model is too small to be seen in its output.

    BatchNorm's statistics, norms and all biases are random too: at their initial 0 and 1 an error in folding them would
    not show.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    for name, tensor in sorted(model.state_dict().items()):
        if name.endswith("num_batches_tracked"):
            continue
        noise = torch.from_numpy(rng.standard_normal(tuple(tensor.shape), dtype=np.float32))
        if name.endswith("running_var"):
            tensor.copy_((0.4 * noise).exp())
        elif name.endswith("running_mean"):
            tensor.copy_(0.2 * noise)
        elif "norm" in name and name.endswith("weight"):
            tensor.copy_(1 + 0.15 * noise)
        elif name.endswith(("bias_u", "bias_v")):
            tensor.copy_(0.3 * noise)
        elif name.endswith("bias"):
            tensor.copy_(0.1 * noise)
        else:
            tensor.copy_(noise * (1.3 / np.sqrt(tensor[0].numel())))
    return model.eval()


def random_features(lens: list[int], mels: int = 80, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A padded batch of noise with zeros past the lengths: [B, T, M] and [B]."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(len(lens), max(lens), mels, generator=generator)
    for row, length in zip(features, lens, strict=True):
        row[length:] = 0
    return features, torch.tensor(lens)


def hf_config(config: ModelConfig) -> dict:
    """config.json of a Hugging Face directory."""
    encoder = config.encoder
    return {
        "model_type": "parakeet_ctc",
        "vocab_size": config.vocab_size,
        "pad_token_id": config.blank_id,
        "ctc_loss_reduction": config.loss_reduction,
        "ctc_zero_infinity": config.loss_zero_infinity,
        "encoder_config": {
            "model_type": "parakeet_encoder",
            "hidden_size": encoder.d_model,
            "num_hidden_layers": encoder.n_layers,
            "num_attention_heads": encoder.n_heads,
            "num_key_value_heads": encoder.n_heads,
            "intermediate_size": encoder.d_ff,
            "hidden_act": "silu",
            "conv_kernel_size": encoder.conv_kernel,
            "num_mel_bins": encoder.n_mels,
            "subsampling_factor": encoder.subsampling_factor,
            "subsampling_conv_channels": encoder.subsampling_channels,
            "subsampling_conv_kernel_size": encoder.subsampling_kernel,
            "subsampling_conv_stride": encoder.subsampling_stride,
            "attention_bias": encoder.attention_bias,
            "convolution_bias": encoder.convolution_bias,
            "scale_input": encoder.scale_input,
        },
    }


def write_hf(path: Path, model: ParakeetCTC, shards: int = 1, tensors: dict | None = None) -> Path:
    """A Hugging Face directory.

    Args:
        shards: weight files; more than one come under an index.
        tensors: the weights, instead of the model's own.
    """
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "config.json", hf_config(model.config))
    frontend = {"feature_extractor_type": "ParakeetFeatureExtractor", "feature_size": model.config.frontend.n_mels}
    write_json(path / "processor_config.json", {"feature_extractor": frontend})
    shutil.copyfile(TINY_EN / "tokenizer.json", path / "tokenizer.json")
    tensors = {
        name: tensor.contiguous() for name, tensor in (model.state_dict() if tensors is None else tensors).items()
    }
    if shards == 1:
        save_file(tensors, path / "model.safetensors")
        return path
    names = sorted(tensors)
    files = {name: f"model-{index % shards + 1:05}-of-{shards:05}.safetensors" for index, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, path / file)
    write_json(path / "model.safetensors.index.json", {"metadata": {}, "weight_map": files})
    return path


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def edit_json(path: Path, changes: dict) -> None:
    """Set dotted keys of a JSON file; a value of None deletes its key."""
    write_json(path, with_changes(json.loads(path.read_text(encoding="utf-8")), changes))


def with_changes(content: dict, changes: dict) -> dict:
    for dotted, value in changes.items():
        *sections, key = dotted.split(".")
        target = content
        for section in sections:
            target = target.setdefault(section, {})
        if value is None:
            target.pop(key, None)
        else:
            target[key] = value
    return content


def nemo_tensors(model: nn.Module, hybrid: bool = False) -> dict[str, torch.Tensor]:
    """The model's weights under NeMo's names, with the front end's constants as NeMo stores them."""
    renames = [
        ("encoder.subsampling.layers.", "encoder.pre_encode.conv."),
        ("encoder.subsampling.linear.", "encoder.pre_encode.out."),
        (".conv.norm.", ".conv.batch_norm."),
        (".q_proj.", ".linear_q."),
        (".k_proj.", ".linear_k."),
        (".v_proj.", ".linear_v."),
        (".o_proj.", ".linear_out."),
        (".relative_k_proj.", ".linear_pos."),
        (".bias_u", ".pos_bias_u"),
        (".bias_v", ".pos_bias_v"),
        ("ctc_head.", "ctc_decoder.decoder_layers.0." if hybrid else "decoder.decoder_layers.0."),
    ]
    renamed = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in renames:
            name = name.replace(ours, theirs)
        renamed[name] = tensor.clone()
    renamed["preprocessor.featurizer.window"] = torch.hann_window(400, periodic=False)
    renamed["preprocessor.featurizer.fb"] = torch.zeros(1, 80, 257)
    if hybrid:  # the transducer beside the CTC head
        renamed["decoder.prediction.embed.weight"] = torch.zeros(129, 16)
        renamed["joint.enc.weight"] = torch.zeros(16, 32)
    return renamed


def nemo_config(config: ModelConfig, tokenizer_name: str) -> dict:
    """model_config.yaml as NeMo writes it; `use_bias` is left out where true, as in public archives."""
    encoder = config.encoder
    content = {
        "sample_rate": 16000,
        "target": "nemo.collections.asr.models.ctc_bpe_models.EncDecCTCModelBPE",
        "tokenizer": {"dir": "tok", "type": "bpe", "model_path": f"nemo:{tokenizer_name}"},
        "preprocessor": {
            "_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
            "sample_rate": 16000, "normalize": "per_feature", "window_size": 0.025, "window_stride": 0.01,
            "window": "hann", "features": config.frontend.n_mels, "n_fft": 512, "log": True, "frame_splicing": 1,
            "dither": 1e-05, "pad_to": 0, "pad_value": 0.0,
        },
        "encoder": {
            "_target_": "nemo.collections.asr.modules.ConformerEncoder", "feat_in": encoder.n_mels, "feat_out": -1,
            "n_layers": encoder.n_layers, "d_model": encoder.d_model, "subsampling": "dw_striding",
            "subsampling_factor": encoder.subsampling_factor,
            "subsampling_conv_channels": encoder.subsampling_channels, "causal_downsampling": False,
            "ff_expansion_factor": encoder.d_ff // encoder.d_model, "self_attention_model": "rel_pos",
            "n_heads": encoder.n_heads, "att_context_size": [-1, -1], "xscaling": encoder.scale_input,
            "untie_biases": True, "pos_emb_max_len": 5000, "conv_kernel_size": encoder.conv_kernel,
            "conv_norm_type": "batch_norm", "conv_context_size": None, "dropout": 0.1,
            "dropout_pre_encoder": 0.1, "dropout_emb": 0.0, "dropout_att": 0.1,
        },
        "decoder": {
            "_target_": "nemo.collections.asr.modules.ConvASRDecoder", "feat_in": encoder.d_model,
            "num_classes": config.vocab_size - 1,
        },
    }  # fmt: skip
    if not encoder.attention_bias:
        content["encoder"]["use_bias"] = False
    return content


def write_nemo(
    path: Path,
    model: ParakeetCTC,
    changes: dict | None = None,
    tensors: dict | None = None,
    weights: bytes | None = None,
    hybrid: bool = False,
    compress: bool = False,
    prefix: str = "./",
) -> Path:
    """A .nemo archive.

    Args:
        changes: dotted keys of the YAML, as in `edit_json`.
        tensors: the weights under NeMo's names, instead of the model's own.
        weights: the bytes of the weights member, instead of a file of `tensors`.
        prefix: of every member's name.
    """
    tokenizer = (TINY_EN / "tokenizer.model").read_bytes()
    tokenizer_name = hashlib.md5(tokenizer).hexdigest() + "_tokenizer.model"
    if weights is None:
        buffer = io.BytesIO()
        torch.save(nemo_tensors(model, hybrid) if tensors is None else tensors, buffer)
        weights = buffer.getvalue()
    config = nemo_config(model.config, tokenizer_name)
    if hybrid:
        config["aux_ctc"] = {"decoder": config.pop("decoder")}
    config = yaml.safe_dump(with_changes(config, changes or {}), sort_keys=False).encode()
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, content in (
            ("model_config.yaml", config),
            ("model_weights.ckpt", weights),
            (tokenizer_name, tokenizer),
        ):
            member = tarfile.TarInfo(prefix + name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    content = archive.getvalue()
    path.write_bytes(gzip.compress(content, 1) if compress else content)
    return path


def greedy_ids(logits: torch.Tensor, blank: int) -> list[int]:
    """Greedy CTC of one item's logits [U, V], in plain Python."""
    collapsed, previous = [], None
    for token in logits.argmax(-1).tolist():
        if token not in (previous, blank):
            collapsed.append(token)
        previous = token
    return collapsed


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference over the largest magnitude of the second."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max()) if theirs.numel() else 0.0
