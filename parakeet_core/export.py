"""A model -> the files of a Hugging Face directory, which `load_checkpoint` and transformers' `ParakeetForCTC` read.

Contents are returned by name; the caller writes them, to a disk or to an object store.
"""

import json

import torch
from safetensors.torch import save
from torch import nn

from parakeet_core.checkpoint import resolve_dtype
from parakeet_core.checkpoint_hf import ENCODER_KEYS, FRONTEND_KEYS, IGNORED_SUFFIX, MODEL_KEYS, WEIGHTS
from parakeet_core.config import ModelConfig
from parakeet_core.tokenizer import Tokenizer
from parakeet_core.tokenizer_training import BLANK, as_tokenizer_json


def checkpoint_files(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, bytes]:
    """Name -> content of every file but the weights."""
    content = tokenizer.content()
    files = {"tokenizer.json": content if isinstance(content, str) else as_tokenizer_json(content)}
    files |= {
        "config.json": _json(_model_record(config)),
        "processor_config.json": _json(_processor_record(config)),
        "tokenizer_config.json": _json(_tokenizer_record(config, tokenizer)),
        "generation_config.json": _json({"pad_token_id": config.blank_id}),
    }
    encoded = {name: text.encode() for name, text in files.items()}
    return encoded if isinstance(content, str) else encoded | {"tokenizer.model": content}


def weights_file(model: nn.Module, dtype: torch.dtype | str) -> tuple[str, bytes]:
    """(name, content) of the weights, rounded to `dtype`."""
    dtype = resolve_dtype(dtype)
    tensors = {
        name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in model.state_dict().items()
        if not name.endswith(IGNORED_SUFFIX)
    }
    return WEIGHTS, save(tensors, metadata={"format": "pt"})  # transformers requires the format


def _model_record(config: ModelConfig) -> dict:
    """config.json. Its dtype is float32 whatever that of the weights: transformers then loads them as float32."""
    encoder = _renamed(config.encoder, ENCODER_KEYS)
    encoder |= {"model_type": "parakeet_encoder", "hidden_act": "silu"}
    encoder |= {"num_key_value_heads": config.encoder.n_heads}
    record = _renamed(config, MODEL_KEYS) | {"model_type": "parakeet_ctc", "architectures": ["ParakeetForCTC"]}
    return record | {"dtype": "float32", "encoder_config": encoder}


def _processor_record(config: ModelConfig) -> dict:
    extractor = _renamed(config.frontend, FRONTEND_KEYS)
    extractor |= {"feature_extractor_type": "ParakeetFeatureExtractor", "padding_side": "right", "padding_value": 0.0}
    return {
        "processor_class": "ParakeetProcessor",
        "decoder_type": "ctc",
        "feature_extractor": extractor | {"return_attention_mask": True},
    }


def _tokenizer_record(config: ModelConfig, tokenizer: Tokenizer) -> dict:
    """tokenizer_config.json. For a special token that is not in the vocabulary, transformers would add a piece."""
    pieces, unknown = tokenizer.pieces, tokenizer.unknown_id
    return {
        "tokenizer_class": "ParakeetTokenizer",
        "processor_class": "ParakeetProcessor",
        "unk_token": None if unknown is None else pieces[unknown],
        "pad_token": pieces[config.blank_id] if config.blank_id < len(pieces) else BLANK,
        "clean_up_tokenization_spaces": False,
    }


def _renamed(config: object, names: dict[str, str]) -> dict:
    """A dataclass as a dict with foreign keys; fields without one are left out."""
    return {names[name]: value for name, value in vars(config).items() if name in names}


def _json(record: dict) -> str:
    return json.dumps(record, indent=2, sort_keys=True) + "\n"
