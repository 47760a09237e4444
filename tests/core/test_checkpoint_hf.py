"""Hugging Face directories: forms of files, dtypes, digest, and refusals that name all faults in one message."""

import hashlib
import json
import re
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import TINY_EN, edit_json, random_features, relative_error, small_model, write_hf, write_json

from parakeet_core import load_checkpoint
from parakeet_core.checkpoint_hf import read_encoder_config
from parakeet_core.errors import CheckpointError


@pytest.fixture(scope="module")
def model():
    return small_model(seed=3)


@pytest.fixture
def directory(tmp_path, model):
    return write_hf(tmp_path / "checkpoint", model)


def refusal(path, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, **options)
    return str(caught.value)


def assert_same_weights(loaded, model, dtype=torch.float32):
    stored = model.state_dict()
    found = loaded.state_dict()
    assert found.keys() == stored.keys()
    for name, tensor in found.items():
        assert not tensor.is_meta
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(tensor, stored[name].to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_one_file_or_shards(tmp_path, model, shards):
    checkpoint = load_checkpoint(write_hf(tmp_path, model, shards))
    assert_same_weights(checkpoint.model, model)
    assert checkpoint.config == model.config
    assert not checkpoint.model.training
    assert all(parameter.requires_grad for parameter in checkpoint.model.parameters())


def test_carried_checkpoint(tiny_en):
    """Float16 on disk, float32 when loaded."""
    checkpoint = load_checkpoint(tiny_en)
    assert checkpoint.config.vocab_size == 129
    assert {parameter.dtype for parameter in checkpoint.model.parameters()} == {torch.float32}
    assert checkpoint.tokenizer.decode(checkpoint.tokenizer.encode("please hold")) == "please hold"


@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_dtype_of_file_in_any_dtype(tmp_path, model, stored, loaded):
    tensors = {name: tensor.to(stored) for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    checkpoint = load_checkpoint(write_hf(tmp_path, model, tensors=tensors), dtype=loaded)
    for name, tensor in checkpoint.model.state_dict().items():
        if name in tensors:
            torch.testing.assert_close(tensor, tensors[name].to(loaded), rtol=0, atol=0)


def test_dtype_by_name(directory):
    assert load_checkpoint(directory, dtype="bfloat16").model.ctc_head.weight.dtype == torch.bfloat16
    for wrong in ("float64", torch.float64, "int4", torch.int8):
        assert "expected one of float32, bfloat16, float16" in refusal(directory, dtype=wrong)


def test_front_end_in_the_flat_older_form(directory, model):
    (directory / "processor_config.json").unlink()
    write_json(directory / "preprocessor_config.json", {"feature_size": 80, "hop_length": 160, "preemphasis": 0.9})
    frontend = load_checkpoint(directory).config.frontend
    assert (frontend.n_mels, frontend.preemphasis, frontend.n_fft) == (80, 0.9, 512)


def test_nested_form_is_preferred(directory):
    write_json(directory / "preprocessor_config.json", {"feature_size": 80, "preemphasis": 0.9})
    assert load_checkpoint(directory).config.frontend.preemphasis == 0.97


def test_preemphasis_can_be_off(directory):
    """The reference applies no filter if the value is null."""
    write_json(directory / "processor_config.json", {"feature_extractor": {"feature_size": 80, "preemphasis": None}})
    assert load_checkpoint(directory).config.frontend.preemphasis == 0.0


def test_sentencepiece_model_in_place_of_the_json(directory):
    (directory / "tokenizer.json").unlink()
    shutil.copyfile(TINY_EN / "tokenizer.model", directory / "tokenizer.model")
    assert load_checkpoint(directory).tokenizer.decode([1, 2]) is not None


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({}, "no encoder"),
        ({"feature_extractor": {"feature_size": 80}}, "no encoder"),
        ({"encoder_config": None}, "no encoder"),
        ({"encoder_config": {"hidden_size": 32, "hidden_act": "relu"}}, "activation 'relu'"),
        ({"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}, "2 key-value heads"),
    ],
    ids=str,
)
def test_encoder_to_train_from_random_weights(tmp_path, content, named):
    """Alone or in a whole config.json; a file of another kind must not become the default model of 0.6 billion."""
    good = {"hidden_size": 32, "num_attention_heads": 4}
    for form in (good, {"encoder_config": good}):
        write_json(tmp_path / "config.json", form)
        assert read_encoder_config(tmp_path / "config.json").d_model == 32
    write_json(tmp_path / "config.json", content)
    with pytest.raises(CheckpointError, match=named):
        read_encoder_config(tmp_path / "config.json")


def test_only_a_blank_that_is_last_needs_no_piece(directory):
    edit_json(directory / "config.json", {"pad_token_id": 0})
    assert load_checkpoint(directory).config.blank_id == 0  # 129 pieces
    (directory / "tokenizer.json").unlink()
    shutil.copyfile(TINY_EN / "tokenizer.model", directory / "tokenizer.model")
    assert "expected 129 pieces" in refusal(directory)


def test_kernel_is_taken_from_the_weights(tmp_path):
    model = small_model(conv_kernel=31)
    path = write_hf(tmp_path, model)
    edit_json(path / "config.json", {"encoder_config.conv_kernel_size": None})
    assert load_checkpoint(path).config.encoder.conv_kernel == 31


def test_digest_is_that_of_sha256sum(tmp_path, model):
    path = write_hf(tmp_path / "one", model)
    printed = subprocess.run(["sha256sum", "model.safetensors"], cwd=path, capture_output=True, text=True, check=True)
    assert load_checkpoint(path).digest == printed.stdout.split()[0]


def test_digest_of_shards_is_over_their_sums(tmp_path, model):
    path = write_hf(tmp_path / "shards", model, shards=3)
    files = sorted(file.name for file in path.glob("*.safetensors"))
    printed = subprocess.run(["sha256sum", *files], cwd=path, capture_output=True, check=True).stdout
    assert load_checkpoint(path).digest == hashlib.sha256(printed).hexdigest()


def test_files_beside_the_weights_are_those_that_were_read(directory):
    shutil.copy(TINY_EN / "tokenizer.model", directory)  # tokenizer.json takes precedence
    before = load_checkpoint(directory).source.files
    assert list(before) == ["config.json", "processor_config.json", "tokenizer.json"]
    for name in before:
        printed = subprocess.run(["sha256sum", directory / name], capture_output=True, text=True, check=True)
        assert before[name] == printed.stdout.split()[0]
    (directory / "tokenizer.json").unlink()
    assert list(load_checkpoint(directory).source.files) == ["config.json", "processor_config.json", "tokenizer.model"]


def test_weights_are_not_written_by_training(directory, model):
    """The mapping is private: a training step on the loaded model leaves the file unchanged."""
    before = (directory / "model.safetensors").read_bytes()
    loaded = load_checkpoint(directory).model
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1.0)
    assert (directory / "model.safetensors").read_bytes() == before
    assert_same_weights(load_checkpoint(directory).model, model)


def test_every_wrong_tensor_is_named_in_one_message(directory, model):
    tensors = load_file(directory / "model.safetensors")
    del tensors["ctc_head.bias"], tensors["encoder.layers.1.norm_out.weight"]
    tensors["encoder.layers.0.self_attn.bias_u"] = torch.zeros(4, 9)
    tensors["encoder.layers.0.extra.weight"] = torch.zeros(3)
    save_file(tensors, directory / "model.safetensors")
    message = refusal(directory)
    assert "2 missing: encoder.layers.1.norm_out.weight, ctc_head.bias" in message
    assert "1 unexpected: encoder.layers.0.extra.weight" in message
    assert "1 misshapen: encoder.layers.0.self_attn.bias_u (found [4, 9], expected [4, 8])" in message
    assert str(directory) in message


def test_long_lists_are_cut(directory):
    tensors = load_file(directory / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "feed_forward" not in name}
    message = refusal(write_hf(directory, small_model(seed=3, n_layers=6), tensors=tensors))
    assert "4 layers" in message or "6 layers" in message
    message = refusal(write_hf(directory, small_model(seed=3), tensors=kept))
    assert re.search(r"24 missing: .* and 4 more", message)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool], ids=str)
def test_weights_that_are_not_floats_are_refused(directory, dtype):
    """A quantised checkpoint would load as noise."""
    tensors = load_file(directory / "model.safetensors")
    tensors["ctc_head.weight"] = tensors["ctc_head.weight"].to(dtype)
    save_file(tensors, directory / "model.safetensors")
    assert f"ctc_head.weight holds {dtype}" in refusal(directory)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "parakeet_tdt"}, ["model_type 'parakeet_tdt'"]),
        ({"encoder_config": None}, ["model_type 'parakeet_ctc'", "encoder_config"]),
        ({"encoder_config.hidden_act": "gelu"}, ["activation 'gelu'"]),
        ({"encoder_config.num_key_value_heads": 2}, ["2 key-value heads for 4 heads"]),
        (
            {"encoder_config.hidden_act": "relu", "encoder_config.num_key_value_heads": 1},
            ["activation 'relu'", "1 key-value heads"],
        ),
        ({"encoder_config.num_hidden_layers": 3}, ["3 layers", "hold 2"]),
        (
            {"encoder_config.hidden_size": "32", "encoder_config.intermediate_size": 64.5},
            ["hidden_size is '32' (expected int of 0 or more)", "intermediate_size is 64.5"],
        ),
        ({"encoder_config.num_attention_heads": 0, "encoder_config.num_key_value_heads": 0}, ["n_heads is 0"]),
        ({"encoder_config.num_attention_heads": 5, "encoder_config.num_key_value_heads": 5}, ["5 heads"]),
        ({"encoder_config.hidden_size": -32}, ["hidden_size is -32"]),
        ({"encoder_config.subsampling_conv_stride": 1}, ["stride 1"]),
        ({"encoder_config.subsampling_factor": 12}, ["factor 12"]),
        ({"encoder_config.attention_bias": "yes"}, ["attention_bias is 'yes' (expected bool)"]),
        ({"encoder_config.num_mel_bins": 128}, ["128 mel bins", "80"]),
        ({"pad_token_id": 500}, ["blank id 500"]),
        ({"ctc_loss_reduction": "median"}, ["'median'"]),
        ({"ctc_zero_infinity": "false"}, ["ctc_zero_infinity is 'false' (expected bool)"]),
        ({"vocab_size": 200}, ["129 pieces", "200 outputs"]),
        ({"encoder_config.attention_bias": False}, ["unexpected", "linear1.bias"]),
        ({"encoder_config.intermediate_size": 128}, ["misshapen", "expected [128, 32]"]),
    ],
    ids=str,
)
def test_configurations_that_are_not_these_weights_or_not_implemented(directory, changes, named):
    edit_json(directory / "config.json", changes)
    message = refusal(directory)
    for part in named:
        assert part in message
    assert str(directory) in message


