"""Logits to token ids with times and posteriors (greedy CTC), and tokens to words.

Shapes: `B` batch, `U` encoder frames, `V` vocabulary with blank, `N` tokens.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from parakeet_core.encoder import valid_frames
from parakeet_core.tokenizer import WORD_START, Tokenizer


@dataclass(frozen=True)
class FrameScores:
    """What greedy decoding needs of the logits: small enough to leave the device at once.

    Attributes:
        ids: [B, U] int64, the likeliest token of each frame; blank on frames past an item's length.
        scores: [B, U] float32, its posterior.
        lens: [B] int64, encoder frames.
    """

    ids: Tensor
    scores: Tensor
    lens: Tensor


@dataclass(frozen=True)
class TokenBatch:
    """Collapsed tokens of a batch; columns from `token_lens` on hold zeros.

    Attributes:
        ids: [B, N] int64.
        starts, ends: [B, N] int64, first frame of the token's run and the frame after its last.
        scores: [B, N] float32, mean posterior over the run.
        token_lens: [B] int64.
    """

    ids: Tensor
    starts: Tensor
    ends: Tensor
    scores: Tensor
    token_lens: Tensor


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


def score_frames(logits: Tensor, lens: Tensor, blank_id: int) -> FrameScores:
    """Likeliest token and its posterior on every frame.

    Args:
        logits: [B, U, V], any floating dtype; the posterior is computed in float32.
        lens: [B], valid frames. Frames past them become blank with posterior 0, whatever the logits say there.
    """
    best, ids = logits.max(-1)
    scores = torch.exp(best.float() - logits.float().logsumexp(-1))
    valid = valid_frames(lens, logits.shape[1])
    return FrameScores(torch.where(valid, ids, blank_id), torch.where(valid, scores, 0.0), lens)


def collapse_ctc(frames: FrameScores, blank_id: int) -> TokenBatch:
    """Runs of one id become one token, then blanks go: [a, a, blank, a] -> [a, a]. Runs on the device of its input."""
    ids = frames.ids
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    begins &= ids != blank_id
    token_lens = begins.sum(1)
    # Each frame of a run is scattered to its token's column; blank frames go to one column more, which is cut off.
    width = int(token_lens.max()) if ids.numel() else 0
    column = torch.where(ids != blank_id, begins.cumsum(1) - 1, width)
    frame = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)

    def per_token(values: Tensor, reduce: str) -> Tensor:
        empty = torch.zeros(ids.shape[0], width + 1, dtype=values.dtype, device=ids.device)
        return empty.scatter_reduce(1, column, values, reduce, include_self=False)[:, :width]

    return TokenBatch(
        ids=per_token(ids, "amax"),
        starts=per_token(frame, "amin"),
        ends=per_token(frame + 1, "amax"),
        scores=per_token(frames.scores, "mean"),
        token_lens=token_lens,
    )


def decode_greedy(logits: Tensor, lens: Tensor, blank_id: int) -> list[Tokens]:
    """Tokens of each item of a batch. Nothing past an item's length is decoded. Arguments as `score_frames`."""
    return unpack_tokens(score_frames(logits, lens, blank_id), blank_id)


def unpack_tokens(frames: FrameScores, blank_id: int) -> list[Tokens]:
    """The items of a scored batch, as arrays on the host."""
    batch = collapse_ctc(frames, blank_id)
    blanks = ((frames.ids == blank_id) & valid_frames(frames.lens, frames.ids.shape[1])).sum(1)
    ratios = (blanks / frames.lens.clamp(min=1)).tolist()
    columns = [tensor.cpu().numpy() for tensor in (batch.ids, batch.starts, batch.ends, batch.scores)]
    return [
        Tokens(*(column[row, :count] for column in columns), blank_ratio=ratio)
        for row, (count, ratio) in enumerate(zip(batch.token_lens.tolist(), ratios, strict=True))
    ]


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
        # One group is several words only where a piece itself holds a space, as the unknown piece does.
        words += [Word(text, start_s, end_s, confidence) for text in tokenizer.decode(ids[begin:end]).split()]
    return words
