"""Linears in 8-bit integers, for CPUs with instructions to multiply them: about twice the rate of bfloat16.

Weights have one scale per output channel; inputs have one per row (a frame of an item), computed at run time. So the
result for a row depends on no other row, and an item's text does not depend on its batch. Sums of products are exact;
weights and inputs are rounded, each to 1/127 of the largest in its channel or row.
"""

import torch
from torch import Tensor, nn

LEVELS = 127  # integers from -127 to 127
ZERO_POINT = 128  # oneDNN multiplies unsigned inputs with signed weights
# Names in torch.cpu.get_capabilities(). Without these, sums of two products saturate at 16 bits, and results are wrong.
INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "amx_int8")


class QuantisedLinear(nn.Module):
    """A linear on the CPU: [..., K] -> [..., N], in the dtype of its input.

    Args:
        plain: the linear whose weights are taken.
    """

    def __init__(self, plain: nn.Linear):
        super().__init__()
        weight = plain.weight.detach().float()
        scale = _scale(weight)
        integers = (weight / scale).round().to(torch.int8)
        self.register_buffer("weight_scale", scale.squeeze(1), persistent=False)  # [N]
        self.register_buffer("zero_points", torch.zeros(len(weight), dtype=torch.int32), persistent=False)
        self.register_buffer("bias", None if plain.bias is None else plain.bias.detach(), persistent=False)
        self.packed = torch.ops.onednn.qlinear_prepack(integers, None)

    def forward(self, states: Tensor) -> Tensor:
        """[..., K] float -> [..., N] of the same dtype."""
        rows = states.reshape(-1, states.shape[-1])
        scale = _scale(rows)
        integers = rows.to(torch.float32, copy=True).mul_(scale.reciprocal()).round_().to(torch.int8)
        integers = integers.view(torch.uint8).add_(ZERO_POINT)  # modulo 256; torch converts to unsigned slowly
        products = torch.ops.onednn.qlinear_pointwise(
            integers, 1.0, ZERO_POINT, self.packed, self.weight_scale, self.zero_points,
            None, 1.0, 0, rows.dtype, "none", [], "",
        )  # fmt: skip
        scale = scale.to(rows.dtype)
        out = products.mul_(scale) if self.bias is None else torch.addcmul(self.bias, products, scale)
        return out.view(*states.shape[:-1], -1)


def _scale(rows: Tensor) -> Tensor:
    """Scale of each row of [R, K], with which its largest value becomes 127; float32 [R, 1], above zero."""
    return rows.abs().amax(1, keepdim=True).float().clamp_min(torch.finfo(torch.float32).tiny * LEVELS) / LEVELS


def quantise_linears(module: nn.Module) -> None:
    """Put a `QuantisedLinear` in the place of every linear under `module`."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, QuantisedLinear(child))


def processor_multiplies_bytes() -> bool:
    """Whether this CPU has the instructions and torch has the operation."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    there = hasattr(torch.ops.onednn, "qlinear_pointwise") and torch.backends.mkldnn.is_available()
    return there and any(capabilities.get(name, False) for name in INSTRUCTIONS)