@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "tokenizer.json", "model.safetensors"])
def test_missing_file_is_named(directory, name):
    (directory / name).unlink()
    message = refusal(directory)
    assert str(directory) in message
    assert name in message


@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"null", b"[" * 100_000], ids=lambda c: repr(c[:4]))
def test_damaged_file_is_named(directory, name, content):
    (directory / name).write_bytes(content)
    assert name in refusal(directory)


@pytest.mark.parametrize("kept", [0, 7, 8, 100, 5000, -1])
def test_truncated_weights(directory, kept):
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    assert "model.safetensors: not a readable safetensors file" in refusal(directory)


def test_missing_shard_is_named(tmp_path, model):
    path = write_hf(tmp_path, model, shards=3)
    (path / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors" in refusal(path)


def test_index_cannot_point_outside(tmp_path, model):
    path = write_hf(tmp_path / "checkpoint", model, shards=2)
    shutil.copyfile(path / "model-00001-of-00002.safetensors", tmp_path / "outside.safetensors")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    for target in ("../outside.safetensors", str(tmp_path / "outside.safetensors")):
        index["weight_map"]["ctc_head.bias"] = target
        write_json(path / "model.safetensors.index.json", index)
        message = refusal(path)
        assert "outside the directory" in message
        assert target in message


def test_tensor_in_two_shards_is_refused(tmp_path, model):
    path = write_hf(tmp_path, model, shards=2)
    first = load_file(path / "model-00001-of-00002.safetensors")
    second = load_file(path / "model-00002-of-00002.safetensors")
    name = next(iter(first))
    save_file(second | {name: first[name]}, path / "model-00002-of-00002.safetensors")
    assert f"tensor {name} is in" in refusal(path)


def test_pickled_weights_are_not_read(directory):
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert "pickled weights are not read" in refusal(directory)


def test_no_such_path(tmp_path):
    assert "no such checkpoint" in refusal(tmp_path / "nothing")


def test_loaded_model_gives_the_same_logits(directory, model):
    features, lens = random_features([80, 33])
    with torch.no_grad():
        expected, _ = model(features, lens)
        logits, _ = load_checkpoint(directory).model(features, lens)
        half, _ = load_checkpoint(directory, dtype="bfloat16").model(features.bfloat16(), lens)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    assert relative_error(half.float()[0], expected[0]) <= 0.1
