"""Features of many items -> tokens of each: batches by length, the model, greedy decoding, order restored.

Shapes: `B` batch, `S` samples, `T` feature frames, `U` encoder frames, `M` mel bins. Knows nothing of audio files or of
text.
"""

import copy
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from parakeet_core.batching import Batch, frame_cost, plan_batches
from parakeet_core.checkpoint import Checkpoint
from parakeet_core.ctc import ParakeetCTC
from parakeet_core.decoding import FrameScores, score_frames, unpack_tokens
from parakeet_core.device import device_failed, mark_stream, processor_multiplies, send_to_host, set_up_cuda
from parakeet_core.errors import ErrorKind, InputError
from parakeet_core.quantised import quantise_linears
from parakeet_core.words import Tokens

# An item of up to MAX_PASS_FRAMES goes through the model in one pass, equal to the reference. Published checkpoints
# were trained with positions up to 5000 encoder frames (400 s), and attention's work grows with the square of the
# length. Longer items are cut into windows; each window also sees CONTEXT_FRAMES on both sides but yields only its own
# frames.
MAX_PASS_FRAMES = 30_000  # feature frames, 300 s
WINDOW_FRAMES = 6_144  # feature frames, 61 s, that one window yields; whole encoder frames at any subsampling factor
CONTEXT_FRAMES = 1_024  # feature frames, 10 s, that it also sees on each side
COLLAPSE_FRAMES = 100_000  # encoder frames collapsed at once: a few MB, and one long item does not pad all others
CPU_BUDGET_FRAMES = 6_000  # cost of a batch in float32, twice that in half precision: larger states leave the cache
CUDA_BUDGET_FRAMES = 200_000  # about 2000 s of short items: enough rows to fill the matrix units of a large GPU
FEATURE_BUDGET_FRAMES = 120_000  # cost of a batch of waveforms: 20 minutes, 77 MB of samples
BATCHES_AHEAD = 2  # on CUDA: one running and one queued, so that the device never waits for the host
# Feature frames of batches of one item, of several, and of several with padding, at 65 encoder frames and at 72, since
# torch's attention treats multiples of eight differently. No two dimensions are equal: compiled code would assume that
# they always are.
WARM_UP = ((519,), (201,), (519, 519, 519), (519, 519, 487), (576,), (576, 576, 576), (576, 576, 540))
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Piece:
    """Part of an item that goes through the model at once; positions in feature frames of the item."""

    item: int
    start: int  # first frame the model sees
    end: int
    kept_start: int  # frames whose tokens are kept; multiples of the subsampling factor, or the item's end
    kept_end: int


@dataclass(frozen=True)
class _Started:
    """A batch sent to the device: its results, on the host once `done` has occurred, or why it could not be run."""

    members: list[_Piece]
    frames: FrameScores | None = None
    begun: torch.cuda.Event | None = None
    done: torch.cuda.Event | None = None  # None: the results are there
    busy_s: float = 0.0  # of the device, if there are no events
    error: InputError | None = None


@dataclass(frozen=True)
class _Part:
    """The model's output for a piece: ids and scores of its kept encoder frames, or why it could not be run."""

    piece: _Piece
    ids: Tensor | None = None
    scores: Tensor | None = None
    error: InputError | None = None


