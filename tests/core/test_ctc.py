"""The loss compared with a sum over every path; its reductions, targets that do not fit, gradients and dtypes."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parakeet_core.ctc import ctc_loss

BLANK = 3


def loss_over_all_paths(log_probs: torch.Tensor, target: list[int]) -> float:
    """-log of the total probability of the paths [U] that collapse to `target`, by trying all V^U paths."""
    total = 0.0
    for path in itertools.product(range(log_probs.shape[1]), repeat=log_probs.shape[0]):
        collapsed = [token for token, _ in itertools.groupby(path)]
        if [token for token in collapsed if token != BLANK] == target:
            total += math.exp(sum(float(log_probs[frame, token]) for frame, token in enumerate(path)))
    return -math.log(total) if total else math.inf


def logits_of(frames: int, seed: int, items: int = 1) -> torch.Tensor:
    return torch.randn(items, frames, BLANK + 1, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 5), st.lists(st.integers(0, 2), max_size=4), st.integers(0, 999))
@settings(max_examples=40)
def test_is_the_sum_over_all_paths(frames, target, seed):
    logits = logits_of(frames, seed)
    targets, target_lens = torch.tensor([target], dtype=torch.int64).reshape(1, -1), torch.tensor([len(target)])
    found = ctc_loss(logits, torch.tensor([frames]), targets, target_lens, BLANK, "sum", zero_infinity=False)
    assert float(found) == pytest.approx(loss_over_all_paths(logits[0].log_softmax(-1), target), rel=1e-4, abs=1e-5)


def test_frames_past_the_length_and_targets_past_theirs_do_not_count():
    logits = logits_of(6, 0, items=2)
    lens, target_lens = torch.tensor([6, 3]), torch.tensor([2, 1])
    each = ctc_loss(logits, lens, torch.tensor([[0, 1], [2, 0]]), target_lens, BLANK, "none")
    logits[1, 3:] = 77.0
    changed = ctc_loss(logits, lens, torch.tensor([[0, 1], [2, 1]]), target_lens, BLANK, "none")
    torch.testing.assert_close(changed, each, rtol=0, atol=0)
    assert float(each[1]) == pytest.approx(loss_over_all_paths(logits[1, :3].log_softmax(-1), [2]), rel=1e-5)


def test_reductions_are_built_from_the_items():
    logits = logits_of(8, 1, items=3)
    arguments = (
        logits,
        torch.tensor([8, 7, 5]),
        torch.tensor([[0, 1, 2], [1, 1, 0], [0, 0, 0]]),
        torch.tensor([3, 2, 0]),
    )
    each = ctc_loss(*arguments, BLANK, "none")
    assert each.shape == (3,)
    assert float(ctc_loss(*arguments, BLANK, "sum")) == pytest.approx(float(each.sum()), rel=1e-6)
    mean = (each / torch.tensor([3.0, 2.0, 1.0])).mean()  # for an empty target the divisor is one
    assert float(ctc_loss(*arguments, BLANK, "mean")) == pytest.approx(float(mean), rel=1e-6)


def test_blanks_and_negative_ids_in_targets_are_dropped():
    logits = logits_of(6, 2)
    lens = torch.tensor([6])
    clean = ctc_loss(logits, lens, torch.tensor([[0, 1]]), torch.tensor([2]), BLANK)
    mixed = ctc_loss(logits, lens, torch.tensor([[-100, 0, BLANK, 1, -1]]), torch.tensor([5]), BLANK)
    torch.testing.assert_close(mixed, clean, rtol=0, atol=0)


@pytest.mark.parametrize("target", [[0, 1, 2], [0, 0]], ids=["longer than the frames", "a repeat without room"])
def test_targets_that_do_not_fit(target):
    logits = logits_of(2, 3, items=2).requires_grad_()
    targets, lens = torch.tensor([target, target]), torch.tensor([2, 2])
    target_lens = torch.tensor([len(target), 1])
    infinite = ctc_loss(logits, lens, targets, target_lens, BLANK, "none", zero_infinity=False)
    assert infinite.tolist()[0] == math.inf
    zeroed = ctc_loss(logits, lens, targets, target_lens, BLANK, "none", zero_infinity=True)
    assert zeroed.tolist() == [0.0, infinite.tolist()[1]]
    (gradient,) = torch.autograd.grad(zeroed.sum(), logits)
    assert not gradient[0].any()
    assert gradient[1].any()


def test_items_without_frames():
    """For an item without frames the loss is 0 if its target is empty, else infinite: the target does not fit."""
    logits = logits_of(4, 4, items=2)
    each = ctc_loss(
        logits,
        torch.tensor([0, 0]),
        torch.tensor([[0], [0]]),
        torch.tensor([0, 1]),
        BLANK,
        "none",
        zero_infinity=False,
    )
    assert each.tolist() == [0.0, math.inf]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_give_a_float32_loss(dtype):
    logits = logits_of(9, 5).to(dtype).requires_grad_()
    arguments = (torch.tensor([9]), torch.tensor([[0, 1]]), torch.tensor([2]), BLANK)
    loss = ctc_loss(logits, *arguments)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, ctc_loss(logits.float(), *arguments), rtol=0, atol=0)
    loss.backward()
    assert logits.grad.dtype == dtype
    assert logits.grad.isfinite().all()
