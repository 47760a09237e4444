"""The engine: an item alone = among any others, order, budgets, and long items cut into windows."""

from concurrent.futures import ThreadPoolExecutor
from functools import partialmethod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import greedy_ids, random_features, small_model, write_hf

from parakeet_core import decode_audio, load_checkpoint
from parakeet_core import engine as module
from parakeet_core.device import device_failed
from parakeet_core.engine import Engine
from parakeet_core.inference import InferenceModel

COMPILE_LAYERS = InferenceModel.compile_layers


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return load_checkpoint(write_hf(tmp_path_factory.mktemp("checkpoint"), small_model(seed=11)))


@pytest.fixture(scope="module")
def engine(checkpoint):
    return Engine(checkpoint)


def items_of(lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
    return [random_features([length], seed=seed + index)[0][0] for index, length in enumerate(lengths)]


def assert_same_tokens(found, expected):
    assert found.ids.tolist() == expected.ids.tolist()
    assert found.starts.tolist() == expected.starts.tolist()
    assert found.ends.tolist() == expected.ends.tolist()
    np.testing.assert_allclose(found.scores, expected.scores, rtol=0, atol=1e-4)
    assert found.blank_ratio == pytest.approx(expected.blank_ratio)


@given(
    st.lists(st.integers(0, 200), max_size=7),
    st.sampled_from([0, 50, 400, 1e9]),
    st.integers(0, 99),
    st.randoms(use_true_random=False),
)
@settings(max_examples=40)
def test_alone_as_among_others(engine, lengths, budget, seed, random):
    items = items_of(lengths, seed)
    order = random.sample(range(len(items)), len(items))
    found = engine.recognise([items[index] for index in order], budget_frames=budget)
    assert len(found) == len(items)
    for tokens, index in zip(found, order, strict=True):
        (alone,) = engine.recognise([items[index]])
        assert_same_tokens(tokens, alone)


@torch.no_grad()
def test_as_the_plain_model(engine, checkpoint):
    items = items_of([1, 7, 8, 9, 64, 65, 200])
    for item, tokens in zip(items, engine.recognise(items), strict=True):
        logits, _ = checkpoint.model(item[None], torch.tensor([len(item)]))
        assert tokens.ids.tolist() == greedy_ids(logits[0], 128)


def test_compiled_layers_or_what_there_is(engine, checkpoint, monkeypatch, caplog):
    """A compiler that fails, as on a node without gcc, costs speed only."""
    items = items_of([120, 80, 40])

    def failing(*_):
        raise RuntimeError("no compiler here")

    for backend in ("eager", failing):
        monkeypatch.setattr(InferenceModel, "compile_layers", partialmethod(COMPILE_LAYERS, backend=backend))
        for tokens, expected in zip(
            Engine(checkpoint, compiled=True).recognise(items), engine.recognise(items), strict=True
        ):
            assert_same_tokens(tokens, expected)
        assert ("no compiler here" in caplog.text) == (backend is failing)


def test_threads_beside_each_other(engine):
    """As the job calls it on a GPU: every caller gets its own tokens, and all seconds are counted."""
    shards = [items_of([40 + 8 * shard, 200, 30, 90], seed=shard) for shard in range(6)]
    seconds = []
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda items: engine.recognise(items, 400, seconds.append), shards))
    for items, tokens in zip(shards, found, strict=True):
        for one, alone in zip(tokens, engine.recognise(items), strict=True):
            assert_same_tokens(one, alone)
    assert len(seconds) >= 2 * len(shards)
    assert min(seconds) > 0


def test_features_where_the_model_is(checkpoint, engine):
    """In the order of the waveforms, whatever their lengths; an empty waveform has no frames."""
    waveforms = [torch.randn(samples) for samples in (16000, 0, 3200, 8000, 400)]
    found = engine.extract_features(waveforms)
    steps = [2.0**-exponent for exponent in (15, 14, 13, 12, 11)]
    scaled = engine.extract_features([waveform / step for waveform, step in zip(waveforms, steps, strict=True)], steps)
    for features, again, waveform in zip(found, scaled, waveforms, strict=True):
        expected, _ = checkpoint.frontend([waveform])
        torch.testing.assert_close(features, expected[0], rtol=0, atol=0)
        torch.testing.assert_close(again, expected[0], rtol=0, atol=0)


def test_items_without_frames(engine):
    (tokens,) = engine.recognise(items_of([0]))
    assert [len(column) for column in (tokens.ids, tokens.starts, tokens.ends, tokens.scores)] == [0] * 4
    assert engine.recognise([]) == []


def test_float16_features(engine):
    """Features may arrive rounded, as a job sends them: they are widened, and the caller's are not changed."""
    items = [item.half() for item in items_of([120, 80])]
    widened = engine.recognise([item.float() for item in items])
    for tokens, expected in zip(engine.recognise(items), widened, strict=True):
        assert_same_tokens(tokens, expected)
    assert items[0].dtype == torch.float16


@pytest.fixture
def windows(monkeypatch):
    """Sets the sizes of windows, in feature frames."""

    def use(max_pass: int, window: int, context: int):
        monkeypatch.setattr(module, "MAX_PASS_FRAMES", max_pass)
        monkeypatch.setattr(module, "WINDOW_FRAMES", window)
        monkeypatch.setattr(module, "CONTEXT_FRAMES", context)

    return use


