"""Damaged audio, archives, weights, configurations and tokenizers: a result or an error of our tree, within limits.

The short form runs the same examples each time; the long form, marked slow, is described in `fuzz_sandbox.py`.
"""

import copy
import functools
import io
import json
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from audio_samples import encode, make_sound
from fuzz_sandbox import damaged_bytes, damaged_tree
from hypothesis import strategies as st
from small_models import TINY_EN, small_model, write_hf, write_nemo

from parakeet_core import load_checkpoint
from parakeet_core.audio import load_audio, probe_audio
from parakeet_core.errors import ErrorKind, InputError
from parakeet_core.tokenizer import SentencePieceTokenizer, TokenizerJson

AUDIO_OPTIONS = [{}, {"offset_s": 0.1, "duration_s": 0.2}, {"offset_s": 0.25}, {"channel": "first"}]


@functools.cache
def model():
    return small_model(seed=1, n_layers=1)


@functools.cache
def hf_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        return {path.name: path.read_bytes() for path in write_hf(Path(folder, "hf"), model()).iterdir()}


@functools.cache
def nemo_archives() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        return [
            write_nemo(Path(folder, "m.nemo"), model(), compress=compress).read_bytes() for compress in (False, True)
        ]


@functools.cache
def nemo_members() -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(nemo_archives()[0])) as archive:
        return {Path(member.name).name: archive.extractfile(member).read() for member in archive.getmembers()}


@functools.cache
def recordings() -> list[bytes]:
    formats = [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("MP3", "MPEG_LAYER_III"), ("OGG", "VORBIS"), ("OGG", "OPUS")]
    return [encode(make_sound(0.5), container=container, codec=codec) for container, codec in formats]


def decode(data: bytes, options: dict) -> None:
    probe_audio(data)
    waveform = load_audio(data, **options).waveform
    assert waveform.dtype == np.float32
    assert np.isfinite(waveform).all()


