"""What training adds to the model: the objective over a global batch, the optimiser, its learning rate.

Knows nothing of data, workers or checkpoints. Shapes: `B` batch, `T` feature frames, `M` mel bins, `L` target tokens.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from parakeet_core.ctc import ParakeetCTC

Schedule = Literal["cosine", "noam"]


class CTCObjective(nn.Module):
    """The model and its loss as one module, so that data-parallel training wraps a single `forward`."""

    def __init__(self, model: ParakeetCTC):
        super().__init__()
        self.model = model

    def forward(self, features: Tensor, lens: Tensor, targets: Tensor, target_lens: Tensor) -> Tensor:
        """Sum over the items of the loss per target token, a scalar. Divided by the number of items in the global
        batch, it is what `ParakeetCTC.loss` calls "mean", however the batch is split.

        Args:
            features: [B, T, M] float.
            lens: [B] valid frames.
            targets: [B, L] token ids.
            target_lens: [B].
        """
        losses = self.model.loss(features, lens, targets, target_lens, reduction="none", zero_infinity=True)
        return (losses / target_lens.clamp(min=1)).sum()


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up to `peak`, then a cosine to zero at `total_steps`, or Noam's inverse square root.

    Source: SGDR (arXiv:1608.03983) without restarts; Noam: arXiv:1706.03762, scaled to reach `peak` after warm-up.
    """

    peak: float
    warmup_steps: int
    total_steps: int
    schedule: Schedule = "cosine"

    def at(self, step: int) -> float:
        """The rate at step `step`, counted from 0."""
        warmup = max(self.warmup_steps, 1)
        if step < warmup:
            return self.peak * (step + 1) / warmup
        if self.schedule == "noam":
            return self.peak * math.sqrt(warmup / (step + 1))
        share = (step - warmup) / max(self.total_steps - warmup, 1)
        return self.peak * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def build_optimiser(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with weight decay for matrices and kernels only, not for norms, biases and scalars."""
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        bias = name.rpartition(".")[2].startswith("bias")  # of any shape: attention's are [H, K]
        (kept if bias or parameter.ndim <= 1 else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98))  # as in NeMo's recipes; the rate is set at every step


def freeze_batch_norm(model: nn.Module) -> None:
    """Put every BatchNorm in eval mode, so that its running statistics stay fixed. `model.train()` undoes this."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()


def copy_weights(source: ParakeetCTC, model: ParakeetCTC, with_head: bool) -> None:
    """Copy the weights of `source` to `model`, which keeps its own head if `with_head` is false (a new vocabulary)."""
    own = model.state_dict()
    weights = source.state_dict()
    model.load_state_dict(
        {name: weights[name] if with_head or not name.startswith("ctc_head.") else own[name] for name in own}
    )
