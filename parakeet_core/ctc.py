"""The CTC model: encoder, head and loss. Decoding of its logits is in `decoding.py`.

Shapes: `B` batch, `T` feature frames, `U` encoder frames, `M` mel bins, `D` model width, `V` vocabulary with blank,
`L` target tokens.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parakeet_core.config import ModelConfig, Reduction
from parakeet_core.encoder import Encoder


class CTCHead(nn.Conv1d):
    """States [B, U, D] -> logits [B, U, V]. A convolution of kernel size 1, because checkpoints store [V, D, 1]."""

    def __init__(self, d_model: int, vocab_size: int):
        super().__init__(d_model, vocab_size, 1)

    def forward(self, states: Tensor) -> Tensor:
        return F.linear(states, self.weight.squeeze(-1), self.bias)


class ParakeetCTC(nn.Module):
    """FastConformer encoder with a CTC head, in the plain form: readable, trainable, one module per checkpoint key."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.encoder)
        self.ctc_head = CTCHead(config.encoder.d_model, config.vocab_size)

    def forward(self, features: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of a padded batch.

        Args:
            features: [B, T, M] in the model's dtype.
            lens: [B] integer, valid feature frames.

        Returns:
            logits [B, U, V] and their lens [B]; U = ceil(T / subsampling factor). Logits past an item's length are
            finite and meaningless.
        """
        states, lens = self.encoder(features, lens)
        return self.ctc_head(states), lens

    def loss(
        self,
        features: Tensor,
        lens: Tensor,
        targets: Tensor,
        target_lens: Tensor,
        reduction: Reduction | None = None,
        zero_infinity: bool | None = None,
    ) -> Tensor:
        """CTC loss of a padded batch; see `ctc_loss`. Reduction and zero_infinity default to the checkpoint's."""
        logits, lens = self(features, lens)
        config = self.config
        reduction = config.loss_reduction if reduction is None else reduction
        zero_infinity = config.loss_zero_infinity if zero_infinity is None else zero_infinity
        return ctc_loss(logits, lens, targets, target_lens, config.blank_id, reduction, zero_infinity)

    def prepare_inference(self) -> "torch.nn.Module":
        """The same function as a fused module for inference on this device and in this dtype; see `inference.py`.

        The plain model stays usable; tensors that both use are shared, not copied.
        """
        from parakeet_core.inference import InferenceModel  # imports this module's types

        return InferenceModel(self)


def ctc_loss(
    logits: Tensor,
    lens: Tensor,
    targets: Tensor,
    target_lens: Tensor,
    blank_id: int,
    reduction: Reduction = "mean",
    zero_infinity: bool = True,
) -> Tensor:
    """Connectionist temporal classification loss, computed in float32 whatever the dtype of the logits.

    Args:
        logits: [B, U, V].
        lens: [B], valid frames.
        targets: [B, L] integer token ids; columns from an item's length on, blanks and negative ids are dropped.
        target_lens: [B].
        reduction: "mean" divides each item's loss by its target length, then averages; "sum"; "none" gives [B].
        zero_infinity: losses (and gradients) of items whose target does not fit their frames become zero.

    Returns:
        Scalar, or [B] for "none", float32.

    Source: Graves et al. 2006; reductions as in torch.nn.functional.ctc_loss, which the reference calls.
    """
    log_probs = logits.float().log_softmax(-1).transpose(0, 1)  # [U, B, V]
    columns = torch.arange(targets.shape[1], device=targets.device)
    kept = (columns < target_lens[:, None]) & (targets >= 0) & (targets != blank_id)
    with torch.backends.cudnn.flags(enabled=False):  # as in the reference: cuDNN's CTC is not deterministic
        return F.ctc_loss(log_probs, targets[kept], lens, kept.sum(-1), blank_id, reduction, zero_infinity)
