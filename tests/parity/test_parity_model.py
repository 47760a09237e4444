"""Encoder states, logits, ids and position tables equal the reference's, on models that transformers wrote.

Every case goes through `save_pretrained` and our `load_checkpoint`. Differences are relative to the largest magnitude.
"""

import json

import pytest
import torch
from reference import load_reference, mask_of, random_reference, save_reference
from small_models import greedy_ids, random_features, relative_error

from parakeet_core import load_checkpoint
from parakeet_core.decoding import decode_greedy
from parakeet_core.encoder import relative_positions
from parakeet_core.engine import Engine

TOLERANCE = 1e-4  # DESIGN: logits within 1e-4 relative

SHAPES = {
    "biases": {},
    "no biases": {"attention_bias": False, "convolution_bias": False},
    "attention biases only": {"convolution_bias": False},
    "convolution biases only": {"attention_bias": False},
    "128 mels": {"num_mel_bins": 128},
    "kernel 5": {"conv_kernel_size": 5},
    "kernel 31, input not scaled": {"conv_kernel_size": 31, "scale_input": False},
    "128 mels, no biases, kernel 5, input not scaled": {
        "num_mel_bins": 128, "attention_bias": False, "convolution_bias": False, "conv_kernel_size": 5,
        "scale_input": False,
    },
    "three heads of 16": {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 96},
    "one head": {"num_attention_heads": 1},
    "four layers": {"num_hidden_layers": 4},
    "factor 4": {"subsampling_factor": 4},
    "factor 16, kernel 5": {"subsampling_factor": 16, "subsampling_conv_kernel_size": 5},
    "width of ctc-large": {
        "hidden_size": 512, "num_hidden_layers": 1, "num_attention_heads": 8, "intermediate_size": 2048,
        "subsampling_conv_channels": 256,
    },
    "width of ctc-0.6b and ctc-1.1b": {
        "hidden_size": 1024, "num_hidden_layers": 1, "num_attention_heads": 8, "intermediate_size": 4096,
        "subsampling_conv_channels": 256,
    },
}  # fmt: skip
# Around one, two and more encoder frames of 8; around a tile's length; and one item that fills the batch.
LENS = [211, 200, 129, 128, 127, 65, 64, 17, 16, 15, 9, 8, 7, 2, 1]


@pytest.fixture(scope="module", params=list(SHAPES), ids=lambda name: name.replace(" ", "-").replace(",", ""))
def models(request, tmp_path_factory):
    """The reference and our checkpoint for one of the shapes."""
    reference = random_reference(len(request.param), blank_bias=2.0, **SHAPES[request.param])
    return reference, load_checkpoint(save_reference(reference, tmp_path_factory.mktemp("checkpoint")))


@torch.no_grad()
def test_states_logits_and_ids(models):
    reference, ours = models
    encoder = ours.config.encoder
    features, lens = random_features(LENS, encoder.n_mels)
    mask = mask_of(lens, features.shape[1])
    theirs = reference.encoder(input_features=features, attention_mask=mask)
    their_logits = reference.ctc_head(theirs.last_hidden_state)

    states, out_lens = ours.model.encoder(features, lens)
    logits, logit_lens = ours.model(features, lens)
    fused_logits, fused_lens = ours.model.prepare_inference()(features, lens)

    assert out_lens.tolist() == theirs.attention_mask.sum(-1).tolist()
    assert out_lens.tolist() == logit_lens.tolist() == fused_lens.tolist()
    assert states.shape == theirs.last_hidden_state.shape
    for row, length in enumerate(out_lens.tolist()):
        assert relative_error(states[row, :length], theirs.last_hidden_state[row, :length]) <= TOLERANCE
        assert relative_error(logits[row, :length], their_logits[row, :length]) <= TOLERANCE
        assert relative_error(fused_logits[row, :length], their_logits[row, :length]) <= TOLERANCE
    their_ids = reference.generate(input_features=features, attention_mask=mask)
    blank = ours.config.blank_id
    expected = [_collapsed(row.tolist(), blank) for row in their_ids]
    assert [tokens.ids.tolist() for tokens in decode_greedy(logits, out_lens, blank)] == expected
    assert [tokens.ids.tolist() for tokens in decode_greedy(fused_logits, out_lens, blank)] == expected
    assert {token for row in expected for token in row}


def _collapsed(ids: list[int], blank: int) -> list[int]:
    return [token for i, token in enumerate(ids) if token != blank and (i == 0 or token != ids[i - 1])]