def load(files: dict[str, bytes]) -> None:
    """Load a checkpoint, and use what was loaded: a directory, or one archive."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            Path(folder, name).write_bytes(content)
        loaded = load_checkpoint(Path(folder, "m.nemo") if "m.nemo" in files else folder)
        features, lens = loaded.frontend([np.zeros(8000, np.float32)])
        with torch.inference_mode():
            loaded.model(features, lens)
        use_tokenizer(loaded.tokenizer)


def use_tokenizer(tokenizer) -> None:
    tokenizer.decode(list(range(len(tokenizer.pieces))))
    tokenizer.encode("Please hold, the number 42 is not available.")


def load_hf_with(name: str, content: bytes) -> None:
    load(hf_files() | {name: content})


def load_nemo_with(name: str, content: bytes) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for member, data in (nemo_members() | {name: content}).items():
            header = tarfile.TarInfo(member)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    load({"m.nemo": buffer.getvalue()})


def load_tokenizer_json(content: bytes) -> None:
    use_tokenizer(TokenizerJson(content.decode("utf-8", "surrogateescape")))


def load_sentencepiece(content: bytes) -> None:
    use_tokenizer(SentencePieceTokenizer(content))


def as_json(tree: object) -> bytes:
    return json.dumps(tree).encode()


def small_tokenizer_json() -> dict:
    """The carried tokenizer, cut to its first pieces so that damage meets its other parts as often."""
    content = json.loads((TINY_EN / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, dict):
        content["model"]["vocab"] = {piece: id_ for piece, id_ in vocabulary.items() if id_ < 128}
        content["model"]["merges"] = content["model"].get("merges", [])[:20]
    return content


def safetensors_files() -> st.SearchStrategy[bytes]:
    content = hf_files()["model.safetensors"]
    size = int.from_bytes(content[:8], "little")
    header, tensors = json.loads(content[8 : 8 + size]), content[8 + size :]

    def joined(tree: dict) -> bytes:
        text = as_json(tree)
        return len(text).to_bytes(8, "little") + text + tensors

    dtypes = [
        "BOOL",
        "U8",
        "I8",
        "F8_E5M2",
        "F8_E4M3",
        "F8_E8M0",
        "I16",
        "U16",
        "F16",
        "BF16",
        "I32",
        "U32",
        "F64",
        "I64",
    ]
    dtypes += ["U64", "C64", "F4", "F6_E2M3", "F6_E3M2", "X"]

    @st.composite
    def of_another_type(draw) -> dict:
        tree = copy.deepcopy(header)
        name = draw(st.sampled_from(sorted(name for name in tree if name != "__metadata__")))
        tree[name]["dtype"] = draw(st.sampled_from(dtypes))
        if draw(st.booleans()):
            start, end = tree[name]["data_offsets"]
            tree[name]["shape"] = [end - start]
        return tree

    trees = st.one_of(damaged_tree(header), of_another_type())
    return st.one_of(trees.map(joined), damaged_bytes([content]))


def nemo_yaml() -> st.SearchStrategy[bytes]:
    content = nemo_members()["model_config.yaml"]
    tree = damaged_tree(yaml.safe_load(content)).map(lambda damaged: yaml.dump(damaged).encode())
    return st.one_of(tree, damaged_bytes([content]))


def legacy_weights() -> bytes:
    """The weights as torch before 1.6 stored them: no archive, one pickle after another."""
    buffer = io.BytesIO()
    weights = torch.load(io.BytesIO(nemo_members()["model_weights.ckpt"]), weights_only=True)
    torch.save(weights, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def damaged_weights() -> st.SearchStrategy[tuple]:
    name = "model_weights.ckpt"
    return st.tuples(st.just(name), damaged_bytes([nemo_members()[name], legacy_weights()]))


def json_files(name: str) -> st.SearchStrategy[tuple]:
    content = hf_files()[name]
    damaged = st.one_of(damaged_tree(json.loads(content)).map(as_json), damaged_bytes([content]))
    return st.tuples(st.just(name), damaged)


def tokenizer_jsons() -> st.SearchStrategy[tuple]:
    tree = small_tokenizer_json()
    return st.tuples(st.one_of(damaged_tree(tree).map(as_json), damaged_bytes([as_json(tree)])))


TARGETS = {  # name -> target, and what makes the strategy of its arguments when it is wanted
    "audio": (decode, lambda: st.tuples(damaged_bytes(recordings()), st.sampled_from(AUDIO_OPTIONS))),
    "nemo archive": (load, lambda: st.tuples(damaged_bytes(nemo_archives()).map(lambda data: {"m.nemo": data}))),
    "nemo configuration": (load_nemo_with, lambda: st.tuples(st.just("model_config.yaml"), nemo_yaml())),
    "nemo weights": (load_nemo_with, damaged_weights),
    "safetensors": (load_hf_with, lambda: st.tuples(st.just("model.safetensors"), safetensors_files())),
    "configuration": (load_hf_with, lambda: json_files("config.json")),
    "front end": (load_hf_with, lambda: json_files("processor_config.json")),
    "tokenizer.json": (load_tokenizer_json, tokenizer_jsons),
    "tokenizer.model": (
        load_sentencepiece,
        lambda: st.tuples(damaged_bytes([(TINY_EN / "tokenizer.model").read_bytes()])),
    ),
}


def test_what_is_not_damaged_is_loaded():
    for archive in nemo_archives():
        load({"m.nemo": archive})
    load_nemo_with("model_weights.ckpt", legacy_weights())
    load(hf_files())
    load_tokenizer_json(as_json(small_tokenizer_json()))


def nested_aliases(form: str) -> bytes:
    """Lines of which each stands for nine of the one before: 500 bytes that unfold to gigabytes."""
    lines = [f"a: &a {form % 'x: 1'}"]
    lines += [f"{name}: &{name} {form % ', '.join([f'*{chr(ord(name) - 1)}'] * 9)}" for name in "bcdefghij"]
    return "\n".join(lines).encode() + b"\n"


HOSTILE = {  # name -> lines put before model_config.yaml, a text in it, and what takes its place
    "aliases": (nested_aliases("[%s]"), b"normalize: per_feature", b"normalize: *j"),
    "merged mappings": (b"a: &a {x: 1}\n" + nested_aliases("{<<: [%s]}").partition(b"\n")[2], b"", b""),
    "a number of base 60": (b"z: " + b"1:" * 100_000 + b"1\n", b"", b""),
    "infinite window": (b"", b"window_size: 0.025", b"window_size: .inf"),
    "transform of 5 GiB": (b"", b"n_fft: 512", b"n_fft: 16777215"),
    "no width": (b"", b"d_model: 32", b"subsampling_conv_channels: -1"),
    "dropout over 1": (b"", b"dropout: 0.1", b"dropout: 5"),
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_configurations_made_to_do_harm_are_refused(sandbox, name):
    before, found, replacement = HOSTILE[name]
    content = nemo_members()["model_config.yaml"]
    assert found in content
    content = before + content.replace(found, replacement, 1)
    assert sandbox.run(load_nemo_with, "model_config.yaml", content).startswith("refused")


@pytest.mark.parametrize("form", ["sparse", "meta", "nested"])
def test_weights_that_are_not_dense_are_refused(sandbox, form):
    weights = torch.load(io.BytesIO(nemo_members()["model_weights.ckpt"]), weights_only=True)
    name = "encoder.layers.0.feed_forward1.linear1.weight"
    forms = {"sparse": torch.Tensor.to_sparse, "meta": lambda tensor: tensor.to("meta")}
    forms["nested"] = lambda tensor: torch.nested.nested_tensor([tensor])
    buffer = io.BytesIO()
    torch.save(weights | {name: forms[form](weights[name])}, buffer)
    assert sandbox.run(load_nemo_with, "model_weights.ckpt", buffer.getvalue()).startswith("refused")


def test_messages_stay_short_whatever_was_found():
    error = InputError(ErrorKind.BAD_RECORD, f"found {'x' * 10**6}; expected less")
    assert len(error.message) < 5000
    assert error.message == str(error)
    assert error.message.endswith("expected less")


@pytest.mark.parametrize("target", list(TARGETS))
def test_damage_gives_a_result_or_a_refusal(sandbox, target):
    function, arguments = TARGETS[target]
    outcomes = sandbox.fuzz(function, arguments())
    assert any(outcome.startswith("refused") for outcome in outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("target", list(TARGETS))
def test_damage_for_minutes(sandbox, target):
    function, arguments = TARGETS[target]
    print(sandbox.fuzz_long(function, arguments()))