class Engine:
    """Runs a checkpoint's model over features.

    Several threads may call it: while one waits for the device or collapses its output, another sends.

    Args:
        checkpoint: its model is on the device and in the dtype to run in. On a CPU without instructions for that dtype
            the model runs in float32, with the weights as rounded to that dtype: 5 times faster, and more exact. If
            the checkpoint says `int8`, the layers' linears are quantised.
        budget_frames: greatest cost of a batch (see `batching`); by default one that suits the device. It is lowered
            when a batch does not fit the device's memory.
        compiled: whether the layers run as generated code, which takes a minute at the start of the first process on a
            node; by default only on CUDA. On a CPU it would pay off after a hundred hours of audio.
    """

    def __init__(self, checkpoint: Checkpoint, budget_frames: float | None = None, compiled: bool | None = None):
        model, parameter = checkpoint.model, next(checkpoint.model.parameters())
        if parameter.device.type == "cpu" and not processor_multiplies(parameter.dtype):
            log.info("no %s instructions in this processor: the model runs in float32", parameter.dtype)
            model = copy.deepcopy(model).float()
            parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        if self.device.type == "cuda":
            set_up_cuda(self.dtype)
        self.config = checkpoint.config
        self._prepare(model, checkpoint.int8)
        self.not_compiled: str | None = None  # why compilation failed, if it did
        self.frontend = checkpoint.frontend
        self._sending = threading.Lock()  # batches are sent whole, one after the other
        default = CUDA_BUDGET_FRAMES
        if self.device.type == "cpu":
            default = CPU_BUDGET_FRAMES * torch.float32.itemsize // self.dtype.itemsize
        self.budget_frames = default if budget_frames is None else budget_frames
        if compiled or (compiled is None and self.device.type == "cuda"):
            self.model.compile_layers()
            try:
                self.warm_up()
            except Exception as error:  # noqa: BLE001 - whatever goes wrong in a compiler, e.g. on a node without gcc
                if device_failed(error):
                    raise
                self.not_compiled = f"{type(error).__name__}: {error}"
                log.warning("the layers cannot be compiled, and run slower as they are: %.500s", self.not_compiled)
                self._prepare(model, checkpoint.int8)

    def _prepare(self, model: ParakeetCTC, int8: bool) -> None:
        self.model = model.prepare_inference()
        if int8:
            quantise_linears(self.model.layers)

    def warm_up(self) -> None:
        """Run small batches of every kind, so that all compilation happens before there is work."""
        mels = self.config.encoder.n_mels
        for lens in WARM_UP:
            self.recognise([torch.zeros(frames, mels) for frames in lens], budget_frames=float("inf"))

    @torch.no_grad()
    def extract_features(self, waveforms: Sequence[Tensor], steps: Sequence[float] | None = None) -> list[Tensor]:
        """Features [T, M] of each waveform (see `LogMelFrontend`), on the device and in the dtype of the model.

        Args:
            waveforms: [S] each, on the host and all of one dtype: float at full scale 1.0, or integers.
            steps: factor for each waveform that brings its samples to full scale 1.0; 1.0 by default.
        """
        lens = [self.config.frontend.frames(len(waveform)) for waveform in waveforms]
        features: list[Tensor | None] = [None] * len(lens)
        for batch in plan_batches(lens, FEATURE_BUDGET_FRAMES):
            chosen = [waveforms[item] for item in batch.indices]
            found = self._features(chosen, [1.0 if steps is None else steps[item] for item in batch.indices])
            for item, rows in zip(batch.indices, found, strict=True):
                features[item] = rows
        return features

    def _features(self, waveforms: Sequence[Tensor], steps: Sequence[float]) -> list[Tensor]:
        """As `extract_features`, in one batch; if the device's memory cannot hold it, one by one on the host."""
        try:
            return self._extract(self._send(waveforms), steps, self.device)
        except torch.OutOfMemoryError:
            log.warning("%d waveforms do not fit %s: their features come from the host", len(waveforms), self.device)
        torch.cuda.empty_cache()
        host = torch.device("cpu")
        return [self._extract([samples], [step], host)[0] for samples, step in zip(waveforms, steps, strict=True)]

    def _extract(self, waveforms: Sequence[Tensor], steps: Sequence[float], device: torch.device) -> list[Tensor]:
        """Features, on `device`, of waveforms that are there."""
        scaled = [samples.float() * step for samples, step in zip(waveforms, steps, strict=True)]
        padded, _ = self.frontend(scaled, device)
        frames = [self.config.frontend.frames(len(samples)) for samples in waveforms]
        return [row[:count] for row, count in zip(padded.to(self.dtype), frames, strict=True)]

    def _send(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """One-dimensional tensors on the device; to CUDA in a single copy, without waiting for it.

        Separate copies would each wait for the batches that the device is working on.
        """
        if self.device.type == "cpu":
            return tensors
        sizes = [len(tensor) for tensor in tensors]
        joined = torch.empty(sum(sizes), dtype=tensors[0].dtype, pin_memory=self.device.type == "cuda")
        torch.cat(list(tensors), out=joined)
        return joined.to(self.device, non_blocking=True).split(sizes)

    @torch.no_grad()
    def recognise(
        self,
        features: Sequence[Tensor],
        budget_frames: float | None = None,
        busy: Callable[[float], None] | None = None,
    ) -> list[Tokens | InputError]:
        """Tokens of each item, in the order given; an error of kind OUT_OF_MEMORY for one that does not fit the device.

        Args:
            features: per item [T, M], float, on any device; T may be 0, which gives no tokens.
            budget_frames: greatest cost of a batch, in place of the engine's own.
            busy: called with the seconds that the device took for each batch.
        """
        pieces = [piece for item, tensor in enumerate(features) for piece in self._pieces(item, tensor.shape[0])]
        parts: list[list[_Part]] = [[] for _ in features]
        lens = [piece.end - piece.start for piece in pieces]
        batches = plan_batches(lens, self.budget_frames if budget_frames is None else budget_frames)
        for part in self._run(features, pieces, batches, busy or (lambda seconds: None)):
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

    def _run(
        self,
        features: Sequence[Tensor],
        pieces: list[_Piece],
        batches: Sequence[Batch],
        busy: Callable[[float], None],
    ) -> Iterator[_Part]:
        """Parts of all batches; the host pads and sends a batch while the device computes those before it."""
        started: deque[_Started] = deque()
        for batch in batches:
            started.extend(self._start(features, pieces, batch))
            while len(started) > BATCHES_AHEAD:
                yield from self._finish(started.popleft(), busy)
        while started:
            yield from self._finish(started.popleft(), busy)

    def _start(self, features: Sequence[Tensor], pieces: list[_Piece], batch: Batch) -> list[_Started]:
        """Send a batch to the device; one that does not fit its memory is halved until it does.

        From then on, batches are planned no larger than the halves: each one that does not fit costs the device's
        cache of memory.
        """
        members = [pieces[index] for index in batch.indices]
        try:
            return [self._score(features, members, batch.frames)]
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
        if len(members) == 1:
            return [_Started(members, error=self._too_large(batch.frames))]
        log.warning("a batch of %d x %d frames does not fit %s: halved", len(members), batch.frames, self.device)
        self.budget_frames = min(self.budget_frames, len(members) * frame_cost(batch.frames) / 2)
        middle = len(members) // 2
        halves = [Batch(half, batch.frames) for half in (batch.indices[:middle], batch.indices[middle:])]
        return [started for half in halves for started in self._start(features, pieces, half)]

    def _finish(self, started: _Started, busy: Callable[[float], None]) -> Iterator[_Part]:
        if started.done is not None:
            started.done.synchronize()
            busy(started.begun.elapsed_time(started.done) / 1000)
        else:
            busy(started.busy_s)
        for row, piece in enumerate(started.members):
            if started.error is not None:
                yield _Part(piece, error=started.error)
                continue
            first = self.config.encoder.subsample(piece.kept_start - piece.start)
            last = self.config.encoder.subsample(piece.kept_end - piece.start)
            yield _Part(piece, started.frames.ids[row, first:last], started.frames.scores[row, first:last])

    def _too_large(self, frames: int) -> InputError:
        seconds = frames * self.config.frontend.frame_s
        return InputError(
            ErrorKind.OUT_OF_MEMORY,
            f"{seconds:.0f} s of audio do not fit the memory of {self.device} alone; use a device with more memory, or "
            "give the item as shorter segments",
        )

    def _score(self, features: Sequence[Tensor], members: list[_Piece], frames: int) -> _Started:
        """Ids and posteriors of a batch; on CUDA without waiting for them.

        Copies run on the stream of the work, in order with it: a second of audio is 16 kB of features, which take under
        a microsecond on the link, while the model takes some 50. From pinned memory they run while the host continues.
        """
        lens = torch.tensor([piece.end - piece.start for piece in members], pin_memory=self.device.type == "cuda")
        shorter = bool((lens < frames).any())
        padded = self._pad(features, members, frames)
        with self._sending:
            begun, started_at = mark_stream(self.device), time.perf_counter()
            padded = padded.to(self.device, non_blocking=True).to(self.dtype)
            lens = lens.to(self.device, non_blocking=True)
            logits, out_lens = self.model(padded, lens, shorter)
            scored = score_frames(logits, out_lens, self.config.blank_id)
            if begun is None:
                return _Started(members, scored, busy_s=time.perf_counter() - started_at)
            host = FrameScores(*(send_to_host(tensor) for tensor in (scored.ids, scored.scores, scored.lens)))
            return _Started(members, host, begun, mark_stream(self.device))

    def _pad(self, features: Sequence[Tensor], members: list[_Piece], frames: int) -> Tensor:
        """[B, T, M], on the device if the features are, else on the host; in their dtype, or on a CPU the model's."""
        there = any(features[piece.item].device == self.device for piece in members)
        padded = torch.zeros(
            len(members),
            frames,
            self.config.encoder.n_mels,
            dtype=self.dtype if self.device.type == "cpu" else features[members[0].item].dtype,
            device=self.device if there else "cpu",
            pin_memory=not there and self.device.type == "cuda",
        )
        for row, piece in zip(padded, members, strict=True):
            row[: piece.end - piece.start] = features[piece.item][piece.start : piece.end]
        return padded

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
