"""What every worker runs: steps over its part of the data, measurements, checkpoints; only the first worker writes.

All workers hold the same parameters at every step. A step depends only on the checkpoint, the seed and the step's
number, so that a run that was killed and resumed ends with the parameters of one that was not.
"""

import contextlib
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence

from jobs.models import ModelReference
from jobs.storage.files import Storage
from jobs.training.batches import Step, TrainingBatches
from jobs.training.checkpoint import Progress, load_checkpoint_into, save_checkpoint
from jobs.training.config import FinetuneConfig
from jobs.training.data import PreparedAudio
from jobs.training.labels import Utterances
from jobs.training.metrics import ErrorCounts, MetricsLog
from parakeet_core.batching import plan_batches
from parakeet_core.config import ModelConfig
from parakeet_core.ctc import ParakeetCTC, ctc_loss
from parakeet_core.decoding import decode_greedy
from parakeet_core.export import weights_file
from parakeet_core.features import LogMelFrontend
from parakeet_core.tokenizer import Tokenizer
from parakeet_core.training import CTCObjective, LearningRate, build_optimiser, copy_weights, freeze_batch_norm

MODEL_FOLDER = "model"
MICRO_BATCH_S = {"cpu": 80.0, "cuda": 400.0}  # on a CPU small batches make better use of the cache


@dataclass(frozen=True)
class TrainingTask:
    """Everything that a worker needs; can be pickled.

    Attributes:
        start: the checkpoint to start from; None for random weights.
        keeps_head: whether that checkpoint's head is kept.
    """

    config: FinetuneConfig
    output: Storage
    model: ModelConfig
    start: ModelReference | None
    keeps_head: bool
    tokenizer: Tokenizer
    train: Utterances
    validation: Utterances
    device: str
    threads: int

    def data(self, split: str) -> PreparedAudio:
        return PreparedAudio(Storage(f"{self.output.url}/data/{split}", self.output.options))


def build_model(task: TrainingTask) -> ParakeetCTC:
    """The model before the first step, float32, in training mode; the same on every worker.

    Weights that do not come from a checkpoint have PyTorch's initialisation: with the reference's (standard deviation
    0.02 for all) the convolutions of a small model pass on almost no signal, and it never learns to emit anything but
    blanks.
    """
    torch.manual_seed(task.config.seed)
    model = ParakeetCTC(task.model)
    if task.start is not None:
        copy_weights(task.start.load("float32", "cpu").model, model, task.keeps_head)
    return model.train()


def train_worker(task: TrainingTask) -> None:
    """The function that the `TorchTrainer` runs in every worker."""
    torch.set_num_threads(task.threads)
    import ray.train.torch  # the loop itself runs without Ray

    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    TrainingRun(task, context.get_world_rank(), context.get_world_size(), device).run()


