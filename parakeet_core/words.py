"""Tokens of one item, and the words that they spell. Needs no torch, so that tables can be read without it."""

import itertools
from dataclasses import dataclass

import numpy as np

from parakeet_core.tokenizer import WORD_START, Tokenizer


@dataclass(frozen=True)
class Tokens:
    """Collapsed tokens of one item, [N] each; times in encoder frames. `blank_ratio` is the share of blank frames."""

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    scores: np.ndarray
    blank_ratio: float


@dataclass(frozen=True)
class Word:
    """One word of a transcript: times in seconds from the item's start, confidence in [0, 1]."""

    word: str
    start_s: float
    end_s: float
    confidence: float


def group_words(tokens: Tokens, tokenizer: Tokenizer, frame_s: float) -> list[Word]:
    """Words of one item: a word begins at each piece that begins with the word mark.

    Args:
        frame_s: seconds per encoder frame. A word lasts from its first token's first frame to the end of its last
            token's run; its confidence is the mean of its tokens' posteriors.

    Returns:
        Words whose texts, joined by spaces, are the words of `tokenizer.decode(tokens.ids)`.
    """
    ids = tokens.ids.tolist()
    begins = [index for index, i in enumerate(ids) if index == 0 or tokenizer.pieces[i].startswith(WORD_START)]
    words = []
    for begin, end in itertools.pairwise([*begins, len(ids)]):
        start_s, end_s = float(tokens.starts[begin]) * frame_s, float(tokens.ends[end - 1]) * frame_s
        confidence = float(tokens.scores[begin:end].mean())
        # A group is several words only if a piece itself contains a space, as the unknown piece does.
        words += [Word(text, start_s, end_s, confidence) for text in tokenizer.decode(ids[begin:end]).split()]
    return words
