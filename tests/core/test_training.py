"""Training mode: dropout is random, gradients reach every parameter, and a model can learn a batch by heart."""

import dataclasses

import pytest
import torch
from small_models import greedy_ids, random_features, randomise, small_config

from parakeet_core.ctc import ParakeetCTC
from parakeet_core.training import build_optimiser

NO_DROPOUT = {
    "dropout": 0.0, "dropout_positions": 0.0, "activation_dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0,
}  # fmt: skip
TARGETS, TARGET_LENS = torch.tensor([[5, 7, 7, 1], [2, 9, 0, 0]]), torch.tensor([4, 2])


def model_with(**rates) -> ParakeetCTC:
    config = small_config(n_layers=3)
    encoder = dataclasses.replace(config.encoder, **NO_DROPOUT | rates)
    return randomise(ParakeetCTC(dataclasses.replace(config, encoder=encoder)), 1)


def loss_of(model: ParakeetCTC) -> torch.Tensor:
    features, lens = random_features([120, 80])
    return model.loss(features, lens, TARGETS, TARGET_LENS)


def freeze_statistics(model: ParakeetCTC) -> ParakeetCTC:
    """Training mode, but BatchNorm uses its running statistics, so that calls differ only by dropout."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.eval()
    return model


@pytest.mark.parametrize("rate", list(NO_DROPOUT))
def test_each_rate_acts_in_training_alone(rate):
    model = freeze_statistics(model_with(**{rate: 0.5}))
    torch.manual_seed(0)
    losses = {loss_of(model).item() for _ in range(8)}
    assert len(losses) > 1
    model.eval()
    assert len({loss_of(model).item() for _ in range(3)}) == 1


def test_without_rates_training_is_deterministic():
    model = freeze_statistics(model_with())
    assert loss_of(model).item() == loss_of(model).item() == loss_of(model.eval()).item()


@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 1e-5), (True, 0.02)])
def test_subsampling_on_a_cpu_as_its_layers_one_after_another(autocast, tolerance):
    """States and gradients; in bfloat16 within its rounding."""
    subsampling = model_with().encoder.subsampling
    features, lens = random_features([120, 120])
    expected = features[:, None]
    for layer in subsampling.layers:
        expected = layer(expected)
    expected = subsampling.linear(expected.transpose(1, 2).flatten(-2))
    expected_gradients = torch.autograd.grad(expected.square().mean(), subsampling.parameters())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        states, _ = subsampling(features, lens)
    states.float().square().mean().backward()
    gradients = [parameter.grad for parameter in subsampling.parameters()]
    for found, wanted in zip((states.float(), *gradients), (expected, *expected_gradients), strict=True):
        assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("rates", [{}, {"dropout": 0.1, "attention_dropout": 0.1, "layerdrop": 0.4}], ids=str)
def test_gradients_reach_every_parameter(rates):
    """In every step, whichever layers are dropped: data-parallel training waits for all of them."""
    model = model_with(**rates).train()
    torch.manual_seed(1)
    seen = set()
    for _ in range(8):
        model.zero_grad()
        loss_of(model).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            if parameter.grad.any():
                seen.add(name)
    assert seen == {name for name, _ in model.named_parameters()}


def test_layerdrop_leaves_out_whole_layers_at_its_rate():
    model = freeze_statistics(model_with(layerdrop=0.3))
    dropped = 0
    for seed in range(100):
        torch.manual_seed(seed)
        model.zero_grad()
        loss_of(model).backward()
        dropped += sum(not layer.norm_out.weight.grad.any() for layer in model.encoder.layers)
    assert 60 <= dropped <= 120  # 90 of 300 expected; the seeds are fixed


def test_batch_norm_learns_its_statistics_in_training_alone():
    model = model_with()
    norm = model.encoder.layers[0].conv.norm
    before = norm.running_mean.clone()
    loss_of(model.eval())
    torch.testing.assert_close(norm.running_mean, before, rtol=0, atol=0)
    loss_of(model.train())
    assert (norm.running_mean != before).any()
    assert int(norm.num_batches_tracked) == 1


def test_weight_decay_is_of_matrices_and_kernels_alone():
    model = model_with()
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    optimiser = build_optimiser(model, 0.5)
    for group in optimiser.param_groups:
        group["lr"] = 0.1
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    shrunk = {name for name, tensor in model.named_parameters() if (tensor != before[name]).any()}
    assert shrunk == {name for name in before if name.endswith("weight") and "norm" not in name}


def test_learns_a_batch_by_heart():
    """The whole loop: loss, gradients, steps, eval, and the inference form of the trained model."""
    torch.manual_seed(0)
    model = ParakeetCTC(small_config(n_layers=1, **NO_DROPOUT)).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    features, lens = random_features([120, 80])
    first = loss_of(model).item()
    for _ in range(150):
        optimiser.zero_grad()
        loss_of(model).backward()
        optimiser.step()
    assert loss_of(model).item() < 0.02 * first
    with torch.no_grad():
        for _ in range(50):  # the running statistics catch up with the last weights
            model(features, lens)
        model.eval()
        for form in (model, model.prepare_inference()):
            logits, out_lens = form(features, lens)
            for row, target in enumerate([[5, 7, 7, 1], [2, 9]]):
                assert greedy_ids(logits[row, : out_lens[row]], 128) == target