class TrainingRun:
    """One worker's side of a run.

    Args:
        rank, world: this worker's number, and the number of workers; with more than one, torch's process group is
            already initialised.
    """

    def __init__(self, task: TrainingTask, rank: int, world: int, device: torch.device):
        config, frontend = task.config, task.model.frontend
        self.task, self.config, self.rank, self.world, self.device = task, config, rank, world, device
        self.model = build_model(task).to(device)
        self.optimiser = build_optimiser(self.model, config.weight_decay)
        resumed = load_checkpoint_into(task.output, self.model, self.optimiser)
        self.progress = resumed or Progress()
        self.log = MetricsLog(task.output, resumed.step if resumed else -1) if rank == 0 else None
        objective = CTCObjective(self.model)
        self.objective: nn.Module = objective
        if world > 1:
            devices = [device] if device.type == "cuda" else None
            self.objective = DistributedDataParallel(objective, device_ids=devices)
            # As an attribute: torch 2.13 renamed the argument. `_share_statistics` keeps BatchNorm's buffers equal.
            self.objective.broadcast_buffers = False
        frames_per_s = 1 / frontend.frame_s
        micro_s = config.micro_batch_audio_s or MICRO_BATCH_S[device.type]
        self.micro_frames = micro_s * frames_per_s
        self.batches = TrainingBatches(
            task.train,
            task.data("train"),
            LogMelFrontend(frontend),
            config.batch_audio_s * frames_per_s,
            self.micro_frames,
            config.speed_factors,
            config.spec_augment(),
            config.seed,
            rank,
            world,
            task.threads,
        )
        self.total_steps = config.max_steps or max(1, round(config.epochs * self.batches.steps_per_epoch()))
        self.rate = LearningRate(config.learning_rate, config.warmup_steps, self.total_steps, config.schedule)
        half = config.precision == "bfloat16" or (config.precision == "auto" and device.type == "cuda")
        self.autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=half)

    def run(self) -> None:
        """Train from the last checkpoint to the last step, or until patience runs out.

        The initial model is measured as well, so that the exported model is never worse than it.
        """
        self._checkpointed = time.monotonic()
        if self.progress.step == 0:
            self._measure()
        tally = StepTally()
        for step in self.batches.steps(self.progress.position):
            if self.done:
                break
            loss, norm = self._step(step)
            tally.add(loss, step, norm)
            number = self.progress.step
            if number % self.config.log_steps == 0:
                self._log_steps(tally)
                tally = StepTally()
            measured = number % self.config.validate_steps == 0 or number == self.total_steps
            if measured:
                self._measure()
                tally.leave_out_pause()
            # An exported model is recorded with its error rate, so that no worse one replaces it after a kill.
            if (measured and self.progress.best_step == number) or self._checkpoint_due() or self.done:
                self._checkpoint()

    @property
    def done(self) -> bool:
        return is_done(self.progress, self.total_steps, self.config.patience)

    def _step(self, step: Step) -> tuple[Tensor, float]:
        """One optimiser step: (this worker's share of the mean loss of the global batch, norm of the gradient)."""
        number = self.progress.step
        # Seeds this step's dropout independently of what ran before, so that a resumed run draws the same.
        torch.manual_seed(int(np.random.SeedSequence([self.config.seed, number, self.rank]).generate_state(1)[0]))
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate.at(number)
        if self.config.freeze_batch_norm:
            freeze_batch_norm(self.model)
        self.optimiser.zero_grad(set_to_none=True)
        statistics = [buffer.clone() for buffer in self.model.buffers()]
        total = torch.zeros((), device=self.device)
        for index, micro_batch in enumerate(step.micro_batches):
            last = index + 1 == len(step.micro_batches)
            # Workers exchange gradients once, in the last pass, and average them: hence the factor `world`.
            with contextlib.nullcontext() if last or self.world == 1 else self.objective.no_sync():
                with self.autocast():
                    loss = self.objective(*vars(micro_batch.to(self.device)).values()) * (step.weight / step.items)
                (loss * self.world).backward()
            total += loss.detach()
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm))
        finite = bool(np.isfinite(norm))
        if finite:
            self.optimiser.step()
        else:  # a pass that is not finite also spoils BatchNorm's statistics
            for buffer, before in zip(self.model.buffers(), statistics, strict=True):
                buffer.copy_(before)
        self._share_statistics()
        skipped = self.progress.skipped + (not finite)
        self.progress = replace(self.progress, step=number + 1, position=step.after, skipped=skipped)
        return total, norm

    def _share_statistics(self) -> None:
        """Average BatchNorm's running statistics over the workers, so that all hold the same model."""
        if self.world == 1 or self.config.freeze_batch_norm:
            return
        buffers = [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]
        joined = torch.cat([buffer.flatten() for buffer in buffers])
        dist.all_reduce(joined)
        for buffer, mean in zip(buffers, (joined / self.world).split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(mean.unflatten(0, buffer.shape))

    def _log_steps(self, tally: "StepTally") -> None:
        loss, frames = self._summed([float(tally.loss), tally.frames])
        if self.log:
            self.log.add(
                step=self.progress.step,
                total_steps=self.total_steps,
                epoch=self.progress.position.epoch,
                loss=round(loss / tally.steps, 5),
                gradient_norm=round(tally.norm / tally.steps, 4),
                learning_rate=self.rate.at(self.progress.step - 1),
                skipped=self.progress.skipped,
                rtfx=round(frames * self.task.model.frontend.frame_s / tally.seconds, 1),
                at=round(time.time(), 1),
            )

    def _measure(self) -> None:
        """Measure the error rate on the validation set, and export the model if it is the best so far."""
        counts = self._error_counts()
        gain = self.progress.best_wer is None or counts.wer < self.progress.best_wer
        self.progress = replace(
            self.progress,
            best_wer=counts.wer if gain else self.progress.best_wer,
            best_step=self.progress.step if gain else self.progress.best_step,
            measured_step=self.progress.step,
            without_gain=0 if gain else self.progress.without_gain + 1,
        )
        if self.log:
            if gain:
                name, content = weights_file(self.model, self.config.export_dtype)
                self.task.output.write_atomic(f"{MODEL_FOLDER}/{name}", content)
            self.log.add(
                step=self.progress.step,
                validation_wer=round(counts.wer, 6),
                validation_cer=round(counts.cer, 6),
                validation_loss=round(counts.loss / max(counts.items, 1), 5),
                items=counts.items,
                best=gain,
                at=round(time.time(), 1),
            )
            self.log.write()

    @torch.no_grad()
    def _error_counts(self) -> ErrorCounts:
        """Counts over the whole validation set, of which each worker computes a part."""
        validation, counts = self.task.validation, ErrorCounts()
        own = list(range(self.rank, len(validation), self.world))
        audio, frontend = self.task.data("validation"), LogMelFrontend(self.task.model.frontend)
        self.model.eval()
        for batch in plan_batches(validation.frames[own].tolist(), self.micro_frames):
            items = [own[index] for index in batch.indices]
            waveforms = [audio.waveform(validation.files[item], validation.rows[item]) for item in items]
            features, lens = (tensor.to(self.device) for tensor in frontend(waveforms))
            with self.autocast():
                logits, out_lens = self.model(features, lens)
            targets = [torch.tensor(validation.token_ids[item], device=self.device) for item in items]
            target_lens = torch.tensor([len(target) for target in targets], device=self.device)
            blank = self.task.model.blank_id
            losses = ctc_loss(logits, out_lens, pad_sequence(targets, True), target_lens, blank, "none")
            counts.loss += float((losses / target_lens.clamp(min=1)).sum())
            for item, tokens in zip(items, decode_greedy(logits, out_lens, blank), strict=True):
                counts.add(validation.texts[item], self.task.tokenizer.decode(tokens.ids.tolist()))
        self.model.train()
        return ErrorCounts(*self._summed(counts.values()))

    def _checkpoint_due(self) -> bool:
        late = time.monotonic() - self._checkpointed > 60 * self.config.checkpoint_minutes
        return late or self.progress.step % self.config.checkpoint_steps == 0

    def _checkpoint(self) -> None:
        self._checkpointed = time.monotonic()
        if self.log:
            self.log.write()  # first, because a resumed run keeps the lines up to the checkpoint
            save_checkpoint(self.task.output, self.progress, self.model, self.optimiser)

    def _summed(self, values: tuple[float, ...] | list[float]) -> list[float]:
        """Sums over the workers."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()


def is_done(progress: Progress, total_steps: int, patience: int | None) -> bool:
    """Whether a run is finished: all steps done, or too many measurements without a gain."""
    return progress.step >= total_steps or (patience is not None and progress.without_gain >= patience)


class StepTally:
    """Sums over the steps between two lines of metrics."""

    def __init__(self):
        self.loss, self.norm, self.steps, self.frames, self.seconds = 0.0, 0.0, 0, 0, 1e-9
        self.leave_out_pause()

    def leave_out_pause(self) -> None:
        """Do not count the time since the last step, which a measurement took, as training time."""
        self._since = time.monotonic()

    def add(self, loss: Tensor, step: Step, norm: float) -> None:
        self.loss = self.loss + loss
        self.norm += norm if np.isfinite(norm) else 0.0
        self.steps += 1
        self.frames += sum(int(batch.lens.sum()) for batch in step.micro_batches)
        now = time.monotonic()
        self.seconds += now - self._since
        self._since = now
