"""Batches hold every item once within the budget; padding on real durations stays under 10 %."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parakeet_core.batching import (
    MAX_PADDING,
    Batch,
    frame_cost,
    padding_share,
    plan_batches,
)

LENS = st.lists(st.integers(0, 5000), max_size=40)
BUDGETS = st.floats(0, 100_000)
FRAMES_PER_S = 100


@given(LENS, BUDGETS, st.none() | st.integers(1, 5))
@settings(max_examples=200)
def test_every_item_once_within_the_budget(lens, budget, max_size):
    batches = plan_batches(lens, budget, max_size)
    assert sorted(index for batch in batches for index in batch.indices) == list(range(len(lens)))
    for batch in batches:
        assert batch.frames == max(lens[index] for index in batch.indices)
        assert len(batch.indices) == 1 or len(batch.indices) * frame_cost(batch.frames) <= budget
        assert max_size is None or len(batch.indices) <= max_size
        assert padding_share(lens, [batch]) <= MAX_PADDING + 1e-9
    order = [index for batch in batches for index in batch.indices]
    assert order == sorted(range(len(lens)), key=lambda index: (lens[index], index))  # ties keep their order


@given(LENS, BUDGETS)
@settings(max_examples=100)
def test_no_batch_is_cut_without_need(lens, budget):
    """Greedy, but never short: with the next item, the batch would exceed the budget or its padding the limit."""
    batches = plan_batches(lens, budget)
    for batch, following in itertools.pairwise(batches):
        joined = (*batch.indices, following.indices[0])
        longest = lens[joined[-1]]
        padding = padding_share(lens, [Batch(joined, longest)])
        assert len(joined) * frame_cost(longest) > budget or padding > MAX_PADDING - 1e-9


def test_ties_and_lone_giants():
    assert plan_batches([5, 5, 5], 1e9) == [Batch((0, 1, 2), 5)]
    assert plan_batches([9000, 10], 100) == [Batch((1,), 10), Batch((0,), 9000)]
    assert plan_batches([], 100) == []


@pytest.mark.parametrize("budget_s", [160, 1280])
def test_padding_on_real_durations(librispeech, ljspeech, budget_s, capsys):
    for name, clips in (("librispeech", librispeech), ("ljspeech", ljspeech), ("both", librispeech + ljspeech)):
        lens = [int(clip.duration_s * FRAMES_PER_S) for clip in clips]
        batches = plan_batches(lens, budget_s * FRAMES_PER_S)
        share = padding_share(lens, batches)
        with capsys.disabled():
            print(f"\n{name}, budget {budget_s} s: padding {share:.1%} in {len(batches)} batches", end="")
        assert share < 0.10
