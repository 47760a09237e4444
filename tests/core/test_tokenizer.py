"""Both tokenizer formats through one interface, and files in neither format."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from small_models import TINY_EN
from tokenizers import decoders, models, pre_tokenizers, trainers

from parakeet_core.errors import CheckpointError
from parakeet_core.tokenizer import TokenizerJson, check_pieces, load_tokenizer
from parakeet_core.words import Tokens, group_words

WORDS = st.lists(st.text("abcdefghijklmnopqrstuvwxyz'", min_size=1, max_size=8), max_size=6).map(" ".join)


@pytest.fixture(scope="module")
def both():
    return load_tokenizer(TINY_EN / "tokenizer.json"), load_tokenizer(TINY_EN / "tokenizer.model")


@given(text=WORDS)
def test_round_trip_and_agreement(both, text):
    for tokenizer in both:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    from_json, from_model = both
    assert from_json.encode(text) == from_model.encode(text)


def test_pieces_are_by_id(both):
    from_json, from_model = both
    assert (len(from_json.pieces), len(from_model.pieces)) == (129, 128)  # the JSON form names the blank as well
    assert from_json.pieces[:128] == from_model.pieces
    for text in ("please hold", "one two"):
        assert "".join(from_json.pieces[i] for i in from_json.encode(text)).replace("▁", " ").strip() == text


def test_truncation_and_padding_of_the_file_are_left_out(both):
    """transformers ignores them too; otherwise labels would be cut, or filled with blanks."""
    content = json.loads(both[0].content())
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 12}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 128, "pad_type_id": 0,
        "pad_token": "<pad>",
    }  # fmt: skip
    assert TokenizerJson(json.dumps(content)).encode("please hold the line") == both[0].encode("please hold the line")


def test_unknown_piece_by_any_name(both):
    content = both[0].content()
    assert [tokenizer.unknown_id for tokenizer in both] == [0, 0]
    assert TokenizerJson(content.replace('"<unk>"', '"[UNK]"')).unknown_id == 0
    without = json.loads(content)
    without["model"]["unk_token"] = None
    assert TokenizerJson(json.dumps(without)).unknown_id is None
    unigram = {"type": "Unigram", "unk_id": 1, "vocab": [["▁", 0.0], ["?", 0.0], ["a", -1.0]], "byte_fallback": False}
    assert TokenizerJson(json.dumps(without | {"model": unigram, "added_tokens": []})).unknown_id == 1


def test_words_of_a_byte_level_tokenizer():
    """Its pieces mark the start of a word differently, and spell bytes."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<pad>"], show_progress=False)
    library.train_from_iterator(["the café of the élève"] * 3, trainer)
    tokenizer = TokenizerJson(library.to_str())
    ids = tokenizer.encode("the café of the élève")
    assert [tokenizer.pieces[i] for i in ids] == ["▁the", "▁café", "▁of", "▁the", "▁élève"]
    steps = np.arange(len(ids))
    words = group_words(Tokens(np.array(ids), steps, steps + 1, np.ones(len(ids)), 0.0), tokenizer, 1.0)
    assert [(word.word, word.start_s) for word in words] == [
        ("the", 0.0), ("café", 1.0), ("of", 2.0), ("the", 3.0), ("élève", 4.0)
    ]  # fmt: skip


def test_empty_text(both):
    for tokenizer in both:
        assert tokenizer.encode("") == []
        assert tokenizer.decode([]) == ""


def test_unknown_piece(both):
    """Each form decodes id 0 as its library does: the JSON form omits it, SentencePiece shows it."""
    from_json, from_model = both
    a, b = from_json.encode("a")[0], from_json.encode("b")[0]
    assert from_json.decode([a, 0, b]) == "a b"
    assert from_model.decode([a, 0, b]) == "a ⁇  b"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b""),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"[1, 2"),
        ("tokenizer.json", b"\xff\xfe\x00\x9f"),
        ("tokenizer.model", b""),
        ("tokenizer.model", b"no protobuf"),
        ("tokenizer.model", b"\x00" * 100),
    ],
)
def test_files_that_are_no_tokenizer_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        load_tokenizer(tmp_path / name)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="tokenizer.model"):
        load_tokenizer(tmp_path / "tokenizer.model")


@pytest.mark.parametrize(("vocab_size", "fits"), [(127, False), (128, True), (129, True), (130, False)])
def test_pieces_must_cover_the_vocabulary(both, vocab_size, fits):
    """Every id has a piece, except that the blank need not have one."""
    _, from_model = both
    if fits:
        check_pieces(from_model, vocab_size, "tokenizer.model")
    else:
        with pytest.raises(CheckpointError, match=f"128 pieces, the model {vocab_size} outputs"):
            check_pieces(from_model, vocab_size, "tokenizer.model")
