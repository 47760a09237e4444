"""parakeet_core/quantised.py: linears in 8-bit integers, and a model that runs them."""

import dataclasses

import numpy as np
import pytest
import torch
from small_models import random_features, small_model, write_hf
from torch import nn

from parakeet_core import Transcriber, load_checkpoint
from parakeet_core import checkpoint as checkpoint_module
from parakeet_core.engine import Engine
from parakeet_core.errors import ConfigError
from parakeet_core.quantised import QuantisedLinear, processor_multiplies_bytes

needs_instructions = pytest.mark.skipif(not processor_multiplies_bytes(), reason="this processor has no VNNI or AMX")


def linear(width: int, out: int, bias: bool, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(width + out)
    return nn.Linear(width, out, bias).to(dtype).requires_grad_(False)


def by_definition(plain: nn.Linear, states: torch.Tensor) -> torch.Tensor:
    """What the module docstring says: integers as float32 rounds them, products and sums in float64."""
    of_channel = plain.weight.abs().amax(1) / 127
    of_row = states.abs().amax(-1, keepdim=True) / 127
    weight = (plain.weight / of_channel[:, None]).round().double()
    rows = torch.where(of_row > 0, states * (1 / of_row), 0.0).round().double()
    return rows @ weight.T * of_channel.double() * of_row.double() + (0 if plain.bias is None else plain.bias.double())


@needs_instructions
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("width", "out"), [(160, 640), (33, 7), (1024, 129)])
def test_equals_the_definition(width, out, bias):
    plain = linear(width, out, bias)
    states = torch.randn(3, 11, width) * torch.logspace(-3, 3, 11)[:, None]
    states[1, 4] = 0.0
    found = QuantisedLinear(plain)(states)
    assert (found.shape, found.dtype) == ((3, 11, out), torch.float32)
    torch.testing.assert_close(found.double(), by_definition(plain, states), rtol=1e-4, atol=1e-4)


@needs_instructions
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.01), (torch.bfloat16, 0.015)])
def test_is_near_the_plain_linear(dtype, tolerance):
    plain = linear(256, 300, bias=True, dtype=dtype)
    states = torch.randn(64, 256).to(dtype)
    expected = plain.float()(states.float())
    error = (QuantisedLinear(plain)(states).float() - expected).norm() / expected.norm()
    assert error < tolerance


@needs_instructions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_hangs_on_no_other(dtype):
    quantised = QuantisedLinear(linear(96, 64, bias=True, dtype=dtype))
    states = (torch.randn(50, 96) * torch.logspace(-2, 2, 50)[:, None]).to(dtype)
    together = quantised(states)
    for row in (0, 17, 49):
        assert torch.equal(quantised(states[row]), together[row])


@needs_instructions
def test_an_item_alone_as_among_others(tmp_path):
    folder = write_hf(tmp_path, small_model(seed=3))
    engine = Engine(load_checkpoint(folder, "int8"))
    assert sum(isinstance(module, QuantisedLinear) for module in engine.model.modules()) == 8 * len(engine.model.layers)
    items = [random_features([length], seed=length)[0][0] for length in (90, 40, 170, 8, 300)]
    for item, tokens in zip(items, engine.recognise(items, budget_frames=1e9), strict=True):
        (alone,) = engine.recognise([item])
        assert tokens.ids.tolist() == alone.ids.tolist()
        np.testing.assert_allclose(tokens.scores, alone.scores, rtol=0, atol=0.02)  # attention is in bfloat16


@needs_instructions
def test_texts_stay_near_those_of_float32(tiny_en, prompts):
    paths = [prompt.path for prompt in prompts]
    expected = [item.text for item in Transcriber.load(tiny_en).transcribe(paths)]
    found = [item.text for item in Transcriber.load(tiny_en, dtype="int8").transcribe(paths)]
    changed = sum(text != other for text, other in zip(found, expected, strict=True))
    assert changed <= len(paths) // 8  # measured: 2 of 44
    assert all(found)


def test_refused_where_it_cannot_run(tmp_path, monkeypatch):
    folder = write_hf(tmp_path, small_model(seed=3))
    monkeypatch.setattr(checkpoint_module, "processor_multiplies_bytes", lambda: False)
    with pytest.raises(ConfigError, match="int8: this processor has none of avx512_vnni"):
        load_checkpoint(folder, "int8")
    monkeypatch.setattr(checkpoint_module, "resolve_device", torch.device)
    with pytest.raises(ConfigError, match="for CPUs"):
        load_checkpoint(folder, "int8", "cuda")


def test_other_dtypes_are_not_quantised(tmp_path):
    loaded = load_checkpoint(write_hf(tmp_path, small_model(seed=3)), "bfloat16")
    assert not loaded.int8
    engine = Engine(dataclasses.replace(loaded))
    assert not any(isinstance(module, QuantisedLinear) for module in engine.model.modules())
