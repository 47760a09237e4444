"""Both forms of the model: alone = in any padded batch, in any order, with any tile; plain = fused; edges, lengths."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import greedy_ids, random_features, relative_error, small_config, small_model

from parakeet_core import inference
from parakeet_core.config import EncoderConfig, ModelConfig
from parakeet_core.ctc import ParakeetCTC
from parakeet_core.encoder import shift_relative
from parakeet_core.errors import CheckpointError

ROUNDING = 2e-5  # relative: the effect of another order of float32 sums after two layers
SWITCHES = st.fixed_dictionaries(
    {
        "attention_bias": st.booleans(),
        "convolution_bias": st.booleans(),
        "scale_input": st.booleans(),
        "conv_kernel": st.sampled_from([5, 9, 31]),
        "subsampling_factor": st.sampled_from([4, 8]),
        "subsampling_kernel": st.sampled_from([3, 5]),
    }
)
LENGTHS = st.lists(st.integers(0, 150), min_size=1, max_size=5).filter(any)


def forms(model):
    return {"plain": model, "fused": model.prepare_inference()}


@torch.no_grad()
@given(LENGTHS, SWITCHES, st.integers(0, 2**16), st.randoms(use_true_random=False))
@settings(max_examples=30)
def test_alone_as_in_any_padded_batch_and_order(lengths, switches, seed, random):
    model = small_model(seed, **switches)
    features, lens = random_features(lengths, seed=seed)
    order = random.sample(range(len(lengths)), len(lengths))
    for form in forms(model).values():
        logits, out_lens = form(features, lens)
        shuffled, shuffled_lens = form(features[order], lens[order])
        for row, place in enumerate(sorted(range(len(order)), key=order.__getitem__)):
            alone, alone_len = form(features[row : row + 1, : lens[row]], lens[row : row + 1])
            frames = int(out_lens[row])
            assert int(alone_len) == int(shuffled_lens[place]) == frames == alone.shape[1]
            if not frames:
                continue
            assert relative_error(logits[row, :frames], alone[0]) <= ROUNDING
            assert relative_error(shuffled[place, :frames], alone[0]) <= ROUNDING
            assert greedy_ids(logits[row, :frames], 128) == greedy_ids(alone[0], 128)
            assert greedy_ids(shuffled[place, :frames], 128) == greedy_ids(alone[0], 128)


@torch.no_grad()
@given(LENGTHS, SWITCHES, st.integers(0, 2**16))
@settings(max_examples=30)
def test_fused_as_plain(lengths, switches, seed):
    model = small_model(seed, **switches)
    features, lens = random_features(lengths, seed=seed)
    expected, expected_lens = model(features, lens)
    logits, out_lens = model.prepare_inference()(features, lens)
    assert logits.shape == expected.shape
    assert out_lens.tolist() == expected_lens.tolist()
    for row, frames in enumerate(out_lens.tolist()):
        if frames:
            assert relative_error(logits[row, :frames], expected[row, :frames]) <= ROUNDING


@torch.no_grad()
def test_channels_that_hardly_vary():
    """BatchNorm's epsilon matters if a channel's variance is as small; otherwise omitting it would not be noticed."""
    model = small_model(1)
    for layer in model.encoder.layers:
        layer.conv.norm.running_var.fill_(1e-5)
    features, lens = random_features([90])
    assert relative_error(model.prepare_inference()(features, lens)[0], model(features, lens)[0]) <= ROUNDING


@torch.no_grad()
@pytest.mark.parametrize("form", ["plain", "fused"])
@pytest.mark.parametrize("garbage", [1e4, -1e4])
def test_frames_past_the_length_do_not_matter(form, garbage):
    model = forms(small_model())[form]
    features, lens = random_features([120, 77, 8, 0])
    clean, out_lens = model(features, lens)
    for row, length in zip(features, lens, strict=True):
        row[length:] = garbage
    dirty, _ = model(features, lens)
    for row, frames in enumerate(out_lens.tolist()):
        torch.testing.assert_close(dirty[row, :frames], clean[row, :frames], rtol=0, atol=0)
    assert dirty.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 2, 7, 8, 9, 16, 17, 63, 64, 65, 200])
@pytest.mark.parametrize(
    "options", [{}, {"subsampling_factor": 4, "subsampling_kernel": 5}, {"subsampling_factor": 16}]
)
def test_any_tile_of_the_subsampling(frames, options, monkeypatch):
    """From one encoder frame per tile to a single tile, with an item that ends inside a tile."""
    model = small_model(2, **options)
    features, lens = random_features([frames, max(frames - 9, 0), frames // 2])
    states, out_lens = model.encoder.subsampling(features, lens)
    scale = model.config.encoder.d_model**0.5
    tiled = model.prepare_inference().subsampling
    total = model.config.encoder.subsample(frames)
    monkeypatch.setattr(inference, "TILE_BYTES", 0)  # so that MIN_TILE_FRAMES decides
    for tile in {1, 2, 3, 5, max(total - 1, 1), total, total + 1}:
        monkeypatch.setattr(inference, "MIN_TILE_FRAMES", tile)
        found = tiled(features, lens)
        for row, length in enumerate(out_lens.tolist()):
            torch.testing.assert_close(found[row, :length], states[row, :length] * scale, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_tiles_of_the_real_size():
    model = small_model(3)
    features, lens = random_features([16000, 8000])
    first_convolution_bytes = lens[0] // 2 * model.config.encoder.subsampling_channels * 40 * 4
    assert first_convolution_bytes > 2 * inference.TILE_BYTES
    expected, out_lens = model(features, lens)
    logits, _ = model.prepare_inference()(features, lens)
    for row, frames in enumerate(out_lens.tolist()):
        assert relative_error(logits[row, :frames], expected[row, :frames]) <= ROUNDING


@torch.no_grad()
def test_position_tables_grow_and_stay_right():
    """A short batch after a long one uses the middle of the long one's table; a longer batch rebuilds the table."""
    model = small_model(4)
    fused = model.prepare_inference()
    for frames in (40, 8 * inference.POSITION_STEP + 8, 16, 1, 8 * inference.POSITION_STEP, 300):
        features, lens = random_features([frames], seed=frames)
        assert relative_error(fused(features, lens)[0], model(features, lens)[0]) <= ROUNDING


