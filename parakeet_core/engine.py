"""Features of many items -> tokens of each: batches by length, the model, greedy decoding, order restored.

Shapes: `B` batch, `T` feature frames, `U` encoder frames, `M` mel bins. Knows nothing of audio files or of text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parakeet_core.batching import Batch, plan_batches
from parakeet_core.checkpoint import Checkpoint
from parakeet_core.decoding import FrameScores, Tokens, score_frames, unpack_tokens

# An item up to MAX_PASS_FRAMES is one pass of the model, equal to the reference. Published checkpoints were trained
# with positions up to 5000 encoder frames (400 s), and attention's memory grows with the square: 0.9 GB at 300 s with
# 8 heads in float32. Longer items are cut into windows that also see CONTEXT_FRAMES to both sides and give only their
# own frames.
MAX_PASS_FRAMES = 30_000  # feature frames, 300 s
WINDOW_FRAMES = 6_000  # feature frames, 60 s: what one window gives
CONTEXT_FRAMES = 1_000  # feature frames, 10 s: what it sees beyond, on each side
CPU_BUDGET_FRAMES = 3_000  # cost of a batch; on a CPU small batches, whose states stay in the cache, beat large ones
CUDA_BUDGET_FRAMES = 200_000  # about 2000 s of short items: enough rows to fill the matrix units of a large GPU


@dataclass(frozen=True)
class _Piece:
    """Part of an item that goes through the model at once; all in feature frames of the item."""

    item: int
    start: int  # first frame the model sees
    end: int
    kept_start: int  # frames whose tokens are taken; multiples of the subsampling factor, or the item's end
    kept_end: int


class Engine:
    """Runs a checkpoint's model over features.

    Args:
        checkpoint: its model is on the device and in the dtype to run in.
        budget_frames: greatest cost of a batch (see `batching`); by default one that suits the device.
    """

    def __init__(self, checkpoint: Checkpoint, budget_frames: float | None = None):
        parameter = next(checkpoint.model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.config = checkpoint.config
        self.model = checkpoint.model.prepare_inference()
        default = CPU_BUDGET_FRAMES if self.device.type == "cpu" else CUDA_BUDGET_FRAMES
        self.budget_frames = default if budget_frames is None else budget_frames

    @torch.no_grad()
    def recognise(self, features: Sequence[Tensor], budget_frames: float | None = None) -> list[Tokens]:
        """Tokens of each item, in the order given.

        Args:
            features: per item [T, M], float, on any device; T may be 0, which gives no tokens.
            budget_frames: greatest cost of a batch, instead of the engine's own.
        """
        pieces = [piece for item, tensor in enumerate(features) for piece in self._pieces(item, tensor.shape[0])]
        parts: list[list[tuple[int, Tensor, Tensor]]] = [[] for _ in features]
        lens = [piece.end - piece.start for piece in pieces]
        for batch in plan_batches(lens, self.budget_frames if budget_frames is None else budget_frames):
            for piece, ids, scores in self._run(features, pieces, batch):
                parts[piece.item].append((piece.kept_start, ids, scores))
        return self._collapse(parts)

    def _pieces(self, item: int, frames: int) -> Iterator[_Piece]:
        if frames <= MAX_PASS_FRAMES:
            if frames:
                yield _Piece(item, 0, frames, 0, frames)
            return
        for start in range(0, frames, WINDOW_FRAMES):
            end = min(start + WINDOW_FRAMES, frames)
            yield _Piece(item, max(start - CONTEXT_FRAMES, 0), min(end + CONTEXT_FRAMES, frames), start, end)

    def _run(
        self, features: Sequence[Tensor], pieces: list[_Piece], batch: Batch
    ) -> Iterator[tuple[_Piece, Tensor, Tensor]]:
        """Ids and scores [kept encoder frames] of each piece of a batch, on the host.

        A batch that does not fit the device's memory is halved until it does; one item that does not is an error.
        """
        members = [pieces[index] for index in batch.indices]
        try:
            frames = self._score(features, members, batch.frames)
        except torch.OutOfMemoryError:
            if len(members) == 1:
                raise
            torch.cuda.empty_cache()
            middle = len(members) // 2
            for half in (batch.indices[:middle], batch.indices[middle:]):
                yield from self._run(features, pieces, Batch(half, batch.frames))
            return
        ids, scores = frames.ids.cpu(), frames.scores.cpu()
        for row, piece in enumerate(members):
            first = self.config.encoder.subsample(piece.kept_start - piece.start)
            last = self.config.encoder.subsample(piece.kept_end - piece.start)
            yield piece, ids[row, first:last], scores[row, first:last]

    def _score(self, features: Sequence[Tensor], members: list[_Piece], frames: int) -> FrameScores:
        padded = torch.zeros(len(members), frames, self.config.encoder.n_mels, dtype=self.dtype)
        for row, piece in zip(padded, members, strict=True):
            row[: piece.end - piece.start] = features[piece.item][piece.start : piece.end]
        lens = torch.tensor([piece.end - piece.start for piece in members])
        logits, out_lens = self.model(padded.to(self.device), lens.to(self.device), bool((lens < frames).any()))
        return score_frames(logits, out_lens, self.config.blank_id)

    def _collapse(self, parts: list[list[tuple[int, Tensor, Tensor]]]) -> list[Tokens]:
        """Join each item's pieces frame by frame, then collapse all items together."""
        joined_ids, joined_scores = [], []
        for item_parts in parts:
            item_parts.sort(key=lambda part: part[0])
            joined_ids.append(torch.cat([torch.empty(0, dtype=torch.int64), *(ids for _, ids, _ in item_parts)]))
            joined_scores.append(torch.cat([torch.empty(0), *(scores for _, _, scores in item_parts)]))
        lens = torch.tensor([len(ids) for ids in joined_ids], dtype=torch.int64)
        if not parts:
            return []
        blank = self.config.blank_id
        ids = torch.nn.utils.rnn.pad_sequence(joined_ids, batch_first=True, padding_value=blank)
        scores = torch.nn.utils.rnn.pad_sequence(joined_scores, batch_first=True)
        return unpack_tokens(FrameScores(ids, scores, lens), blank)
