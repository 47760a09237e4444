"""torch.compile takes both forms as one graph, without a break, and gives the same results as uncompiled.

The backend traces and differentiates but does not generate code, which would take minutes.
"""

import copy

import pytest
import torch
from small_models import random_features, relative_error, small_model

from parakeet_core.engine import CONTEXT_FRAMES, WARM_UP, WINDOW_FRAMES
from parakeet_core.inference import LONGEST_COMPILED

BACKEND = "aot_eager"
EXACT = 1e-5  # relative: the backends here run the same operations; their order within a fused one may differ


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def assert_same(compiled, model, cases, *flags):
    for lens in cases:
        features, lens = random_features(lens, seed=len(lens))
        with torch.no_grad():
            expected, expected_lens = model(features, lens, *flags)
            logits, out_lens = compiled(features, lens, *flags)
        assert out_lens.tolist() == expected_lens.tolist()
        for row, frames in enumerate(out_lens.tolist()):
            assert relative_error(logits[row, :frames], expected[row, :frames]) <= EXACT


def test_plain_form():
    """Two shapes, the second of which makes the compiler treat shapes as symbols."""
    model = small_model(n_layers=1)
    assert_same(torch.compile(model, fullgraph=True, backend=BACKEND), model, [[64, 40], [120, 97, 8]])


@pytest.mark.parametrize("padded", [True, False])
def test_inference_form(padded):
    model = small_model(n_layers=1).prepare_inference()
    model.reserve_positions(32)
    compiled = torch.compile(model, fullgraph=True, backend=BACKEND)
    assert_same(compiled, model, [[64, 40]] if padded else [[64, 64]], padded)


def test_layers_for_any_shape():
    """After the engine's warm-up nothing more is compiled, whatever a batch's number of items and frames."""
    model = small_model(n_layers=2).prepare_inference()
    compiled = copy.deepcopy(model)
    compiled.compile_layers(backend=BACKEND)
    assert_same(compiled, model, WARM_UP)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 10
    assert_same(compiled, model, [[203], [64, 64], [700, 640, 633, 99], [81, 80, 79, 78, 77, 9], [5200, 4100]])
    assert_same(compiled, model, [[1], [8], [8, 8], [16, 9], [17], [24, 17], [24, 24], [2041], [4096, 4096], [4097]])
    window = WINDOW_FRAMES + 2 * CONTEXT_FRAMES
    assert model.config.encoder.subsample(window) == LONGEST_COMPILED
    assert_same(compiled, model, [[window], [window, window - 8], [window + 1]])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_gradients_of_a_training_step():
    """Dropout rates are zero, so that both steps are the same."""
    model = small_model(n_layers=1, dropout=0.0, activation_dropout=0.0, attention_dropout=0.0, layerdrop=0.0).train()
    features, lens = random_features([64, 40])

    def gradients(forward) -> dict[str, torch.Tensor]:
        model.zero_grad()
        logits, out_lens = forward(features, lens)
        valid = torch.arange(logits.shape[1]) < out_lens[:, None]
        (logits.log_softmax(-1)[valid] ** 2).mean().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients(model)
    found = gradients(torch.compile(model, fullgraph=True, backend=BACKEND))
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6 * largest, msg=name)


def test_training_with_every_rate_is_one_graph():
    model = small_model(n_layers=2, dropout_positions=0.1).train()  # the other dropout rates are 0.1 by default
    features, lens = random_features([64, 40])
    logits, _ = torch.compile(model, fullgraph=True, backend=BACKEND)(features, lens)
    logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
