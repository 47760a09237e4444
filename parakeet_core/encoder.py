"""FastConformer encoder in its plain form: features -> encoder states. Knows nothing of checkpoint files or decoding.

Shapes: `B` batch, `T` feature frames, `U` encoder frames, `M` mel bins, `D` model width, `H` heads, `K` head width,
`C` subsampling channels, `P` relative positions (2U - 1).

Submodule names are the keys of Hugging Face checkpoints. This form is for training and for reading; `inference.py`
has the same function in the form that runs in inference.

Source: FastConformer (arXiv:2305.05084), relative positions of Transformer-XL (arXiv:1901.02860); masking, dropout and
layer drop as in transformers `models/parakeet/modeling_parakeet.py`.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parakeet_core.config import EncoderConfig

POSITION_BASE = 10000.0  # longest wavelength of the sinusoids over 2 pi (arXiv:1706.03762)


def valid_frames(lens: Tensor, frames: int) -> Tensor:
    """[B, frames] bool: true on the frames before each item's length."""
    return torch.arange(frames, device=lens.device) < lens[:, None]


def relative_positions(frames: int, d_model: int, device: torch.device | None = None) -> Tensor:
    """Sinusoids for the distances U-1 .. -(U-1), sine and cosine interleaved: [P, D] float32."""
    distances = torch.arange(frames - 1, -frames, -1, device=device, dtype=torch.float32)
    # Written as in the reference, for the same rounding: at distance 5000 another form of the formula differs by 5e-4.
    rates = 1.0 / POSITION_BASE ** (torch.arange(0, d_model, 2, device=device, dtype=torch.float32) / d_model)
    angles = distances[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def shift_relative(scores: Tensor, keys: int | None = None) -> Tensor:
    """Scores by distance -> scores by key, as a view: out[..., i, j] = scores[..., i, Q-1-i+j].

    Args:
        scores: [B, H, Q, Q + U - 1 or more], contiguous: of Q consecutive queries; the first column is the distance
            from the last query to the first key. Q is U unless attention runs in blocks of queries.
        keys: U, if `scores` has more columns than needed.

    Returns:
        [B, H, Q, U], sharing memory with `scores`; no element of it appears twice.
    """
    queries, step = scores.shape[-2], scores.shape[-1] - 1
    if keys is None:
        keys = step + 2 - queries
    if queries == 1:
        return scores[..., :keys]
    # Starting at column Q-1 of row 0, each row begins `step` numbers after the previous one: one column further left.
    shifted = scores.flatten(-2)[..., queries - 1 : queries - 1 + queries * step]
    return shifted.unflatten(-1, (queries, step))[..., :keys]


class Subsampling(nn.Module):
    """Log-mel frames to encoder frames by strided convolutions: [B, T, M] -> [B, U, D]."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        channels, kernel, stride = config.subsampling_channels, config.subsampling_kernel, config.subsampling_stride
        strided = {"kernel_size": kernel, "stride": stride, "padding": kernel // 2}
        layers = [nn.Conv2d(1, channels, **strided), nn.ReLU()]
        for _ in range(config.n_subsampling_stages - 1):
            layers += [nn.Conv2d(channels, channels, groups=channels, **strided), nn.Conv2d(channels, channels, 1)]
            layers += [nn.ReLU()]
        self.layers = nn.ModuleList(layers)
        mels = config.subsample(config.n_mels)  # the frequency axis shrinks as the time axis does
        self.linear = nn.Linear(channels * mels, config.d_model)

    def forward(self, features: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
        states = features[:, None]  # [B, 1, T, M]
        for layer in self.layers:
            states = _convolved(layer, states)  # [B, C, T', M']
            if isinstance(layer, nn.Conv2d):
                if layer.stride[0] > 1:
                    lens = self.config.subsample_once(lens)
                states = states * valid_frames(lens, states.shape[2])[:, None, :, None]
        return self.linear(states.transpose(1, 2).flatten(-2)), lens  # [B, U, D]


def _convolved(layer: nn.Module, states: Tensor) -> Tensor:
    """`layer(states)`; on a CPU with the channels last in memory, and depthwise in float32 even under autocast.

    A depthwise convolution with its gradients then takes a quarter of the time, and a fifth of bfloat16's.
    """
    if not isinstance(layer, nn.Conv2d) or states.device.type != "cpu":
        return layer(states)
    weight, depthwise = layer.weight, layer.groups > 1
    if layer.stride[0] > 1:  # a kernel of size 1 is the same in both layouts
        weight = weight.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", enabled=torch.is_autocast_enabled("cpu") and not depthwise):
        states = states.to(weight.dtype if depthwise else states.dtype, memory_format=torch.channels_last)
        return F.conv2d(states, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)


class FeedForward(nn.Module):
    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.linear1 = nn.Linear(config.d_model, config.d_ff, bias=config.attention_bias)
        self.linear2 = nn.Linear(config.d_ff, config.d_model, bias=config.attention_bias)
        self.dropout = config.activation_dropout

    def forward(self, states: Tensor) -> Tensor:
        return self.linear2(F.dropout(F.silu(self.linear1(states)), self.dropout, self.training))


class RelativeAttention(nn.Module):
    """Self-attention whose scores include a term for the distance between query and key."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        width, bias = config.d_model, config.attention_bias
        self.n_heads, self.d_head = config.n_heads, config.d_head
        self.dropout = config.attention_dropout
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(width, width, bias=bias)
        self.v_proj = nn.Linear(width, width, bias=bias)
        self.o_proj = nn.Linear(width, width, bias=bias)
        self.relative_k_proj = nn.Linear(width, width, bias=False)
        self.bias_u = nn.Parameter(torch.zeros(config.n_heads, config.d_head))  # [H, K] of the content term
        self.bias_v = nn.Parameter(torch.zeros(config.n_heads, config.d_head))  # [H, K] of the distance term

    def forward(self, states: Tensor, positions: Tensor, keys_valid: Tensor) -> Tensor:
        q, k, v = (self._heads(proj(states)) for proj in (self.q_proj, self.k_proj, self.v_proj))  # [B, H, U, K]
        p = self._heads(self.relative_k_proj(positions)[None])  # [1, H, P, K]
        by_distance = (q + self.bias_v[:, None]) @ p.transpose(-1, -2)  # [B, H, U, P]
        bias = shift_relative(by_distance) * self.d_head**-0.5  # [B, H, U, U]
        # The lowest finite number, not -inf: a row with every key masked (an item without frames) must stay finite.
        bias = bias.masked_fill(~keys_valid[:, None, None], torch.finfo(bias.dtype).min)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q + self.bias_u[:, None], k, v, attn_mask=bias, dropout_p=dropout)
        return self.o_proj(out.transpose(1, 2).flatten(-2))

    def _heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.n_heads, self.d_head)).transpose(1, 2)  # [B, H, U, K]


