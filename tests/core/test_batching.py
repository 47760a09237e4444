"""Batches hold every item once within the budget; buckets pad least; padding on real durations stays under 10 %."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parakeet_core.batching import (
    BUCKET_STEP,
    MAX_PADDING,
    Batch,
    Bucket,
    frame_cost,
    padding_share,
    plan_batches,
    plan_buckets,
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
    """Greedy, but never short: the next item exceeded the budget, or padding for it the limit."""
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


@given(st.lists(st.integers(0, 120), min_size=1, max_size=12), st.integers(1, 4), BUDGETS)
@settings(max_examples=100)
def test_buckets_pad_as_little_as_any_choice(lens, max_buckets, budget):
    """Against every choice of so many lengths."""
    buckets = plan_buckets(lens, budget, max_buckets)
    rounded = [-(-max(length, 1) // BUCKET_STEP) * BUCKET_STEP for length in lens]
    bounds = [bucket.frames for bucket in buckets]
    assert bounds == sorted(set(bounds))
    assert bounds[-1] == max(rounded)
    assert len(buckets) <= max_buckets
    for bucket in buckets:
        assert bucket.frames % BUCKET_STEP == 0
        assert bucket.size == 1 or bucket.size * frame_cost(bucket.frames) <= budget
        assert (bucket.size + 1) * frame_cost(bucket.frames) > budget

    def padded(choice) -> int:
        return sum(min(bound for bound in choice if bound >= length) for length in rounded)

    shorter = set(rounded) - {max(rounded)}
    choices = (
        (*choice, max(rounded))
        for count in range(min(max_buckets, len(shorter) + 1))
        for choice in itertools.combinations(shorter, count)
    )
    assert padded(bounds) == min(map(padded, choices))


def test_no_lengths_need_no_bucket():
    assert plan_buckets([], 1000) == []


def test_buckets_of_one_length():
    assert plan_buckets([300, 300, 297], 3000) == [Bucket(304, 9)]


@pytest.mark.parametrize("budget_s", [160, 1280])
def test_padding_on_real_durations(librispeech, ljspeech, budget_s, capsys):
    """Overhead under 10 %, of planned batches and of the static shapes' lengths."""
    for name, clips in (("librispeech", librispeech), ("ljspeech", ljspeech), ("both", librispeech + ljspeech)):
        lens = [int(clip.duration_s * FRAMES_PER_S) for clip in clips]
        budget = budget_s * FRAMES_PER_S
        batches = plan_batches(lens, budget)
        buckets = plan_buckets(lens, budget)
        in_buckets = sum(min(bucket.frames for bucket in buckets if bucket.frames >= length) for length in lens)
        shares = {"batches": padding_share(lens, batches), "buckets": 1 - sum(lens) / in_buckets}
        with capsys.disabled():
            print(
                f"\n{name}, budget {budget_s} s: padding {shares['batches']:.1%} in {len(batches)} batches, "
                f"{shares['buckets']:.1%} in {len(buckets)} static shapes",
                end="",
            )
        assert max(shares.values()) < 0.10
