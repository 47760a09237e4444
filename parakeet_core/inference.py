"""The CTC model in the form that is run: the function of `ParakeetCTC` in eval mode, with fewer and larger operations.

Shapes: `B` batch, `T` feature frames, `U` encoder frames, `M` mel bins, `D` model width, `H` heads, `K` head width,
`C` subsampling channels, `P` relative positions (2U - 1), `V` vocabulary with blank.

What is folded, and why it is the same function but for rounding:
- BatchNorm's running statistics into the depthwise convolution before it; the halves of the feed-forward residuals into
  their second linear; 1/sqrt(K) into the query projection; the input scale into the subsampling's linear.
- Query, key and value are one linear. Its query bias carries `bias_u`; what `bias_v` adds to a score is then
  (bias_v - bias_u) . position, which no input changes: it is cached with the projected positions.
- Projected positions of a length are a slice of those of any greater length: one table per layer serves all batches.
- Pointwise convolutions are linears over [B, U, D], and the subsampling keeps channels last, so nothing is transposed.
- Masks are applied in the three places that need them (subsampling, keys, before the depthwise convolution), and not at
  all where every item fills the batch.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parakeet_core.config import EncoderConfig
from parakeet_core.ctc import ParakeetCTC
from parakeet_core.encoder import (
    ConformerLayer,
    Convolution,
    FeedForward,
    RelativeAttention,
    Subsampling,
    relative_positions,
    shift_relative,
    valid_frames,
)

POSITION_STEP = 256  # encoder frames (20 s): position tables grow by whole steps, so that few lengths make them grow
MIN_TILE_FRAMES = 4  # encoder frames; in smaller tiles most of the work would be what neighbours compute too
TILE_BYTES = (
    4 << 20
)  # largest buffer of a subsampling tile on the CPU: stays in cache and under malloc's mmap threshold


class InferenceModel(nn.Module):
    """Features and lens -> logits and lens, without gradients; built by `ParakeetCTC.prepare_inference()`.

    Args:
        model: the plain model, on the device and in the dtype to run in.
    """

    def __init__(self, model: ParakeetCTC):
        super().__init__()
        self.config = model.config
        with torch.no_grad():
            self.subsampling = TiledSubsampling(model.encoder.subsampling, model.config.encoder)
            self.layers = nn.ModuleList(FusedLayer(layer) for layer in model.encoder.layers)
            self.head = _linear(model.ctc_head.weight.squeeze(-1), model.ctc_head.bias)
        self.eval()

    @torch.no_grad()
    def forward(self, features: Tensor, lens: Tensor, padded: bool | None = None) -> tuple[Tensor, Tensor]:
        """Logits of a padded batch.

        Args:
            features: [B, T, M] in the model's dtype.
            lens: [B] integer, valid feature frames.
            padded: whether any item is shorter than T. Given, the device is never waited for and the forward has no
                graph break; else it is found from `lens`.

        Returns:
            logits [B, U, V] and their lens [B], U = ceil(T / subsampling factor).
        """
        out_lens = self.config.encoder.subsample(lens)
        if features.shape[1] == 0:  # a batch of empty items
            return features.new_zeros(features.shape[0], 0, self.config.vocab_size), out_lens
        if padded is None:
            padded = bool((lens < features.shape[1]).any())
        states = self.subsampling(features, lens if padded else None)
        valid = valid_frames(out_lens, states.shape[1]) if padded else None
        for layer in self.layers:
            states = layer(states, valid)
        return self.head(states), out_lens

    def reserve_positions(self, frames: int) -> None:
        """Make position tables for batches of up to `frames` encoder frames, before a graph is captured or compiled."""
        for layer in self.layers:
            layer.attention.reserve(frames)


class TiledSubsampling(nn.Module):
    """`Subsampling` with channels last, run in tiles of time on the CPU: [B, T, M] -> [B, U, D].

    The first convolution's output is C times M / 2 numbers a frame: 40 MB for ten seconds at the true width. In tiles,
    buffers are reused from the cache instead of being mapped and cleared by the kernel for every batch, which took half
    of a small model's time.
    """

    def __init__(self, plain: Subsampling, config: EncoderConfig):
        super().__init__()
        self.config = config
        convolutions = [layer for layer in plain.layers if isinstance(layer, nn.Conv2d)]
        strided, pointwise = [convolutions[0], *convolutions[1::2]], convolutions[2::2]
        self.convolutions = nn.ModuleList(strided)  # the strided one of each stage
        self.pointwise = nn.ModuleList(_linear(conv.weight.flatten(1), conv.bias) for conv in pointwise)
        channels, mels = config.subsampling_channels, config.subsample(config.n_mels)
        scale = config.d_model**0.5 if config.scale_input else 1.0
        by_channel = plain.linear.weight.unflatten(1, (channels, mels))  # [D, C, M']
        weight = by_channel.transpose(1, 2).flatten(1) * scale  # [D, M' * C], as channels-last states flatten
        self.linear = _linear(weight, plain.linear.bias * scale)

    def forward(self, features: Tensor, lens: Tensor | None) -> Tensor:
        """`lens` None says that every item fills the batch."""
        frames = self.config.subsample(features.shape[1])
        if lens is None:
            lens = features.new_full(features.shape[:1], features.shape[1], dtype=torch.int64)
        tile = self._tile_frames(features)
        tiles = [self._subsample(features, lens, start, min(start + tile, frames)) for start in range(0, frames, tile)]
        return tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=1)

    def _tile_frames(self, features: Tensor) -> int:
        """Encoder frames of a tile: on the CPU as many as keep the first convolution's output near TILE_BYTES."""
        config = self.config
        if features.device.type != "cpu":
            return max(config.subsample(features.shape[1]), 1)
        row_bytes = config.subsampling_channels * config.subsample_once(config.n_mels) * features.element_size()
        frame_bytes = features.shape[0] * row_bytes * config.subsampling_factor // config.subsampling_stride
        return max(TILE_BYTES // frame_bytes, MIN_TILE_FRAMES)

    def _subsample(self, features: Tensor, lens: Tensor, start: int, end: int) -> Tensor:
        """Encoder frames [start, end): [B, end - start, D].

        The convolutions run without padding in time, over a slice that reaches as far as these frames see. Where it
        reaches past an item's ends, states are set to zero after each convolution, which is what padding would hold.
        """
        stride, kernel = self.config.subsampling_stride, self.config.subsampling_kernel
        spans = [(start, end)]
        for _ in range(self.config.n_subsampling_stages):
            first, last = spans[0]
            spans.insert(0, (stride * first - kernel // 2, stride * (last - 1) - kernel // 2 + kernel))
        first, last = spans[0]
        states = features[:, max(first, 0) : last]
        states = F.pad(states, (0, 0, max(-first, 0), last - max(first, 0) - states.shape[1]))
        states = _keep_valid(states[..., None], spans[0], lens)  # [B, T, M, 1]
        for stage, span in enumerate(spans[1:]):
            states = self._convolve(states, stage)  # [B, T', M', C]
            lens = self.config.subsample_once(lens)
            if stage + 1 < self.config.n_subsampling_stages:
                states = _keep_valid(states, span, lens)
        return self.linear(states.flatten(2))

    def _convolve(self, states: Tensor, stage: int) -> Tensor:
        """One strided stage on channels-last states, with its activation: [B, T, M, C] -> [B, T', M', C']."""
        conv = self.convolutions[stage]
        padding = (0, self.config.subsampling_kernel // 2)
        states = F.conv2d(states.permute(0, 3, 1, 2), conv.weight, conv.bias, conv.stride, padding, groups=conv.groups)
        states = states.permute(0, 2, 3, 1)
        if stage > 0:
            states = self.pointwise[stage - 1](states)
        return states.relu_()


def _keep_valid(states: Tensor, span: tuple[int, int], lens: Tensor) -> Tensor:
    """Zeros where frames [span) of [B, T, M, C] lie before an item's start or past its length."""
    frames = torch.arange(*span, device=lens.device)
    valid = (frames >= 0) & (frames < lens[:, None])
    return torch.where(valid[:, :, None, None], states, 0.0)


class FusedLayer(nn.Module):
    """`ConformerLayer` with its constants folded."""

    def __init__(self, plain: ConformerLayer):
        super().__init__()
        self.norm_feed_forward1, self.feed_forward1 = plain.norm_feed_forward1, FusedFeedForward(plain.feed_forward1)
        self.norm_attention, self.attention = plain.norm_self_att, FusedAttention(plain.self_attn)
        self.norm_convolution, self.convolution = plain.norm_conv, FusedConvolution(plain.conv)
        self.norm_feed_forward2, self.feed_forward2 = plain.norm_feed_forward2, FusedFeedForward(plain.feed_forward2)
        self.norm_out = plain.norm_out

    def forward(self, states: Tensor, valid: Tensor | None) -> Tensor:
        states = states + self.feed_forward1(self.norm_feed_forward1(states))
        states = states + self.attention(self.norm_attention(states), valid)
        states = states + self.convolution(self.norm_convolution(states), valid)
        states = states + self.feed_forward2(self.norm_feed_forward2(states))
        return self.norm_out(states)


class FusedFeedForward(nn.Module):
    def __init__(self, plain: FeedForward):
        super().__init__()
        self.linear1 = plain.linear1
        bias = None if plain.linear2.bias is None else plain.linear2.bias * 0.5
        self.linear2 = _linear(plain.linear2.weight * 0.5, bias)

    def forward(self, states: Tensor) -> Tensor:
        return self.linear2(F.silu(self.linear1(states), inplace=True))


class FusedAttention(nn.Module):
    """`RelativeAttention` with one projection for queries, keys and values, and cached positions."""

    def __init__(self, plain: RelativeAttention):
        super().__init__()
        self.n_heads, self.d_head = plain.n_heads, plain.d_head
        scale = self.d_head**-0.5
        weight = torch.cat([plain.q_proj.weight * scale, plain.k_proj.weight, plain.v_proj.weight])
        bias = weight.new_zeros(3, weight.shape[1])
        if plain.q_proj.bias is not None:
            bias.copy_(torch.stack([plain.q_proj.bias * scale, plain.k_proj.bias, plain.v_proj.bias]))
        bias[0] += plain.bias_u.flatten() * scale
        self.qkv = _linear(weight, bias.flatten())
        self.out = plain.o_proj
        self.position_weight = nn.Parameter(plain.relative_k_proj.weight, requires_grad=False)
        self.bias_difference = nn.Parameter((plain.bias_v - plain.bias_u) * scale, requires_grad=False)  # [H, K]
        empty = weight.new_zeros(0)
        self.register_buffer("positions", empty, persistent=False)  # [H, K, P of the longest batch so far]
        self.register_buffer("position_scores", empty, persistent=False)  # [H, 1, P]

    def forward(self, states: Tensor, valid: Tensor | None) -> Tensor:
        frames = states.shape[1]
        self.reserve(frames)
        centre = self.positions.shape[-1] // 2  # distance 0
        window = slice(centre - frames + 1, centre + frames)
        qkv = self.qkv(states).unflatten(-1, (3, self.n_heads, self.d_head))  # [B, U, 3, H, K]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, H, U, K] each
        by_distance = q @ self.positions[..., window] + self.position_scores[..., window]  # [B, H, U, P]
        scores = shift_relative(by_distance)  # [B, H, U, U]
        if valid is not None:
            scores.masked_fill_(~valid[:, None, None], torch.finfo(scores.dtype).min)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=scores, scale=1.0)
        return self.out(out.transpose(1, 2).flatten(2))

    def reserve(self, frames: int) -> None:
        """Extend the position tables to distances of `frames` encoder frames, if they are shorter."""
        if self.positions.shape[-1] >= 2 * frames - 1:
            return
        frames = -(-frames // POSITION_STEP) * POSITION_STEP
        weight = self.position_weight
        table = relative_positions(frames, weight.shape[1], weight.device).to(weight.dtype)
        projected = F.linear(table, weight).unflatten(-1, (self.n_heads, self.d_head))  # [P, H, K]
        self.positions = projected.permute(1, 2, 0).contiguous()
        self.position_scores = self.bias_difference[:, None] @ self.positions


class FusedConvolution(nn.Module):
    """`Convolution` over [B, U, D], with BatchNorm folded into the depthwise kernel."""

    def __init__(self, plain: Convolution):
        super().__init__()
        norm, depthwise = plain.norm, plain.depthwise_conv
        gain = norm.weight.float() * (norm.running_var.float() + norm.eps).rsqrt()
        bias = norm.bias.float() - norm.running_mean.float() * gain
        if depthwise.bias is not None:
            bias = bias + depthwise.bias.float() * gain
        dtype = depthwise.weight.dtype
        weight = (depthwise.weight.float() * gain[:, None, None]).to(dtype)
        self.depthwise_weight = nn.Parameter(weight[:, :, None], requires_grad=False)  # [D, 1, 1, kernel]
        self.depthwise_bias = nn.Parameter(bias.to(dtype), requires_grad=False)
        self.pointwise1 = _linear(plain.pointwise_conv1.weight.squeeze(-1), plain.pointwise_conv1.bias)
        self.pointwise2 = _linear(plain.pointwise_conv2.weight.squeeze(-1), plain.pointwise_conv2.bias)

    def forward(self, states: Tensor, valid: Tensor | None) -> Tensor:
        states = F.glu(self.pointwise1(states))  # [B, U, D]
        if valid is not None:
            states = states * valid[:, :, None]
        # As an image of height one, [B, D, 1, U] with channels last, the states need not be transposed in memory.
        image = states[:, None].permute(0, 3, 1, 2)
        kernel = self.depthwise_weight.shape[-1]
        image = F.conv2d(image, self.depthwise_weight, self.depthwise_bias, 1, (0, kernel // 2), groups=image.shape[1])
        return self.pointwise2(F.silu(image.permute(0, 2, 3, 1).squeeze(1)))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear that holds these tensors as they are, without copying or drawing new ones."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear
