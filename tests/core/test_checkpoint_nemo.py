"""NeMo archives: forms, options that are refused, and archives that are malicious or damaged."""

import hashlib
import io
import os
import pickle
import tarfile

import pytest
import torch
from small_models import TINY_EN, nemo_tensors, random_features, small_model, write_nemo

from parakeet_core import load_checkpoint
from parakeet_core.errors import CheckpointError


@pytest.fixture(scope="module")
def model():
    return small_model(seed=4)


def refusal(path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def assert_same_model(checkpoint, model):
    features, lens = random_features([80, 33], model.config.encoder.n_mels)
    with torch.no_grad():
        torch.testing.assert_close(checkpoint.model(features, lens)[0], model(features, lens)[0], rtol=0, atol=0)
    assert not checkpoint.model.training


SHAPES = {
    "biases": {},
    "no biases": {"attention_bias": False, "convolution_bias": False},
    "attention biases only": {"convolution_bias": False},
    "128 mels, kernel 31, input not scaled": {"mels": 128, "conv_kernel": 31, "scale_input": False},
    "factor 4": {"subsampling_factor": 4},
}


@pytest.mark.parametrize("compress", [False, True], ids=["tar", "gzip"])
@pytest.mark.parametrize("hybrid", [False, True], ids=["ctc", "hybrid"])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_sizes_and_switches(tmp_path, shape, hybrid, compress):
    model = small_model(seed=5, **SHAPES[shape])
    checkpoint = load_checkpoint(write_nemo(tmp_path / "m.nemo", model, hybrid=hybrid, compress=compress))
    assert_same_model(checkpoint, model)
    assert checkpoint.config.frontend == model.config.frontend
    assert checkpoint.config.blank_id == 128
    assert checkpoint.tokenizer.decode(checkpoint.tokenizer.encode("please hold")) == "please hold"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_converted_when_loaded(tmp_path, model, dtype):
    loaded = load_checkpoint(write_nemo(tmp_path / "m.nemo", model), dtype=dtype).model
    for name, tensor in loaded.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(
                tensor, model.state_dict()[name].to(loaded.ctc_head.weight.dtype), rtol=0, atol=0
            )


def test_options_that_nemo_leaves_out(tmp_path):
    """xscaling absent means true; -1 channels mean the model's width; n_fft follows from the window."""
    model = small_model(seed=6, subsampling_channels=32)
    changes = {"encoder.xscaling": None, "encoder.subsampling_conv_channels": -1, "preprocessor.n_fft": None}
    assert_same_model(load_checkpoint(write_nemo(tmp_path / "m.nemo", model, changes)), model)


def test_defaults_are_those_of_nemo(tmp_path):
    """Those of ConformerEncoder and AudioToMelSpectrogramPreprocessor, which differ from the reference's."""
    model = small_model(seed=6, mels=64, subsampling_channels=32, subsampling_factor=4)
    left_out = ["n_heads", "subsampling_factor", "subsampling_conv_channels", "dropout_emb", "dropout_att"]
    changes = dict.fromkeys(f"encoder.{name}" for name in left_out)
    changes |= dict.fromkeys(f"preprocessor.{name}" for name in ("sample_rate", "window_size", "features", "n_fft"))
    checkpoint = load_checkpoint(write_nemo(tmp_path / "m.nemo", model, changes))
    assert_same_model(checkpoint, model)
    encoder, frontend = checkpoint.config.encoder, checkpoint.config.frontend
    assert (encoder.dropout_positions, encoder.attention_dropout, encoder.layerdrop) == (0.1, 0.0, 0.0)
    assert (frontend.win_length, frontend.hop_length, frontend.n_fft) == (320, 160, 512)


def test_preemphasis_can_be_off(tmp_path, model):
    """In NeMo, too, null means no filter."""
    content = write_nemo(tmp_path / "m.nemo", model, {"preprocessor.preemph": "null"}).read_bytes()
    (tmp_path / "m.nemo").write_bytes(content.replace(b"preemph: 'null'", b"preemph:  null "))
    assert load_checkpoint(tmp_path / "m.nemo").config.frontend.preemphasis == 0.0


def test_windows_are_in_seconds(tmp_path, model):
    changes = {"preprocessor.window_size": 0.02, "preprocessor.window_stride": 0.005, "preprocessor.preemph": 0.9}
    frontend = load_checkpoint(write_nemo(tmp_path / "m.nemo", model, changes)).config.frontend
    assert (frontend.win_length, frontend.hop_length, frontend.preemphasis) == (320, 80, 0.9)
    changes = {"preprocessor.sample_rate": 22050, "preprocessor.window_stride": 0.0125, "preprocessor.n_fft": 1024}
    frontend = load_checkpoint(write_nemo(tmp_path / "m.nemo", model, changes)).config.frontend
    assert (frontend.win_length, frontend.hop_length) == (551, 275)  # of 551.25 and 275.625 samples


def test_dropout_rates_are_read(tmp_path, model):
    changes = {"encoder.dropout": 0.2, "encoder.dropout_att": 0.3, "encoder.stochastic_depth_drop_prob": 0.05}
    encoder = load_checkpoint(write_nemo(tmp_path / "m.nemo", model, changes)).config.encoder
    assert (encoder.activation_dropout, encoder.attention_dropout, encoder.layerdrop) == (0.2, 0.3, 0.05)
    assert (encoder.dropout, encoder.dropout_positions) == (0.1, 0.0)


@pytest.mark.parametrize("compress", [False, True], ids=["tar", "gzip"])
def test_digest_is_that_of_the_weights_member(tmp_path, model, compress):
    buffer = io.BytesIO()
    torch.save(nemo_tensors(model), buffer)
    path = write_nemo(tmp_path / "m.nemo", model, weights=buffer.getvalue(), compress=compress)
    assert load_checkpoint(path).digest == hashlib.sha256(buffer.getvalue()).hexdigest()


def test_members_beside_the_weights_that_decide_texts(tmp_path, model):
    before = load_checkpoint(write_nemo(tmp_path / "a.nemo", model)).source.files
    tokenizer = (TINY_EN / "tokenizer.model").read_bytes()
    assert list(before) == ["model_config.yaml", f"{hashlib.md5(tokenizer).hexdigest()}_tokenizer.model"]
    assert before[list(before)[1]] == hashlib.sha256(tokenizer).hexdigest()
    other = load_checkpoint(write_nemo(tmp_path / "b.nemo", model, {"preprocessor.preemph": 0.5})).source.files
    assert [name for name in before if before[name] != other[name]] == ["model_config.yaml"]


REFUSED = {
    "tokenizer.type": "agg",
    "preprocessor.normalize": "all_features",
    "preprocessor.window": "hamming",
    "preprocessor.log": False,
    "preprocessor.log_zero_guard_type": "clamp",
    "preprocessor.log_zero_guard_value": "eps",
    "preprocessor.mag_power": 1.0,
    "preprocessor.frame_splicing": 3,
    "preprocessor.exact_pad": True,
    "preprocessor.lowfreq": 20,
    "preprocessor.highfreq": 7600,
    "preprocessor.mel_norm": "None",
    "encoder.subsampling": "striding",
    "encoder.causal_downsampling": True,
    "encoder.reduction": "striding",
    "encoder.self_attention_model": "rel_pos_local_attn",
    "encoder.untie_biases": False,
    "encoder.conv_norm_type": "layer_norm",
    "encoder.conv_context_size": "causal",
    "encoder.feat_out": 512,
    "decoder.add_blank": False,
    "aux_ctc.decoder.add_blank": False,
    "encoder.att_context_size": [128, 128],
}


@pytest.mark.parametrize(("option", "value"), REFUSED.items())
def test_option_that_is_not_implemented(tmp_path, model, option, value):
    message = refusal(write_nemo(tmp_path / "m.nemo", model, {option: value}))
    assert "not implemented" in message
    assert option in message
    assert repr(value) in message


@pytest.mark.parametrize("context", [[[-1, -1], [70, 13]], 128, "full", [70], {"left": 70}], ids=str)
def test_attention_contexts_of_streaming_models(tmp_path, model, context):
    assert "encoder.att_context_size" in refusal(
        write_nemo(tmp_path / "m.nemo", model, {"encoder.att_context_size": context})
    )


def test_the_guard_of_the_logarithm_may_be_spelled_out(tmp_path, model):
    path = write_nemo(tmp_path / "m.nemo", model, {"preprocessor.log_zero_guard_value": 5.960464477539063e-08})
    assert_same_model(load_checkpoint(path), model)
    assert "log_zero_guard_value 1e-05" in refusal(
        write_nemo(tmp_path / "m.nemo", model, {"preprocessor.log_zero_guard_value": 0.00001})
    )


def test_all_refused_options_are_in_one_message(tmp_path, model):
    options = {option: value for option, value in REFUSED.items() if option != "preprocessor.highfreq"}
    message = refusal(write_nemo(tmp_path / "m.nemo", model, options))
    assert all(option in message for option in options)


@pytest.mark.parametrize("section", ["encoder", "preprocessor", "tokenizer"])
@pytest.mark.parametrize("value", [None, "none", [1]], ids=str)
def test_missing_section(tmp_path, model, section, value):
    assert f"no {section} section" in refusal(write_nemo(tmp_path / "m.nemo", model, {section: value}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"encoder.n_layers": 5}, "says 5 layers, the weights hold 2"),
        ({"encoder.n_heads": 5}, "5 heads"),
        ({"encoder.n_heads": "4"}, "n_heads is '4'"),
        ({"encoder.d_model": 64}, "misshapen"),
        ({"encoder.feat_in": 128}, "128 mel bins"),
        ({"encoder.subsampling_factor": 5}, "factor 5"),
        ({"preprocessor.sample_rate": "16k"}, "not positive numbers"),
        ({"preprocessor.window_size": -1}, "win_length is -16000"),
        ({"preprocessor.window_stride": 0}, "front end"),
        ({"tokenizer.model_path": "nemo:other.model"}, "'other.model'"),
        ({"tokenizer.model_path": None}, "tokenizer.model_path"),
    ],
    ids=str,
)
def test_configuration_that_is_not_of_these_weights(tmp_path, model, changes, named):
    assert named in refusal(write_nemo(tmp_path / "m.nemo", model, changes))


