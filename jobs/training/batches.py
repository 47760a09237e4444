"""Utterances -> the batches of a run, in an order that is a pure function of the seed, with features computed ahead.

    epoch -> global batches (one optimiser step each) -> a worker's part -> micro-batches (one pass of the model each)

A global batch does not depend on the number of workers, and an utterance is augmented with random numbers seeded by
(seed, epoch, utterance). So a run can be resumed at any step, with any number of workers, and sees the same data.
"""

import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from jobs.training.data import PreparedAudio
from jobs.training.labels import Utterances
from parakeet_core.augment import SpecAugment, perturb_speed
from parakeet_core.batching import plan_batches
from parakeet_core.features import LogMelFrontend

LENGTH_JITTER = 0.1  # relative noise on the lengths before sorting, so that no two epochs have the same batches
STEPS_AHEAD = 2  # batches prepared before they are asked for: the next one, and another in case it takes longer


@dataclass(frozen=True)
class Position:
    """The next batch of a run: `batch` of `epoch`, both counted from 0."""

    epoch: int = 0
    batch: int = 0


@dataclass(frozen=True)
class MicroBatch:
    """Features [B, T, M] float32 with lens [B], and targets [B, L] with target_lens [B]."""

    features: Tensor
    lens: Tensor
    targets: Tensor
    target_lens: Tensor

    def to(self, device: torch.device) -> "MicroBatch":
        return MicroBatch(*(tensor.to(device, non_blocking=True) for tensor in vars(self).values()))


@dataclass(frozen=True)
class Step:
    """A worker's part of one optimiser step.

    Attributes:
        micro_batches: at least one, even if the worker has no utterance of its own; see `weight`.
        items: number of utterances in the global batch.
        weight: of the losses; 0 for a worker without utterances, which runs another worker's in order to take part.
        after: the position after this step.
    """

    micro_batches: list[MicroBatch]
    items: int
    weight: float
    after: Position


def epoch_batches(frames: np.ndarray, batch_frames: float, seed: int, epoch: int) -> list[np.ndarray]:
    """The global batches of an epoch: utterances of similar length together, batches in random order.

    Args:
        frames: [N], of each utterance.
        batch_frames: average frames of a batch; the batches of an epoch are about equally large.

    Returns:
        Arrays of indices that together contain every utterance exactly once.
    """
    rng = np.random.default_rng([seed, epoch])
    jitter = rng.uniform(1 - LENGTH_JITTER, 1 + LENGTH_JITTER, len(frames))
    order = np.argsort(frames * jitter, kind="stable")
    ends = np.cumsum(frames[order])
    count = max(1, round(float(ends[-1]) / batch_frames))
    batch_of = np.minimum((ends - frames[order] / 2) * count // ends[-1], count - 1)
    batches = [batch for batch in np.split(order, np.flatnonzero(np.diff(batch_of)) + 1) if len(batch)]
    return [batches[place] for place in rng.permutation(len(batches))]


class TrainingBatches:
    """The steps of one worker, from any position on.

    Args:
        audio: of the split.
        batch_frames: average frames of a global batch.
        micro_frames: maximum cost of a micro-batch, in frames (see `parakeet_core.batching`).
        speeds, augment: how utterances are changed.
        rank, world: this worker's number, and the number of workers.
        threads: number of threads that compute features.
    """

    def __init__(
        self,
        utterances: Utterances,
        audio: PreparedAudio,
        frontend: LogMelFrontend,
        batch_frames: float,
        micro_frames: float,
        speeds: tuple[float, ...],
        augment: SpecAugment,
        seed: int,
        rank: int = 0,
        world: int = 1,
        threads: int = 1,
    ):
        self.utterances, self.audio, self.frontend = utterances, audio, frontend
        self.batch_frames, self.micro_frames = batch_frames, micro_frames
        self.speeds, self.augment, self.seed = speeds, augment, seed
        self.rank, self.world, self.threads = rank, world, threads

    def steps_per_epoch(self) -> int:
        return len(epoch_batches(self.utterances.frames, self.batch_frames, self.seed, 0))

    def steps(self, position: Position) -> Iterator[Step]:
        """Steps from `position` on, without end."""
        waiting: deque[tuple[list[np.ndarray], list[Future], int, float, Position]] = deque()
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="features")
        try:
            for epoch, batch, after in self._global_batches(position):
                groups, weight = self._micro_groups(batch)
                futures = [pool.submit(self._features, int(item), epoch) for group in groups for item in group]
                waiting.append((groups, futures, len(batch), weight, after))
                if len(waiting) > STEPS_AHEAD:
                    yield self._collate(*waiting.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _global_batches(self, position: Position) -> Iterator[tuple[int, np.ndarray, Position]]:
        for epoch in itertools.count(position.epoch):
            batches = epoch_batches(self.utterances.frames, self.batch_frames, self.seed, epoch)
            start = position.batch if epoch == position.epoch else 0
            for number in range(start, len(batches)):
                last = number + 1 == len(batches)
                yield epoch, batches[number], Position(epoch + 1, 0) if last else Position(epoch, number + 1)

    def _micro_groups(self, batch: np.ndarray) -> tuple[list[np.ndarray], float]:
        """This worker's utterances of a global batch, in micro-batches, and the weight of their losses."""
        frames = self.utterances.frames
        dealt = batch[np.argsort(frames[batch], kind="stable")]
        own, weight = dealt[self.rank :: self.world], 1.0
        if not len(own):
            own, weight = dealt[:1], 0.0
        return [own[list(group.indices)] for group in plan_batches(frames[own].tolist(), self.micro_frames)], weight

    def _features(self, item: int, epoch: int) -> Tensor:
        """[T, M] of one utterance, augmented."""
        rng = np.random.default_rng([self.seed, epoch, item])
        waveform = self.audio.waveform(self.utterances.files[item], self.utterances.rows[item])
        speed = float(rng.choice(self.speeds))
        waveform = perturb_speed(waveform, speed, self.frontend.config.sample_rate_hz)
        return self.augment(self.frontend([waveform])[0][0], rng)

    def _collate(
        self, groups: list[np.ndarray], futures: list[Future], items: int, weight: float, after: Position
    ) -> Step:
        features = iter([future.result() for future in futures])
        micro_batches = []
        for group in groups:
            rows = [next(features) for _ in group]
            targets = [torch.tensor(self.utterances.token_ids[item]) for item in group]
            micro_batches.append(
                MicroBatch(
                    pad_sequence(rows, batch_first=True),
                    torch.tensor([len(row) for row in rows]),
                    pad_sequence(targets, batch_first=True),
                    torch.tensor([len(target) for target in targets]),
                )
            )
        return Step(micro_batches, items, weight, after)
