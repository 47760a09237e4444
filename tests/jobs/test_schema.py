"""The `wer` column: what counts as a word, in any script and any form of Unicode."""

import unicodedata

import pytest

from jobs.table.schema import normalise_words, word_error_rate


@pytest.mark.parametrize("text", ["Crème brûlée, naïve café!", "Ёлка и йод", "Tiếng Việt"])
def test_composed_and_decomposed_texts_are_the_same(text):
    decomposed = unicodedata.normalize("NFD", text)
    assert decomposed != text
    assert word_error_rate(decomposed, text) == word_error_rate(text, decomposed) == 0.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don\u2019t stop: 3 o'clock, snake_case \u2014 yes.", ["don't", "stop", "3", "o'clock", "snake_case", "yes"]),
        ("हिन्दी भाषा।", ["हिन्दी", "भाषा"]),
        ("வணக்கம், உலகம்", ["வணக்கம்", "உலகம்"]),
        ("İstanbul", ["i\u0307stanbul"]),
        ("... !", []),
    ],
)
def test_words_keep_their_marks_and_lose_punctuation(text, words):
    assert normalise_words(text).split() == words


def test_a_reference_without_words_has_no_rate():
    assert word_error_rate("...", "something") is None
    assert word_error_rate("one two", "") == 1.0
