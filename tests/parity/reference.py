"""The reference: transformers' Parakeet, as these tests build, save and run it."""

from pathlib import Path

import numpy as np
import torch
import transformers
from small_models import TINY_EN, VOCAB_SIZE, randomise
from transformers import (
    ParakeetCTCConfig,
    ParakeetEncoderConfig,
    ParakeetFeatureExtractor,
    ParakeetForCTC,
    ParakeetProcessor,
)

transformers.logging.set_verbosity_error()

RATE_HZ = 16000


def random_reference(seed: int, blank_bias: float = 0.0, **encoder) -> ParakeetForCTC:
    """A reference model with random weights, in eval mode; `encoder` are options of ParakeetEncoderConfig.

    Args:
        blank_bias: added to the blank's logit, so that greedy paths hold blanks as well.
    """
    sizes = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
        "subsampling_conv_channels": 16, "num_mel_bins": 80,
    } | encoder  # fmt: skip
    config = ParakeetCTCConfig(
        vocab_size=VOCAB_SIZE, pad_token_id=VOCAB_SIZE - 1, encoder_config=ParakeetEncoderConfig(**sizes)
    )
    model = randomise(ParakeetForCTC(config), seed)
    with torch.no_grad():
        model.ctc_head.bias[-1] += blank_bias
    return model


def save_reference(model: ParakeetForCTC, path: Path, **options) -> Path:
    """A checkpoint directory written by transformers alone, with the carried tokenizer."""
    model.save_pretrained(path, **options)
    carried = ParakeetProcessor.from_pretrained(TINY_EN)
    extractor = ParakeetFeatureExtractor(feature_size=model.config.encoder_config.num_mel_bins, sampling_rate=RATE_HZ)
    ParakeetProcessor(extractor, carried.tokenizer, decoder_type="ctc").save_pretrained(path)
    return path


def load_reference(path: Path) -> tuple[ParakeetForCTC, ParakeetProcessor]:
    """The reference of a directory, in float32 whatever its files say, in eval mode."""
    model = ParakeetForCTC.from_pretrained(path, dtype=torch.float32)
    return model.eval(), ParakeetProcessor.from_pretrained(path)


def extract(extractor: ParakeetFeatureExtractor, waveforms: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference's features [B, T, M] with their mask [B, T]."""
    out = extractor(waveforms, sampling_rate=RATE_HZ, return_tensors="pt")
    return out["input_features"], out["attention_mask"]


def mask_of(lens: torch.Tensor, frames: int) -> torch.Tensor:
    """The mask [B, frames] bool that the reference takes instead of lengths."""
    return torch.arange(frames) < lens[:, None]


@torch.no_grad()
def reference_texts(model: ParakeetForCTC, processor: ParakeetProcessor, waveforms: list[np.ndarray]) -> list[str]:
    """Texts by `generate` with the attention mask; the pipeline would decode padding too."""
    features, mask = extract(processor.feature_extractor, waveforms)
    ids = model.generate(input_features=features, attention_mask=mask)
    return processor.batch_decode(ids, skip_special_tokens=True)
