"""What a failed step of a model says: memory was short, the device is lost, or one sequence has no next token."""

import traceback

import torch

from rejoinder.worker.errors import Failed, Unavailable

_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUDA out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
_DEVICE_LOST = ("CUDA error", "device-side assert", "CUBLAS_STATUS", "CUDNN_STATUS", "HIP error", "NCCL")


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory, the device's or the host's, was short."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


def is_device_lost(error: Exception) -> bool:
    """Whether an error leaves the device unusable for this process. Not so where memory was short."""
    return not is_out_of_memory(error) and (
        isinstance(error, torch.AcceleratorError) or any(text in str(error) for text in _DEVICE_LOST)
    )


def out_of_memory() -> Unavailable:
    """The error of what cannot run although nothing runs beside it."""
    return Unavailable("out of memory, with this request alone", code="out_of_memory")


def no_number() -> Failed:
    """The error of a sequence for which no token can be drawn."""
    return Failed("the model gave no number for the next token (NaN or infinite logits)", code="no_number")


def where(error: Exception) -> str:
    """An error's type and where it was raised. Its message may quote a prompt, which does not belong into logs."""
    return f"{type(error).__name__}\n{''.join(traceback.format_tb(error.__traceback__))}"