@torch.no_grad()
def test_engine(models):
    """The engine forms its own batches, sorted and exactly trimmed; the reference sees one item at a time."""
    reference, ours = models
    features, lens = random_features(LENS, ours.config.encoder.n_mels, seed=1)
    items = [row[:length] for row, length in zip(features, lens.tolist(), strict=True)]
    tokens = Engine(ours, budget_frames=300).recognise(items)
    for item, found in zip(items, tokens, strict=True):
        logits = reference(input_features=item[None], attention_mask=torch.ones(1, len(item), dtype=torch.bool)).logits
        assert found.ids.tolist() == greedy_ids(logits[0], ours.config.blank_id)


@torch.no_grad()
def test_every_length_alone(models):
    """8k-1, 8k, 8k+1 frames without padding, as for one item; the reference's tensor has one more, masked frame."""
    reference, ours = models
    if ours.config.encoder.d_model > 512:
        lengths = [8, 9, 16, 17]
    else:
        lengths = [1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65, 127, 128, 129]
    fused = ours.model.prepare_inference()
    for length in lengths:
        features, lens = random_features([length], ours.config.encoder.n_mels, seed=length)
        extended = torch.nn.functional.pad(features, (0, 0, 0, 1))
        theirs = reference(input_features=extended, attention_mask=mask_of(lens, length + 1)).logits
        for model in (ours.model, fused):
            logits, out_lens = model(features, lens)
            assert logits.shape[1] == int(out_lens)
            assert relative_error(logits, theirs[:, : int(out_lens)]) <= TOLERANCE


def test_state_names_are_those_of_the_reference(models):
    reference, ours = models
    theirs = reference.state_dict()
    assert {name: tensor.shape for name, tensor in ours.model.state_dict().items()} == {
        name: tensor.shape for name, tensor in theirs.items()
    }
    for name, tensor in ours.model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0)


@pytest.mark.parametrize(("frames", "width"), [(1, 32), (375, 1024), (5000, 160)])
def test_positions(frames, width):
    """Bit for bit: at 5000 frames another rounding of the same formula is off by 5e-4."""
    reference = random_reference(0, hidden_size=width, num_attention_heads=4, num_hidden_layers=1)
    theirs = reference.encoder.encode_positions(torch.zeros(1, frames, width))[0]
    torch.testing.assert_close(relative_positions(frames, width), theirs, rtol=0, atol=0)


@torch.no_grad()
def test_item_without_frames_in_a_batch(tmp_path):
    """Its output is empty, and its neighbours are not affected."""
    reference = random_reference(3)
    ours = load_checkpoint(save_reference(reference, tmp_path)).model
    features, lens = random_features([90, 0])
    theirs = reference(input_features=features, attention_mask=mask_of(lens, 90)).logits
    for model in (ours, ours.prepare_inference()):
        logits, out_lens = model(features, lens)
        assert out_lens.tolist() == [12, 0]
        assert logits.isfinite().all()
        assert relative_error(logits[0], theirs[0]) <= TOLERANCE
        assert decode_greedy(logits, out_lens, 128)[1].ids.tolist() == []


@torch.no_grad()
def test_defaults_of_keys_that_public_files_leave_out(tmp_path):
    """The 1.1b file omits convolution_bias; other keys that equal the reference's defaults may be absent too."""
    reference = random_reference(4, hidden_size=64, num_attention_heads=8)
    save_reference(reference, tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    defaults = (
        "convolution_bias", "attention_bias", "scale_input", "conv_kernel_size", "num_mel_bins", "subsampling_factor",
        "subsampling_conv_kernel_size", "subsampling_conv_stride", "num_attention_heads", "num_key_value_heads",
        "hidden_act",
    )  # fmt: skip
    for key in defaults:
        del content["encoder_config"][key]
    (tmp_path / "config.json").write_text(json.dumps(content))
    ours = load_checkpoint(tmp_path)
    model, _ = load_reference(tmp_path)
    features, lens = random_features([60, 40])
    theirs = model(input_features=features, attention_mask=mask_of(lens, 60)).logits
    logits, _ = ours.model(features, lens)
    assert relative_error(logits[0], theirs[0]) <= TOLERANCE


@torch.no_grad()
def test_half_precision_files_are_widened(tmp_path):
    reference = random_reference(5)
    features, lens = random_features([60, 40])
    for dtype in (torch.bfloat16, torch.float16):
        path = save_reference(reference.to(dtype), tmp_path / str(dtype))
        model, _ = load_reference(path)
        ours = load_checkpoint(path).model
        theirs = model(input_features=features, attention_mask=mask_of(lens, 60)).logits
        assert ours.ctc_head.weight.dtype == torch.float32
        assert relative_error(ours(features, lens)[0][0], theirs[0]) <= TOLERANCE
