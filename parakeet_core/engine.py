"""Features of many items -> tokens of each: batches by length, the model, greedy decoding, order restored.

Shapes: `B` batch, `T` feature frames, `U` encoder frames, `M` mel bins. Knows nothing of audio files or of text.
"""

import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from parakeet_core.batching import Batch, plan_batches
from parakeet_core.checkpoint import Checkpoint
from parakeet_core.decoding import FrameScores, Tokens, score_frames, unpack_tokens
from parakeet_core.errors import ErrorKind, InputError

# An item up to MAX_PASS_FRAMES is one pass of the model, equal to the reference. Published checkpoints were trained
# with positions up to 5000 encoder frames (400 s), and attention's memory grows with the square: 0.9 GB at 300 s with
# 8 heads in float32. Longer items are cut into windows that also see CONTEXT_FRAMES to both sides and give only their
# own frames.
MAX_PASS_FRAMES = 30_000  # feature frames, 300 s
WINDOW_FRAMES = 6_144  # feature frames, 61 s: what one window gives; whole encoder frames at any subsampling factor
CONTEXT_FRAMES = 1_024  # feature frames, 10 s: what it sees beyond, on each side
COLLAPSE_FRAMES = 100_000  # encoder frames collapsed together: some MB, and one long item does not pad all others
CPU_BUDGET_FRAMES = 3_000  # cost of a batch; on a CPU small batches, whose states stay in the cache, beat large ones
CUDA_BUDGET_FRAMES = 200_000  # about 2000 s of short items: enough rows to fill the matrix units of a large GPU
# Names in torch.cpu.get_capabilities() of instructions that multiply matrices of a dtype. Without them torch emulates:
# measured on AVX2, 19 GFLOP/s in bfloat16 against 110 to 150 in float32.
HALF_INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Piece:
    """Part of an item that goes through the model at once; all in feature frames of the item."""

    item: int
    start: int  # first frame the model sees
    end: int
    kept_start: int  # frames whose tokens are taken; multiples of the subsampling factor, or the item's end
    kept_end: int


@dataclass(frozen=True)
class _Part:
    """What the model says of a piece: ids and scores of its kept encoder frames, or why it could not be run."""

    piece: _Piece
    ids: Tensor | None = None
    scores: Tensor | None = None
    error: InputError | None = None


