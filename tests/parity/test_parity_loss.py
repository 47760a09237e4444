"""CTC loss and the gradients of every parameter equal the reference's, with dropout off and BatchNorm in both modes."""

import pytest
import torch
from reference import mask_of, random_reference, save_reference
from small_models import VOCAB_SIZE, random_features

from parakeet_core import load_checkpoint
from parakeet_core.ctc import ctc_loss

BLANK = VOCAB_SIZE - 1
LOSS_TOLERANCE = 1e-5  # relative
GRADIENT_TOLERANCE = 1e-4  # relative to a parameter's largest gradient
# Share of the model's largest gradient. Some are only rounding: of a bias before BatchNorm, of the bias of the keys.
GRADIENT_FLOOR = 1e-6
NO_DROPOUT = {
    "dropout": 0.0, "dropout_positions": 0.0, "activation_dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0,
}  # fmt: skip
SHAPES = {
    "biases": {},
    "no biases, 128 mels": {"attention_bias": False, "convolution_bias": False, "num_mel_bins": 128},
    "kernel 31, input not scaled": {"conv_kernel_size": 31, "scale_input": False},
    "three layers, three heads": {"hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 3},
}
LENS = [160, 131, 64, 9, 33]


def batch(mels: int = 80) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features and lens, targets and target lens; the fourth item has more tokens than frames."""
    features, lens = random_features(LENS, mels)
    target_lens = torch.tensor([9, 5, 1, 4, 0])
    targets = torch.randint(0, BLANK, (5, 9), generator=torch.Generator().manual_seed(7))
    targets[0, 3] = targets[0, 2]  # a repeat, which needs a blank in between
    return features, lens, targets, target_lens


def labels_of(targets: torch.Tensor, target_lens: torch.Tensor, fill: int) -> torch.Tensor:
    return torch.where(mask_of(target_lens, targets.shape[1]), targets, fill)


@pytest.mark.parametrize("fill", [-100, BLANK])
@pytest.mark.parametrize("zero_infinity", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@torch.no_grad()
def test_reductions_and_impossible_targets(tmp_path, reduction, zero_infinity, fill):
    """The checkpoint's own reduction and zero_infinity are used unless the call names others."""
    reference = random_reference(1)
    reference.config.ctc_loss_reduction, reference.config.ctc_zero_infinity = reduction, zero_infinity
    ours = load_checkpoint(save_reference(reference, tmp_path)).model
    features, lens, targets, target_lens = batch()
    theirs = reference(
        input_features=features, attention_mask=mask_of(lens, 160), labels=labels_of(targets, target_lens, fill)
    ).loss
    loss = ours.loss(features, lens, targets, target_lens)
    torch.testing.assert_close(loss, theirs, rtol=LOSS_TOLERANCE, atol=0)
    padded = labels_of(targets, target_lens, fill)  # the reference's form of targets is accepted too
    torch.testing.assert_close(ours.loss(features, lens, padded, torch.full((5,), 9)), loss, rtol=0, atol=0)
    assert bool(loss.isfinite().all()) == zero_infinity
    assert loss.shape == ((5,) if reduction == "none" else ())


@torch.no_grad()
def test_call_overrides_the_checkpoint(tmp_path):
    reference = random_reference(1)
    ours = load_checkpoint(save_reference(reference, tmp_path)).model
    features, lens, targets, target_lens = batch()
    logits, out_lens = ours(features, lens)
    for reduction in ("mean", "sum", "none"):
        for zero_infinity in (True, False):
            expected = ctc_loss(logits, out_lens, targets, target_lens, BLANK, reduction, zero_infinity)
            found = ours.loss(features, lens, targets, target_lens, reduction, zero_infinity)
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("zero_infinity", [True, False])
@pytest.mark.parametrize("batch_norm", ["running statistics", "batch statistics"])
@pytest.mark.parametrize("shape", list(SHAPES), ids=lambda name: name.replace(" ", "-").replace(",", ""))
def test_gradients(tmp_path, shape, batch_norm, zero_infinity):
    reference = random_reference(2, **SHAPES[shape], **NO_DROPOUT)
    reference.config.ctc_zero_infinity = zero_infinity
    ours = load_checkpoint(save_reference(reference, tmp_path)).model
    features, lens, targets, target_lens = batch(SHAPES[shape].get("num_mel_bins", 80))
    if not zero_infinity:
        target_lens[3] = 2  # else every gradient is infinite
    for model in (reference, ours):
        model.train()
        if batch_norm == "running statistics":
            for module in model.modules():
                if isinstance(module, torch.nn.BatchNorm1d):
                    module.eval()
    theirs = reference(
        input_features=features, attention_mask=mask_of(lens, 160), labels=labels_of(targets, target_lens, -100)
    ).loss
    loss = ours.loss(features, lens, targets, target_lens)
    torch.testing.assert_close(loss, theirs, rtol=LOSS_TOLERANCE, atol=0)
    theirs.backward()
    loss.backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    found = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert found.keys() == expected.keys()
    floor = GRADIENT_FLOOR * max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        bound = GRADIENT_TOLERANCE * float(gradient.abs().max()) + floor
        assert float((found[name] - gradient).abs().max()) <= bound, name
    if batch_norm == "batch statistics":
        for name, buffer in reference.named_buffers():
            if name.endswith(("running_mean", "running_var", "num_batches_tracked")):
                torch.testing.assert_close(dict(ours.named_buffers())[name], buffer, rtol=1e-5, atol=1e-6)
