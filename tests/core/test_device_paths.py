"""What a GPU runs, on a device that has shapes but no values ("meta").

An operation that took a tensor from another device, or made the host wait for a value, would raise. Numbers and kernels
are not checked here: that takes a GPU.
"""

import pytest
import torch
from small_models import small_model

from parakeet_core.config import FrontendConfig
from parakeet_core.decoding import score_frames
from parakeet_core.features import LogMelFrontend

META = torch.device("meta")


def test_values_are_out_of_reach():
    """What the tests below rely on."""
    numbers = torch.zeros(3, device=META)
    with pytest.raises(RuntimeError):
        numbers.max().item()
    with pytest.raises(RuntimeError):
        numbers + torch.zeros(3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("frames", "padded"), [(400, False), (400, True), (5000, True)])
def test_model_to_scores(dtype, frames, padded):
    """As a batch with padding and as one without; 5,000 frames go through attention in blocks of queries."""
    model = small_model(n_layers=2)
    config, subsample = model.config, model.config.encoder.subsample
    model = model.to(META, dtype).prepare_inference()
    features = torch.zeros(3, frames, config.encoder.n_mels, dtype=dtype, device=META)
    logits, lens = model(features, torch.full((3,), frames, device=META), padded)
    assert logits.shape == (3, subsample(frames), config.vocab_size)
    assert logits.dtype == dtype
    scored = score_frames(logits, lens, config.blank_id)
    assert {tensor.device for tensor in (scored.ids, scored.scores, scored.lens)} == {META}
    assert scored.ids.shape == (3, subsample(frames))


@pytest.mark.parametrize("frames", [1, 2, 125, 255, 256, 257, 512])
def test_positions_have_whole_rows(frames):
    """A GPU's fast products take rows whose length and address are multiples of 16 bytes."""
    model = small_model(n_layers=1).to(META, torch.bfloat16).prepare_inference()
    model.reserve_positions(frames)
    for table in model.layers[0].attention.position_window(frames):
        assert table.shape[-1] >= 2 * frames - 1
        assert table.shape[-1] % 8 == 0
        assert table.is_contiguous()
        assert table.storage_offset() == 0


def test_features():
    config = FrontendConfig()
    features, lens = LogMelFrontend(config)([torch.zeros(size, device=META) for size in (16_000, 8_000, 100)], META)
    assert features.shape == (3, config.frames(16_000), config.n_mels)
    assert features.device == lens.device == META