class Engine:
    """Runs a checkpoint's model over features.

    Args:
        checkpoint: its model is on the device and in the dtype to run in. On a CPU without instructions for that dtype
            the model runs in float32, with the weights as the dtype rounds them: 5 times faster, and more exact.
        budget_frames: greatest cost of a batch (see `batching`); by default one that suits the device.
    """

    def __init__(self, checkpoint: Checkpoint, budget_frames: float | None = None):
        model, parameter = checkpoint.model, next(checkpoint.model.parameters())
        if parameter.device.type == "cpu" and not processor_multiplies(parameter.dtype):
            log.info("no %s instructions in this processor: the model runs in float32", parameter.dtype)
            model = copy.deepcopy(model).float()
            parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.config = checkpoint.config
        self.model = model.prepare_inference()
        default = CPU_BUDGET_FRAMES if self.device.type == "cpu" else CUDA_BUDGET_FRAMES
        self.budget_frames = default if budget_frames is None else budget_frames

    @torch.no_grad()
    def recognise(self, features: Sequence[Tensor], budget_frames: float | None = None) -> list[Tokens | InputError]:
        """Tokens of each item, in the order given; an error of kind OUT_OF_MEMORY for one that the device cannot hold.

        Args:
            features: per item [T, M], float, on any device; T may be 0, which gives no tokens.
            budget_frames: greatest cost of a batch, instead of the engine's own.
        """
        pieces = [piece for item, tensor in enumerate(features) for piece in self._pieces(item, tensor.shape[0])]
        parts: list[list[_Part]] = [[] for _ in features]
        lens = [piece.end - piece.start for piece in pieces]
        for batch in plan_batches(lens, self.budget_frames if budget_frames is None else budget_frames):
            for part in self._run(features, pieces, batch):
                parts[part.piece.item].append(part)
        return self._collapse(parts)

    def _pieces(self, item: int, frames: int) -> Iterator[_Piece]:
        if frames <= MAX_PASS_FRAMES:
            if frames:
                yield _Piece(item, 0, frames, 0, frames)
            return
        for start in range(0, frames, WINDOW_FRAMES):
            end = min(start + WINDOW_FRAMES, frames)
            yield _Piece(item, max(start - CONTEXT_FRAMES, 0), min(end + CONTEXT_FRAMES, frames), start, end)

    def _run(self, features: Sequence[Tensor], pieces: list[_Piece], batch: Batch) -> Iterator[_Part]:
        """Ids and scores of each piece of a batch, on the host.

        A batch that does not fit the device's memory is halved until it does; a piece that does not is an error.
        """
        members = [pieces[index] for index in batch.indices]
        try:
            frames = self._score(features, members, batch.frames)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            if len(members) == 1:
                yield _Part(members[0], error=self._too_large(batch.frames))
                return
            middle = len(members) // 2
            for half in (batch.indices[:middle], batch.indices[middle:]):
                yield from self._run(features, pieces, Batch(half, batch.frames))
            return
        ids, scores = frames.ids.cpu(), frames.scores.cpu()
        for row, piece in enumerate(members):
            first = self.config.encoder.subsample(piece.kept_start - piece.start)
            last = self.config.encoder.subsample(piece.kept_end - piece.start)
            yield _Part(piece, ids[row, first:last], scores[row, first:last])

    def _too_large(self, frames: int) -> InputError:
        seconds = frames * self.config.frontend.frame_s
        return InputError(
            ErrorKind.OUT_OF_MEMORY,
            f"{seconds:.0f} s of audio do not fit the memory of {self.device} alone; use a device with more memory, or "
            "give the item as shorter segments",
        )

    def _score(self, features: Sequence[Tensor], members: list[_Piece], frames: int) -> FrameScores:
        padded = torch.zeros(len(members), frames, self.config.encoder.n_mels, dtype=self.dtype)
        for row, piece in zip(padded, members, strict=True):
            row[: piece.end - piece.start] = features[piece.item][piece.start : piece.end]
        lens = torch.tensor([piece.end - piece.start for piece in members])
        logits, out_lens = self.model(padded.to(self.device), lens.to(self.device), bool((lens < frames).any()))
        return score_frames(logits, out_lens, self.config.blank_id)

    def _collapse(self, parts: list[list[_Part]]) -> list[Tokens | InputError]:
        """Join each item's pieces frame by frame, then collapse items of similar length together."""
        results: list[Tokens | InputError | None] = [None] * len(parts)
        joined: list[tuple[Tensor, Tensor]] = []
        for item, item_parts in enumerate(parts):
            errors = [part.error for part in item_parts if part.error is not None]
            results[item] = errors[0] if errors else None
            item_parts.sort(key=lambda part: part.piece.kept_start)
            joined.append(
                (
                    torch.cat([torch.empty(0, dtype=torch.int64), *(part.ids for part in item_parts if not errors)]),
                    torch.cat([torch.empty(0), *(part.scores for part in item_parts if not errors)]),
                )
            )
        blank = self.config.blank_id
        for batch in plan_batches([len(ids) for ids, _ in joined], COLLAPSE_FRAMES):
            ids = pad_sequence([joined[item][0] for item in batch.indices], batch_first=True, padding_value=blank)
            scores = pad_sequence([joined[item][1] for item in batch.indices], batch_first=True)
            lens = torch.tensor([len(joined[item][0]) for item in batch.indices], dtype=torch.int64)
            for item, tokens in zip(batch.indices, unpack_tokens(FrameScores(ids, scores, lens), blank), strict=True):
                results[item] = results[item] or tokens
        return results


def processor_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for matrices of `dtype`; taken for granted where torch cannot tell."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if dtype not in HALF_INSTRUCTIONS or capabilities is None:
        return True
    return any(capabilities().get(name, False) for name in HALF_INSTRUCTIONS[dtype])