class Convolution(nn.Module):
    """Gated pointwise, depthwise over time, normalised, pointwise: [B, U, D] -> [B, U, D]."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        width, kernel, bias = config.d_model, config.conv_kernel, config.convolution_bias
        self.pointwise_conv1 = nn.Conv1d(width, 2 * width, 1, bias=bias)
        self.depthwise_conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width, bias=bias)
        self.norm = nn.BatchNorm1d(width)
        self.pointwise_conv2 = nn.Conv1d(width, width, 1, bias=bias)

    def forward(self, states: Tensor, valid: Tensor) -> Tensor:
        states = F.glu(self.pointwise_conv1(states.transpose(1, 2)), dim=1)  # [B, D, U]
        states = states * valid[:, None]  # padding must not reach real frames through the kernel
        states = self.pointwise_conv2(F.silu(self.norm(self.depthwise_conv(states))))
        return states.transpose(1, 2)


class ConformerLayer(nn.Module):
    """Half feed-forward, attention, convolution, half feed-forward, each on its own norm and residual."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.feed_forward1 = FeedForward(config)
        self.self_attn = RelativeAttention(config)
        self.conv = Convolution(config)
        self.feed_forward2 = FeedForward(config)
        self.norm_feed_forward1 = nn.LayerNorm(config.d_model)
        self.norm_self_att = nn.LayerNorm(config.d_model)
        self.norm_conv = nn.LayerNorm(config.d_model)
        self.norm_feed_forward2 = nn.LayerNorm(config.d_model)
        self.norm_out = nn.LayerNorm(config.d_model)

    def forward(self, states: Tensor, positions: Tensor, valid: Tensor) -> Tensor:
        states = states + 0.5 * self.feed_forward1(self.norm_feed_forward1(states))
        states = states + self.self_attn(self.norm_self_att(states), positions, valid)
        states = states + self.conv(self.norm_conv(states), valid)
        states = states + 0.5 * self.feed_forward2(self.norm_feed_forward2(states))
        return self.norm_out(states)


class Encoder(nn.Module):
    """Features and lens -> encoder states and lens."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.subsampling = Subsampling(config)
        self.layers = nn.ModuleList(ConformerLayer(config) for _ in range(config.n_layers))

    def forward(self, features: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
        """Encode a padded batch.

        Args:
            features: [B, T, M] in the model's dtype; frames from an item's length on may hold anything finite.
            lens: [B] integer, valid feature frames of each item.

        Returns:
            states [B, U, D] and their lens [B], U = ceil(T / 8) for a factor of 8. States past an item's length are
            finite and meaningless.
        """
        config = self.config
        if features.shape[1] == 0:  # a batch of empty items; convolutions refuse it
            return features.new_zeros(features.shape[0], 0, config.d_model), lens
        features = features * valid_frames(lens, features.shape[1])[:, :, None]
        states, lens = self.subsampling(features, lens)
        if config.scale_input:
            states = states * math.sqrt(config.d_model)
        positions = relative_positions(states.shape[1], config.d_model, states.device).to(states.dtype)
        states = F.dropout(states, config.dropout, self.training)
        positions = F.dropout(positions, config.dropout_positions, self.training)
        valid = valid_frames(lens, states.shape[1])
        for layer in self.layers:
            after = layer(states, positions, valid)
            if self.training and config.layerdrop > 0:
                # Selects tensors, does not branch: no graph break, and every parameter has a gradient in every step.
                kept = torch.rand((), device=states.device) >= config.layerdrop
                after = torch.where(kept, after, states)
            states = after
        return states, lens
