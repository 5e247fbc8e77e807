"""Memory that runs out on a GPU: torch's allocator says so by a type, CUDA's libraries by words."""

import torch

WORDS = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "was unable to find an engine to execute this computation",  # cuDNN, where no workspace can be had
)


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in WORDS)
