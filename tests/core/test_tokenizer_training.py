"""New tokenizers, and SentencePiece models as tokenizer.json: the same ids and texts from both libraries."""

import pytest
import sentencepiece
from small_models import TINY_EN

from parakeet_core import ConfigError
from parakeet_core.tokenizer import SentencePieceTokenizer, TokenizerJson, load_tokenizer
from parakeet_core.tokenizer_training import BLANK, as_tokenizer_json, train_tokenizer


@pytest.fixture(scope="module")
def texts(request) -> list[str]:
    return [clip.text for clip in request.getfixturevalue("prompts")]


def test_trained_tokenizer_knows_its_texts(texts):
    tokenizer = train_tokenizer(texts, 90)
    assert len(tokenizer.pieces) == 90
    assert tokenizer.pieces[0] == "<unk>"
    for text in texts:
        ids = tokenizer.encode(text)
        assert 0 not in ids
        assert tokenizer.decode(ids) == text
    assert 0 in tokenizer.encode("größer")
    assert train_tokenizer(texts, 90).content() == tokenizer.content()


def test_long_texts_are_learnt_from_too():
    long = "ab " * 2000 + "xyz"
    tokenizer = train_tokenizer([long, "ab ba"], 7)
    assert tokenizer.decode(tokenizer.encode("xyz")) == "xyz"


@pytest.mark.parametrize("size", [5, 5000])
def test_impossible_sizes_are_refused(texts, size):
    with pytest.raises(ConfigError, match=f"no tokenizer of {size} pieces"):
        train_tokenizer(texts, size)


@pytest.mark.parametrize("kind", ["unigram", "carried BPE", "BPE with bytes"])
def test_both_forms_agree(texts, kind, tmp_path):
    if kind == "unigram":
        original = train_tokenizer(texts, 90)
    elif kind == "carried BPE":
        original = load_tokenizer(TINY_EN / "tokenizer.model")
    else:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_prefix=str(tmp_path / "bpe"), vocab_size=340, model_type="bpe",
            byte_fallback=True, bos_id=-1, eos_id=-1, minloglevel=2,
        )  # fmt: skip
        original = SentencePieceTokenizer((tmp_path / "bpe.model").read_bytes())
    converted = TokenizerJson(as_tokenizer_json(original.content()))
    assert converted.pieces == [*original.pieces, BLANK]
    for text in [*texts, "  two  words ", "größer"]:
        ids = original.encode(text)
        assert converted.encode(text) == ids, text
        if 0 not in ids:
            assert converted.decode(ids) == original.decode(ids)


def test_content_makes_the_same_tokenizer_again():
    for name, kind in (("tokenizer.json", TokenizerJson), ("tokenizer.model", SentencePieceTokenizer)):
        tokenizer = load_tokenizer(TINY_EN / name)
        assert kind(tokenizer.content()).pieces == tokenizer.pieces
