"""The CTC model in its form for inference: the function of `ParakeetCTC` in eval mode, in fewer and larger operations.

Shapes: `B` batch, `T` feature frames, `U` encoder frames, `M` mel bins, `D` model width, `H` heads, `K` head width,
`C` subsampling channels, `P` relative positions (2U - 1), `V` vocabulary with blank.

What is folded, and why the function is the same except for rounding:
- BatchNorm's running statistics into the depthwise convolution before it; the halves of the feed-forward residuals into
  their second linear; 1/sqrt(K) into the query projection; the input scale into the subsampling's linear.
- Query, key and value are one linear. Its query bias includes `bias_u`; what `bias_v` adds to a score is then
  (bias_v - bias_u) . position, which does not depend on the input: it is cached with the projected positions.
- Projected positions for one length are a slice of those for any greater length: one table per layer serves all
  batches.
- Pointwise convolutions are linears over [B, U, D], and the subsampling keeps channels last, so nothing is transposed.
- Masks are applied in the three places that need them (subsampling, keys, before the depthwise convolution), and not at
  all if every item fills the batch.
"""

from typing import NamedTuple

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

POSITION_STEP = 256  # encoder frames (20 s): position tables grow in whole steps, so that they grow rarely
MIN_TILE_FRAMES = 4  # encoder frames; in smaller tiles a third of the work would repeat that of their neighbours
TILE_BYTES = 4 << 20  # first convolution's output on the CPU: fastest of 512 kB to 16 MB, at 32 and at 256 channels
FORMS = 64  # most forms of compiled code in a process
SHORTEST_COMPILED = 3  # encoder frames; fewer lead to dimensions of size 1, and each would be compiled for separately
QUERY_BLOCK = 512  # encoder frames (41 s) whose scores over all keys are in memory at once, in longer items
# Encoder frames (82 s) of the longest batch that runs compiled, with all queries in one block: a window of a long item
# (`engine.WINDOW_FRAMES`). It computes a third more scores by distance than blocks would, 2 % of a layer's work.
LONGEST_COMPILED = 1024


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
            padded: whether any item is shorter than T. If it is given, the forward never waits for the device and has
                no graph break; else it is found from `lens`.

        Returns:
            logits [B, U, V] and their lens [B], U = ceil(T / subsampling factor).
        """
        out_lens = self.config.encoder.subsample(lens)
        if features.shape[1] == 0:  # a batch of empty items
            return features.new_zeros(features.shape[0], 0, self.config.vocab_size), out_lens
        if padded is None:
            padded = bool((lens < features.shape[1]).any())
        frames = self.config.encoder.subsample(features.shape[1])
        subsample = self.subsampling if frames >= SHORTEST_COMPILED else self.subsampling.forward
        states = subsample(features, lens if padded else None)
        padding = Padding.of(out_lens, frames, states.dtype) if padded else None
        self.reserve_positions(frames)
        for layer in self.layers:
            # Attention in blocks is a loop: a layer would be compiled again for every number of blocks.
            run = layer if SHORTEST_COMPILED <= frames <= LONGEST_COMPILED else layer.forward
            states = run(states, layer.attention.position_window(frames), padding)
        return self.head(states), out_lens

    def reserve_positions(self, frames: int) -> None:
        """Make position tables for batches of up to `frames` encoder frames, before a graph is captured or compiled."""
        for layer in self.layers:
            layer.attention.reserve(frames)

    def compile_layers(self, backend: str = "inductor") -> None:
        """Run the subsampling and each layer as code that `torch.compile` generates on the first batches.

        The code is for one layer and for any number of items and frames, and all layers share it. A graph of the whole
        model would take `n_layers` times as long to compile, and again for each shape. A layer has six forms: for one
        item, for several, and for several with padding, each for the first layer, whose input is a view, and for the
        others. The generated code stays in the node's cache (`TORCHINDUCTOR_CACHE_DIR`) for later processes. Batches of
        more than LONGEST_COMPILED encoder frames run the layers uncompiled: their attention is a loop.
        """
        # Beyond its default of 8 forms torch would go on uncompiled, and a second dtype in the process needs its own.
        torch._dynamo.config.recompile_limit = max(FORMS, torch._dynamo.config.recompile_limit)
        self.subsampling.compile(backend=backend, dynamic=True)
        for layer in self.layers:
            layer.compile(backend=backend, dynamic=True)


class TiledSubsampling(nn.Module):
    """`Subsampling` with channels last: [B, T, M] -> [B, U, D].

    On the CPU it runs item by item, each at its own length, in tiles of time. The first convolution's output is C times
    M / 2 numbers for two feature frames, 20 MB for ten seconds at the true width in float32; that of a tile stays in
    the cache, and needs no mask. A tile includes `halo` more encoder frames on each side: their states are wrong, since
    the convolutions pad the tile with zeros, and are cut off.
    """

    def __init__(self, plain: Subsampling, config: EncoderConfig):
        super().__init__()
        self.config = config
        convolutions = [layer for layer in plain.layers if isinstance(layer, nn.Conv2d)]
        strided, pointwise = [convolutions[0], *convolutions[1::2]], convolutions[2::2]
        self.convolutions = nn.ModuleList(strided)  # the strided one of each stage
        self.pointwise = nn.ModuleList(_linear(conv.weight.flatten(1), conv.bias) for conv in pointwise)
        self.halo = 0  # encoder frames at an edge of a tile whose states depend on what is beyond it
        for _ in strided:
            self.halo = -(-(self.halo + config.subsampling_kernel // 2) // config.subsampling_stride)
        channels, mels = config.subsampling_channels, config.subsample(config.n_mels)
        scale = config.d_model**0.5 if config.scale_input else 1.0
        by_channel = plain.linear.weight.unflatten(1, (channels, mels))  # [D, C, M']
        weight = by_channel.transpose(1, 2).flatten(1) * scale  # [D, M' * C], as channels-last states flatten
        self.linear = _linear(weight, plain.linear.bias * scale)

    def forward(self, features: Tensor, lens: Tensor | None) -> Tensor:
        """`lens` is None if every item fills the batch."""
        if features.device.type == "cpu" and not torch.compiler.is_compiling():
            return self.linear(self._by_item(features, lens))
        # The configured number of mel bins, not the one in the features' shape: Inductor fails on it as a symbol.
        states = features.reshape(*features.shape[:2], self.config.n_mels, 1)  # [B, T, M, 1]
        for stage in range(self.config.n_subsampling_stages):
            if lens is not None:
                valid = valid_frames(lens, states.shape[1])
                states = torch.where(valid[:, :, None, None], states, 0.0)
                lens = self.config.subsample_once(lens)
            states = self._convolve(states, stage)  # [B, T', M', C]
        return self.linear(states.flatten(2))

    def _by_item(self, features: Tensor, lens: Tensor | None) -> Tensor:
        """States before the linear: [B, U, M' * C], zeros past an item's length."""
        config = self.config
        factor, mels = config.subsampling_factor, config.subsample(config.n_mels)
        row_bytes = config.subsampling_channels * config.subsample_once(config.n_mels) * features.element_size()
        tile = max(TILE_BYTES // (row_bytes * factor // config.subsampling_stride), MIN_TILE_FRAMES)
        states = features.new_zeros(
            len(features), config.subsample(features.shape[1]), mels * config.subsampling_channels
        )
        lengths = [features.shape[1]] * len(features) if lens is None else lens.tolist()
        for row, item, length in zip(states, features, lengths, strict=True):
            kept = config.subsample(length)
            for start in range(0, kept, tile):
                end = min(start + tile, kept)
                first, last = max(start - self.halo, 0), min(end + self.halo, kept)
                seen = item[None, first * factor : min(last * factor, length), :, None]
                for stage in range(config.n_subsampling_stages):
                    seen = self._convolve(seen, stage)
                row[start:end] = seen[0, start - first : end - first].flatten(1)
        return states

    def _convolve(self, states: Tensor, stage: int) -> Tensor:
        """One strided stage on channels-last states, with its activation: [B, T, M, C] -> [B, T', M', C']."""
        conv = self.convolutions[stage]
        states = states.permute(0, 3, 1, 2)
        states = F.conv2d(states, conv.weight, conv.bias, conv.stride, conv.padding, groups=conv.groups)
        states = states.permute(0, 2, 3, 1)
        if stage > 0:
            states = self.pointwise[stage - 1](states)
        return states.relu_()


class Padding(NamedTuple):
    """Where a batch holds padding, in the two forms that layers need; `None` in its place if there is none."""

    kept: Tensor  # [B, U, 1], one on an item's frames, zero after them
    key_bias: Tensor  # [B, 1, 1, U], added to scores: zero, or so low that the key has no weight

    @classmethod
    def of(cls, lens: Tensor, frames: int, dtype: torch.dtype) -> "Padding":
        valid = valid_frames(lens, frames)
        # Half of the lowest number: its sum with a score stays finite, and so do rows of items without frames.
        lowest = torch.finfo(dtype).min / 2
        key_bias = torch.where(valid, 0.0, lowest).to(dtype)
        return cls(valid[:, :, None].to(dtype), key_bias[:, None, None])


class Positions(NamedTuple):
    """A layer's tables for the distances of one batch. Arguments, not state, so that compiled code takes any size."""

    projected: Tensor  # [H, K, P or more]
    scores: Tensor  # [H, 1, P or more]

    def window(self, distances: slice) -> "Positions":
        """The tables for some distances, followed by columns of zeros if the device needs aligned rows.

        Without the zeros a window may begin anywhere in the table and have any number of columns.
        """
        window = Positions(self.projected[..., distances], self.scores[..., distances])
        multiple = row_multiple(self.projected.device)
        if multiple == 1:
            return window
        missing = -window.projected.shape[-1] % multiple
        return Positions(F.pad(window.projected, (0, missing)), F.pad(window.scores, (0, missing)))


def row_multiple(device: torch.device) -> int:
    """The length of a matrix's rows must be a multiple of this: a GPU's fast products read 16 bytes at a time."""
    return 1 if device.type == "cpu" else 8


class FusedLayer(nn.Module):
    """`ConformerLayer` with its constants folded."""

    def __init__(self, plain: ConformerLayer):
        super().__init__()
        self.norm_feed_forward1, self.feed_forward1 = plain.norm_feed_forward1, FusedFeedForward(plain.feed_forward1)
        self.norm_attention, self.attention = plain.norm_self_att, FusedAttention(plain.self_attn)
        self.norm_convolution, self.convolution = plain.norm_conv, FusedConvolution(plain.conv)
        self.norm_feed_forward2, self.feed_forward2 = plain.norm_feed_forward2, FusedFeedForward(plain.feed_forward2)
        self.norm_out = plain.norm_out

    def forward(self, states: Tensor, positions: Positions, padding: Padding | None) -> Tensor:
        states = states + self.feed_forward1(self.norm_feed_forward1(states))
        states = states + self.attention(self.norm_attention(states), positions, padding)
        states = states + self.convolution(self.norm_convolution(states), padding)
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

    def forward(self, states: Tensor, positions: Positions, padding: Padding | None) -> Tensor:
        frames = states.shape[1]
        qkv = self.qkv(states).unflatten(-1, (3, self.n_heads, self.d_head))  # [B, U, 3, H, K]
        key_bias = None if padding is None else padding.key_bias
        if torch.compiler.is_compiling() or frames <= QUERY_BLOCK:
            out = self._attend(qkv, qkv[:, :, 0], positions, key_bias)
        else:
            # Scores of one block of queries at a time: U * QUERY_BLOCK numbers, not U * U; by distance, only those from
            # a query of the block to a key, not U * 2U.
            blocks = []
            for start in range(0, frames, QUERY_BLOCK):
                end = min(start + QUERY_BLOCK, frames)
                seen = slice(frames - end, 2 * frames - 1 - start)  # distances end - 1 ... start - (U - 1)
                blocks.append(self._attend(qkv, qkv[:, start:end, 0], positions.window(seen), key_bias))
            out = torch.cat(blocks, 2)
        return self.out(out.transpose(1, 2).flatten(2))

    def _attend(self, qkv: Tensor, queries: Tensor, positions: Positions, key_bias: Tensor | None) -> Tensor:
        """Queries [B, Q, H, K] over keys and values in qkv [B, U, 3, H, K] at Q + U - 1 distances: [B, H, Q, K]."""
        batch, count = queries.shape[:2]
        # One product per head over the queries of all items: with items first, positions would be copied for each item.
        by_head = queries.flatten(0, 1).transpose(0, 1)  # [H, B * Q, K]
        by_distance = torch.baddbmm(positions.scores, by_head, positions.projected)  # [H, B * Q, P or more]
        scores = shift_relative(by_distance.unflatten(1, (batch, count)), keys=qkv.shape[1])
        scores = scores.transpose(0, 1)  # [B, H, Q, U]
        if key_bias is not None:
            scores = scores + key_bias
        q, k, v = (heads.transpose(1, 2) for heads in (queries, qkv[:, :, 1], qkv[:, :, 2]))  # [B, H, Q or U, K] each
        if q.device.type == "cpu" and q.dtype != torch.float32:
            # torch's own attention is slow in half precision on CPUs: 1.3 to 1.8 times the time of these products.
            scores = torch.baddbmm(scores.flatten(0, 1), q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
            return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).unflatten(0, q.shape[:2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=scores, scale=1.0)

    def position_window(self, frames: int) -> Positions:
        """Tables for the distances of `frames` encoder frames; `reserve` must have made them."""
        centre = self.positions.shape[-1] // 2  # distance 0
        return Positions(self.positions, self.position_scores).window(slice(centre - frames + 1, centre + frames))

    def reserve(self, frames: int) -> None:
        """Make position tables with more distances than `frames` encoder frames need.

        A whole table would have other strides than a window of it, and would be compiled for separately.
        """
        if self.positions.shape[-1] > 2 * frames - 1:
            return
        frames = (frames // POSITION_STEP + 1) * POSITION_STEP
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

    def forward(self, states: Tensor, padding: Padding | None) -> Tensor:
        states = F.glu(self.pointwise1(states))  # [B, U, D]
        if padding is not None:
            states = states * padding.kept
        return self.pointwise2(F.silu(self._depthwise(states)))

    def _depthwise(self, states: Tensor) -> Tensor:
        """Each channel with its own kernel over time, zeros outside: [B, U, D] -> [B, U, D]."""
        frames, kernel = states.shape[1], self.depthwise_weight.shape[-1]
        if torch.compiler.is_compiling():
            # Written out, it is fused with the operations around it; a library's convolution would stay separate.
            padded = F.pad(states, (0, 0, kernel // 2, kernel // 2))
            taps = self.depthwise_weight[:, 0, 0].T  # [kernel, D]
            return self.depthwise_bias + sum(padded[:, i : i + frames] * taps[i] for i in range(kernel))
        # As an image of height one, [B, D, 1, U] with channels last, the states need not be transposed in memory.
        image = states[:, None].permute(0, 3, 1, 2)
        image = F.conv2d(image, self.depthwise_weight, self.depthwise_bias, 1, (0, kernel // 2), groups=image.shape[1])
        return image.permute(0, 2, 3, 1).squeeze(1)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear that holds these tensors as they are, without copying them or initialising new ones."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear
