"""The device, CPU or CUDA: its capabilities, settings, and how its failure is recognised. Knows nothing of models."""

import torch
from torch import Tensor

# Names in torch.cpu.get_capabilities() of instructions that multiply matrices of a dtype. Without them torch emulates
# the product: measured on AVX2, 19 GFLOP/s in bfloat16 against 110 to 150 in float32.
HALF_INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}
# Texts that mark torch's errors of the GPU, its driver and its libraries; the first also marks torch.AcceleratorError.
FAILURES = (
    "CUDA error",
    "CUDA driver error",
    "cuda runtime error",
    "CUBLAS_STATUS",
    "cuDNN error",
    "CUDNN_STATUS",
    "CUFFT",
)


def processor_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for matrices of `dtype`; assumed if torch cannot tell."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if dtype not in HALF_INSTRUCTIONS or capabilities is None:
        return True
    return any(capabilities().get(name, False) for name in HALF_INSTRUCTIONS[dtype])


def set_up_cuda(dtype: torch.dtype) -> None:
    """Set up this process for batches whose shapes keep changing, and for exact float32."""
    # cuDNN's attention, which torch prefers on Hopper, makes a new plan for every shape: 0.4 s were seen for one
    # (FunASR's issue 3704), and nearly every batch has a shape of its own.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if dtype == torch.float32:
        torch.backends.cudnn.allow_tf32 = False  # of convolutions; for products TF32 is off unless asked for


def send_to_host(tensor: Tensor) -> Tensor:
    """A copy in pinned memory, which is complete once the stream has reached it."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def mark_stream(device: torch.device) -> torch.cuda.Event | None:
    """An event at this point in the device's work, to wait for asleep; None on the CPU, which works at once."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True, blocking=True)
    event.record(torch.cuda.current_stream(device))
    return event


def device_failed(error: BaseException) -> bool:
    """Whether an error means that the GPU, its driver or one of its libraries failed, not that its memory is full.

    After most such errors CUDA refuses every further call from the process, and only a new process can use the device.
    """
    if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, RuntimeError):
        return False
    return any(name in str(error) for name in FAILURES)