@torch.no_grad()
def test_reserved_positions_are_not_made_again():
    model = small_model(5)
    fused = model.prepare_inference()
    fused.reserve_positions(100)
    tables = [layer.attention.positions for layer in fused.layers]
    features, lens = random_features([800])
    assert relative_error(fused(features, lens)[0], model(features, lens)[0]) <= ROUNDING
    assert all(layer.attention.positions is table for layer, table in zip(fused.layers, tables, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("form", ["plain", "fused"])
@pytest.mark.parametrize("items", [0, 1, 3])
def test_batch_without_a_frame(form, items):
    model = forms(small_model())[form]
    logits, lens = model(torch.zeros(items, 0, 80), torch.zeros(items, dtype=torch.int64))
    assert logits.shape == (items, 0, 129)
    assert lens.tolist() == [0] * items


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(dtype):
    model = small_model(6)
    features, lens = random_features([200, 120])
    expected, out_lens = model(features, lens)
    for form in forms(small_model(6).to(dtype)).values():
        logits, _ = form(features.to(dtype), lens)
        assert logits.dtype == dtype
        for row, frames in enumerate(out_lens.tolist()):
            assert relative_error(logits[row, :frames].float(), expected[row, :frames]) <= 0.1


@torch.no_grad()
def test_padded_can_be_told():
    model = small_model(7).prepare_inference()
    features, lens = random_features([90, 90])
    expected, _ = model(features, lens)
    torch.testing.assert_close(model(features, lens, padded=False)[0], expected, rtol=0, atol=0)
    torch.testing.assert_close(model(features, lens, padded=True)[0], expected, rtol=0, atol=1e-4)


def test_plain_model_stays_usable_and_trainable_after_prepare():
    model = small_model(8)
    features, lens = random_features([64])
    before = model(features, lens)[0].detach()
    model.prepare_inference()(features, lens)
    torch.testing.assert_close(model(features, lens)[0].detach(), before, rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model(features, lens)[0].sum().backward()


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(0, 7))
@settings(max_examples=40)
def test_shift_relative_by_its_definition(queries, keys, heads, more):
    """The last `more` columns are not used."""
    scores = torch.randn(2, heads, queries, queries + keys - 1 + more)
    shifted = shift_relative(scores, keys) if more else shift_relative(scores)
    assert shifted.shape == (2, heads, queries, keys)
    for i in range(queries):
        for j in range(keys):
            torch.testing.assert_close(shifted[..., i, j], scores[..., i, queries - 1 - i + j], rtol=0, atol=0)


@pytest.mark.parametrize("lens", [[128], [129, 72], [8 * 97, 8 * 97, 8 * 60 + 3], [8 * 18, 8 * 18]])
@pytest.mark.parametrize("block", [16, inference.QUERY_BLOCK])
@pytest.mark.parametrize("multiple", [1, 8])
@torch.no_grad()
def test_attention_in_blocks_of_queries_with_aligned_rows(lens, block, multiple, monkeypatch):
    """Long items: as with all scores at once, whether or not blocks end with the item, and with rows aligned as on a
    GPU."""
    model = small_model(seed=5)
    features, lens = random_features(lens)
    expected, out_lens = model(features, lens)
    monkeypatch.setattr(inference, "QUERY_BLOCK", block)
    monkeypatch.setattr(inference, "row_multiple", lambda device: multiple)
    logits, _ = model.prepare_inference()(features, lens)
    for row, frames in enumerate(out_lens.tolist()):
        assert relative_error(logits[row, :frames], expected[row, :frames]) <= ROUNDING


@pytest.mark.parametrize(("frames", "encoder_frames"), [(0, 0), (1, 1), (8, 1), (9, 2), (16, 2), (17, 3), (3000, 375)])
def test_lengths_of_the_subsampling(frames, encoder_frames):
    config = EncoderConfig()
    assert config.subsample(frames) == encoder_frames
    assert config.subsample(torch.tensor([frames])).tolist() == [encoder_frames]


@pytest.mark.parametrize(
    "options",
    [
        {"d_model": 33},
        {"n_heads": 5},
        {"n_heads": 0},
        {"conv_kernel": 8},
        {"subsampling_kernel": 4},
        {"subsampling_factor": 6},
        {"subsampling_factor": 0},
        {"subsampling_factor": 1},
        {"subsampling_stride": 1},
        {"subsampling_stride": 0},
        {"d_model": 0},
        {"n_mels": 0},
        {"subsampling_channels": 0},
        {"d_ff": 0},
        {"conv_kernel": -1},
    ],
    ids=str,
)
def test_impossible_sizes_are_refused(options):
    with pytest.raises(CheckpointError):
        small_config(**{"mels": options.pop("n_mels")} if "n_mels" in options else options)


@pytest.mark.parametrize(
    "options", [{"blank_id": 129}, {"blank_id": -1}, {"loss_reduction": "median"}, {"vocab_size": 0}], ids=str
)
def test_impossible_heads_are_refused(options):
    with pytest.raises(CheckpointError):
        ModelConfig(**{"vocab_size": 129, "blank_id": 128} | options)


def test_initial_weights_train():
    """A fresh model has finite outputs and a finite loss, without randomise()."""
    model = ParakeetCTC(small_config())
    features, lens = random_features([64, 40])
    loss = model.loss(features, lens, torch.tensor([[1, 2], [3, 0]]), torch.tensor([2, 1]))
    assert loss.isfinite()
