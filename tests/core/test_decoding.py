"""Greedy CTC compared with a loop in plain Python: ids, frame times, posteriors, words."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import TINY_EN

from parakeet_core.decoding import FrameScores, collapse_ctc, decode_greedy, score_frames
from parakeet_core.tokenizer import load_tokenizer
from parakeet_core.words import Tokens, group_words

BLANK = 4
ITEMS = st.lists(st.lists(st.integers(0, BLANK), max_size=12), min_size=1, max_size=4)


def collapse_by_loop(ids: list[int], scores: list[float]) -> list[tuple[int, int, int, float]]:
    """(id, first frame, frame after the last, mean score) of each token."""
    tokens, frame = [], 0
    while frame < len(ids):
        end = frame
        while end < len(ids) and ids[end] == ids[frame]:
            end += 1
        if ids[frame] != BLANK:
            tokens.append((ids[frame], frame, end, sum(scores[frame:end]) / (end - frame)))
        frame = end
    return tokens


def tuples_of(tokens: Tokens) -> list[tuple]:
    return [*zip(*(column.tolist() for column in (tokens.ids, tokens.starts, tokens.ends, tokens.scores)), strict=True)]


def logits_for(ids: list[list[int]], frames: int, seed: int = 0) -> torch.Tensor:
    """Logits [B, frames, V] whose likeliest tokens are `ids`; garbage on the frames after them."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(ids), frames, BLANK + 1, generator=generator)
    for row, item in zip(logits, ids, strict=True):
        for frame, token in enumerate(item):
            row[frame, token] = row[frame].max() + 1
    return logits


@given(ITEMS, st.integers(0, 3), st.integers(0, 999))
@settings(max_examples=150)
def test_as_the_loop_on_any_batch(items, padding, seed):
    frames = max(map(len, items)) + padding
    logits = logits_for(items, frames, seed)
    decoded = decode_greedy(logits, torch.tensor([len(item) for item in items]), BLANK)
    for item, row, tokens in zip(items, logits, decoded, strict=True):
        posteriors = row.softmax(-1).max(-1).values.tolist()
        expected = collapse_by_loop(item, posteriors)
        assert [entry[:3] for entry in tuples_of(tokens)] == [entry[:3] for entry in expected]
        assert [entry[3] for entry in tuples_of(tokens)] == pytest.approx([entry[3] for entry in expected], abs=1e-6)
        assert tokens.blank_ratio == pytest.approx(item.count(BLANK) / max(len(item), 1))


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([0, BLANK, 0], [(0, 0, 1), (0, 2, 3)]),
        ([0, 0, BLANK, 0, 0], [(0, 0, 2), (0, 3, 5)]),
        ([0, 0, 0], [(0, 0, 3)]),
        ([0, 1, 0], [(0, 0, 1), (1, 1, 2), (0, 2, 3)]),
        ([BLANK, BLANK], []),
        ([BLANK, 2, 2, BLANK], [(2, 1, 3)]),
        ([], []),
    ],
)
def test_runs_and_blanks(ids, expected):
    (tokens,) = decode_greedy(logits_for([ids], len(ids)), torch.tensor([len(ids)]), BLANK)
    assert [entry[:3] for entry in tuples_of(tokens)] == expected


def test_nothing_past_the_length_is_decoded():
    """Neither a token that begins there nor the rest of a run."""
    logits = torch.zeros(2, 5, BLANK + 1)
    logits[:, :, 1] = 9.0
    first, second = decode_greedy(logits, torch.tensor([2, 0]), BLANK)
    assert [entry[:3] for entry in tuples_of(first)] == [(1, 0, 2)]
    assert tuples_of(second) == []


def test_columns_past_the_tokens_hold_zeros():
    ids = torch.tensor([[0, BLANK, 1, BLANK], [2, 2, 2, 2]])
    batch = collapse_ctc(FrameScores(ids, torch.full((2, 4), 0.5), torch.tensor([4, 4])), BLANK)
    assert batch.token_lens.tolist() == [2, 1]
    for column in (batch.ids, batch.starts, batch.ends, batch.scores):
        assert column.shape == (2, 2)
        assert not column[1, 1:].any()


def test_no_items():
    assert decode_greedy(torch.zeros(0, 3, BLANK + 1), torch.zeros(0, dtype=torch.int64), BLANK) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_posteriors_of_half_precision_logits_are_float32(dtype):
    logits = logits_for([[0, 1, 2]], 3).to(dtype)
    frames = score_frames(logits, torch.tensor([3]), BLANK)
    assert frames.scores.dtype == torch.float32
    torch.testing.assert_close(frames.scores, logits.float().softmax(-1).max(-1).values, rtol=1e-6, atol=0)
    assert frames.ids.tolist() == [[0, 1, 2]]


@pytest.fixture(scope="module", params=["tokenizer.json", "tokenizer.model"])
def tokenizer(request):
    return load_tokenizer(TINY_EN / request.param)


@given(ids=st.lists(st.integers(0, 127), max_size=25))
@settings(max_examples=150)
def test_words_joined_are_the_text(tokenizer, ids):
    """Whatever ids a model emits, including the unknown piece and pieces without letters."""
    count = len(ids)
    starts = np.arange(count) * 3
    tokens = Tokens(np.array(ids, dtype=np.int64), starts, starts + 2, np.linspace(0.1, 1, count), 0.0)
    words = group_words(tokens, tokenizer, 0.08)
    assert [word.word for word in words] == tokenizer.decode(ids).split()
    times = [(word.start_s, word.end_s) for word in words]
    assert times == sorted(times)
    for word in words:
        assert 0 <= word.start_s < word.end_s <= (3 * count) * 0.08
        assert 0.1 <= word.confidence <= 1


def test_word_times_and_confidence(tokenizer):
    ids = tokenizer.encode("please hold")
    first_word = next(i for i in range(1, len(ids)) if tokenizer.pieces[ids[i]].startswith("▁"))
    starts = np.arange(len(ids)) * 2 + 5
    scores = np.linspace(0.5, 0.9, len(ids)).astype(np.float32)
    please, hold = group_words(Tokens(np.array(ids), starts, starts + 1, scores, 0.5), tokenizer, 0.08)
    assert (please.word, hold.word) == ("please", "hold")
    assert please.start_s == pytest.approx(0.40)
    assert please.end_s == pytest.approx((starts[first_word - 1] + 1) * 0.08)
    assert hold.start_s == pytest.approx(starts[first_word] * 0.08)
    assert hold.end_s == pytest.approx((starts[-1] + 1) * 0.08)
    assert please.confidence == pytest.approx(scores[:first_word].mean())