def test_every_wrong_tensor_is_named_in_one_message(tmp_path, model):
    tensors = nemo_tensors(model)
    del tensors["encoder.layers.1.norm_out.weight"]
    tensors["encoder.layers.0.self_attn.pos_bias_u"] = torch.zeros(4, 9)
    tensors["encoder.layers.0.extra.weight"] = torch.zeros(3)
    message = refusal(write_nemo(tmp_path / "m.nemo", model, tensors=tensors))
    assert "1 missing: encoder.layers.1.norm_out.weight" in message
    assert "1 unexpected: encoder.layers.0.extra.weight" in message
    assert "1 misshapen: encoder.layers.0.self_attn.bias_u (found [4, 9], expected [4, 8])" in message


def test_transducer_without_a_ctc_head(tmp_path, model):
    tensors = {name: tensor for name, tensor in nemo_tensors(model).items() if not name.startswith("decoder")}
    tensors["decoder.prediction.embed.weight"] = torch.zeros(129, 16)
    assert "expected a FastConformer encoder with a CTC head" in refusal(
        write_nemo(tmp_path / "m.nemo", model, tensors=tensors)
    )


class Bomb:
    """Unpickling it creates a directory."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle"])
def test_pickled_objects_are_refused_unexecuted(tmp_path, model, form):
    trace = tmp_path / "executed"
    content = nemo_tensors(model) | {"encoder.bomb": Bomb(trace)}
    buffer = io.BytesIO()
    if form == "plain pickle":
        pickle.dump(content, buffer)
    else:
        torch.save(content, buffer, _use_new_zipfile_serialization=form == "zip")
    assert "not a file of tensors alone" in refusal(write_nemo(tmp_path / "m.nemo", model, weights=buffer.getvalue()))
    assert not trace.exists()
    pickle.loads(pickle.dumps(Bomb(trace)))  # noqa: S301 - made by this test
    assert trace.exists()  # the bomb is live


def test_weights_that_are_no_mapping_of_tensors(tmp_path, model):
    stretched = torch.zeros(1).expand(1 << 40)  # 4 TiB of one number
    for content in ([torch.zeros(3)], {"a": 1}, torch.zeros(2), {"a": {"b": torch.zeros(1)}}, {"a": stretched}):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        path = write_nemo(tmp_path / "m.nemo", model, weights=buffer.getvalue())
        assert "expected a mapping of names to dense tensors" in refusal(path)


@pytest.mark.parametrize("prefix", ["../", "../../outside/", "/tmp/parakeet-outside/", "./a/../../"])
def test_member_names_are_no_paths_to_write(tmp_path, model, prefix):
    """Members are found by file name; nothing is written beside the archive or where their paths point."""
    folder = tmp_path / "deep" / "folder"
    folder.mkdir(parents=True)
    path = write_nemo(folder / "m.nemo", model, prefix=prefix)
    before = {file for file in tmp_path.rglob("*")}
    assert_same_model(load_checkpoint(path), model)
    assert {file for file in tmp_path.rglob("*")} == before
    assert not os.path.exists("/tmp/parakeet-outside")


def test_links_are_not_followed(tmp_path, model):
    """A member that links to a file outside counts as absent."""
    (tmp_path / "secret").write_text("encoder: {}")
    good = write_nemo(tmp_path / "good.nemo", model)
    with tarfile.open(good) as archive, tarfile.open(tmp_path / "m.nemo", "w") as changed:
        for member in archive.getmembers():
            if member.name.endswith("model_config.yaml"):
                link = tarfile.TarInfo("./model_config.yaml")
                link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
                changed.addfile(link)
            else:
                changed.addfile(member, archive.extractfile(member))
    assert "no 'model_config.yaml'" in refusal(tmp_path / "m.nemo")


@pytest.mark.parametrize(
    "yaml",
    [b"", b"- 1", b"just text", b"{", b"\xff\xfe\xff", b"!!python/object/apply:os.mkdir ['executed']", b"[" * 5000],
    ids=lambda content: repr(content[:12]),
)
def test_damaged_yaml(tmp_path, model, yaml, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with tarfile.open(write_nemo(tmp_path / "good.nemo", model)) as archive, tarfile.open("m.nemo", "w") as changed:
        for member in archive.getmembers():
            content = archive.extractfile(member).read()
            if member.name.endswith("model_config.yaml"):
                content = yaml
                member.size = len(yaml)
            changed.addfile(member, io.BytesIO(content))
    assert "model_config.yaml" in refusal(tmp_path / "m.nemo")
    assert not (tmp_path / "executed").exists()


def test_file_that_is_no_archive(tmp_path):
    path = tmp_path / "m.nemo"
    for content in (b"", b"no archive", os.urandom(20_000), b"\x1f\x8b" + bytes(50)):
        path.write_bytes(content)
        assert "not a readable .nemo archive" in refusal(path)


def is_refused(path) -> bool:
    """False if it loads. Any error other than a CheckpointError that names the file fails the test."""
    try:
        load_checkpoint(path)
    except CheckpointError as error:
        if str(path) not in str(error):
            raise
        return True
    return False


@pytest.mark.parametrize("compress", [False, True], ids=["tar", "gzip"])
def test_truncated_anywhere(tmp_path, model, compress):
    whole = write_nemo(tmp_path / "whole.nemo", model, compress=compress).read_bytes()
    path = tmp_path / "m.nemo"
    for step in range(38):  # the rest is the tar's end mark, which is not required
        path.write_bytes(whole[: len(whole) * step // 40])
        assert is_refused(path)


@pytest.mark.parametrize("compress", [False, True], ids=["tar", "gzip"])
def test_flipped_bytes(tmp_path, model, compress):
    """One damaged byte anywhere gives a CheckpointError or, if nothing checks that byte, a model; no other error."""
    whole = write_nemo(tmp_path / "whole.nemo", model, compress=compress).read_bytes()
    path = tmp_path / "m.nemo"
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(0, len(whole), (80,), generator=generator).tolist()
    places += range(0, 700, 23)  # the first member's header and the configuration
    refused = 0
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 0x5A
        path.write_bytes(damaged)
        refused += is_refused(path)
    assert refused > 20
