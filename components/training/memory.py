"""Memory that runs out while training, in one line. What the kernel kills for it cannot say anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from components.config import TrainingConfig
from components.errors import OutOfMemory

# What torch writes, on a GPU and on the CPU; it has a class of its own for the first only.
SIGNS = ("out of memory", "DefaultCPUAllocator", "can't allocate memory")


@contextmanager
def watched(training: TrainingConfig, device: str) -> Iterator[None]:
    """Raise OutOfMemory, which says what to lower, where torch or Python could get no memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(sign in str(error) for sign in SIGNS):
            raise
        raise OutOfMemory(
            f"memory for batches of {training.batch_size} texts of up to {training.max_tokens} tokens",
            f"too little of it (device {device})",
            "lower training.batch_size or training.max_tokens, or raise compute.processes to share each batch",
        ) from error