@pytest.mark.parametrize("length", [200, 201, 208, 319, 320, 321, 327, 328, 329, 480, 481, 1000, 1003])
def test_windows_of_a_model_that_sees_no_further(tmp_path, windows, length):
    """Without attention's output a frame depends only on its neighbours: windows must give what one pass gives.

    So every frame comes from one window, at its own place, and no seam adds or loses one.
    """
    model = small_model(seed=12)
    with torch.no_grad():
        for layer in model.encoder.layers:
            layer.self_attn.o_proj.weight.zero_()
    engine = Engine(load_checkpoint(write_hf(tmp_path, model)))
    items = items_of([length, 50, length + 40], seed=length)
    windows(10_000, 160, 96)
    expected = engine.recognise(items)
    windows(200, 160, 96)
    for tokens, one_pass in zip(engine.recognise(items), expected, strict=True):
        assert_same_tokens(tokens, one_pass)
    assert len(expected[0].ids) > 3


def test_sizes_of_windows_are_whole_encoder_frames():
    """At every subsampling factor that checkpoints have; otherwise seams would shift frames against each other."""
    for factor in (2, 4, 8, 16, 32):
        assert module.WINDOW_FRAMES % factor == 0
        assert module.CONTEXT_FRAMES % factor == 0
    assert module.WINDOW_FRAMES + 2 * module.CONTEXT_FRAMES <= module.MAX_PASS_FRAMES


def test_windows_on_speech(tiny_en, prompts, windows):
    """With attention, windows of 24 s give another text than one pass over 90 s, but no worse: WER 37.8 %, not 42.0 %.

    Both are bad because the model knows only single prompts, each normalised alone: for those its WER is 0.4 %.
    """
    checkpoint = load_checkpoint(tiny_en)
    engine = Engine(checkpoint)
    clips, pause = prompts[:24], np.zeros(8000, np.float32)
    waveform = np.concatenate([part for clip in clips for part in (decode_audio(clip.path), pause)])
    features, _ = checkpoint.frontend([waveform])
    words = " ".join(clip.text for clip in clips).split()
    windows(100_000, 2400, 400)
    (one_pass,) = engine.recognise([features[0]])
    windows(2400, 2400, 400)
    (cut,) = engine.recognise([features[0]])
    assert cut.ids.tolist() != one_pass.ids.tolist()  # it was cut
    assert edit_distance(cut.ids.tolist(), one_pass.ids.tolist()) <= 0.15 * len(one_pass.ids)  # measured 0.10
    errors = [edit_distance(checkpoint.tokenizer.decode(t.ids.tolist()).split(), words) for t in (cut, one_pass)]
    assert errors[0] <= errors[1] + 0.03 * len(words)


def test_features_that_do_not_fit_the_device_come_from_the_host(checkpoint):
    """A front end that runs out of memory on its first batch, whose features then come from the host, one by one."""
    engine = Engine(checkpoint)
    waveforms = [torch.randn(size, generator=torch.Generator().manual_seed(size)) for size in (4_000, 4_100, 16_000)]
    expected = engine.extract_features(waveforms, [0.5, 1.0, 2.0])
    whole, calls = engine.frontend, []

    def cramped(waveforms, device):
        calls.append(len(waveforms))
        if len(calls) == 1:
            raise torch.OutOfMemoryError("no room")
        return whole(waveforms, device)

    engine.frontend = cramped
    found = engine.extract_features(waveforms, [0.5, 1.0, 2.0])
    assert len(calls) > len(waveforms)
    for features, other in zip(found, expected, strict=True):
        assert torch.equal(features, other)


@pytest.mark.parametrize(
    ("error", "failed"),
    [
        (RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be ..."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"), False),
        (ValueError("CUDA error"), False),
    ],
)
def test_errors_of_the_device(error, failed):
    assert device_failed(error) == failed


def edit_distance(first: list, second: list) -> int:
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def test_batch_that_does_not_fit_is_halved_until_it_does(checkpoint, monkeypatch):
    """A model that runs out of memory above two items a batch, and always on one of the items."""
    engine = Engine(checkpoint)
    items = items_of([60, 61, 62, 63, 64, 65, 120])
    expected = engine.recognise(items)
    sizes, refused = [], []

    class Cramped(torch.nn.Module):
        def forward(self, features, lens, *flags):
            if len(features) > 2 or features.shape[1] >= 120:
                refused.append(len(features))
                raise torch.OutOfMemoryError("no room")
            sizes.append(len(features))
            return whole(features, lens, *flags)

    whole = engine.model
    engine.model = Cramped()
    found = engine.recognise(items, budget_frames=1e9)
    assert max(sizes) <= 2
    for tokens, alone in zip(found[:6], expected[:6], strict=True):
        assert_same_tokens(tokens, alone)
    assert found[6].kind == "out_of_memory"
    assert "1 s of audio" in found[6].message
    assert refused == [6, 3, 3, 1]
    for tokens, alone in zip(engine.recognise(items[:6]), expected[:6], strict=True):
        assert_same_tokens(tokens, alone)
    assert len(refused) == 4  # from then on it plans batches that fit
