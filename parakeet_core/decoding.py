"""Logits to token ids with times and posteriors (greedy CTC).

Shapes: `B` batch, `U` encoder frames, `V` vocabulary with blank, `N` tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from parakeet_core.encoder import valid_frames
from parakeet_core.words import Tokens


@dataclass(frozen=True)
class FrameScores:
    """What greedy decoding needs from the logits: small enough to be copied off the device at once.

    Attributes:
        ids: [B, U] int64, the likeliest token of each frame; blank on frames past an item's length.
        scores: [B, U] float32, that token's posterior.
        lens: [B] int64, encoder frames.
    """

    ids: Tensor
    scores: Tensor
    lens: Tensor


@dataclass(frozen=True)
class TokenBatch:
    """Collapsed tokens of a batch; columns from `token_lens` on are zero.

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


def score_frames(logits: Tensor, lens: Tensor, blank_id: int) -> FrameScores:
    """Likeliest token and its posterior for every frame.

    Args:
        logits: [B, U, V], any floating dtype; the posterior is computed in float32.
        lens: [B], valid frames. Frames past them become blank with posterior 0, whatever the logits say there.
    """
    best, ids = logits.max(-1)
    scores = torch.exp(best.float() - logits.float().logsumexp(-1))
    valid = valid_frames(lens, logits.shape[1])
    return FrameScores(torch.where(valid, ids, blank_id), torch.where(valid, scores, 0.0), lens)


def collapse_ctc(frames: FrameScores, blank_id: int) -> TokenBatch:
    """Merge runs of an id, then drop blanks: [a, a, blank, a] -> [a, a]. Computed on the device of the input."""
    ids = frames.ids
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    begins &= ids != blank_id
    token_lens = begins.sum(1)
    # Each frame of a run is scattered to its token's column; blank frames go to an extra column, which is cut off.
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
