"""Memory that runs out while training, in one line. What the kernel kills for it cannot say anything."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from components.config import TrainingConfig
from components.errors import OutOfMemory

if TYPE_CHECKING:
    import torch

# Kernels that are kept: the twenty or so products of a step, for the widths that batches mostly have. Each takes a
# tenth of a MB or more: with 320 of them MiniLM's training takes 20 MB less and 4 % longer, with 640 28 MB more and 3 %
# less. oneDNN has one cache of them, and torch's layer above it one for each kind and thread, whose entries take more,
# for little.
KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": 448, "LRU_CACHE_CAPACITY": 16}
# Of glibc's mallopt (man 3 mallopt): what is named, and bytes, of the first the most that it takes, of the second more
# than a step frees.
MMAP_THRESHOLD, TRIM_THRESHOLD = (-3, 1 << 25), (-1, 1 << 30)
# What Linux tells of a process, and what sets the most memory it took back to what it takes (man 5 proc).
PROCESS, HIGH_WATER = Path("/proc/self"), "5"
# Of what is mapped, in Linux' words: a file of which each page that is written to becomes the process's own; pages that
# were.  Of its madvise: those that were not may go.
OF_A_FILE, CHANGED, DONTNEED = b"rw-p", (b"Anonymous:", b"Swap:"), 4
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


def spare() -> None:
    """Keep no more of the kernels that oneDNN compiles for each shape of a matrix than are used again: each is up to
    half a MB. To be called before the first product.
    """
    for name, most in KERNELS.items():
        os.environ.setdefault(name, str(most))


def collect_rarely() -> None:
    """Nothing in a step is garbage, nor are modules: to look for some each time that 700 objects were made takes 2 % of
    a training and a tenth of the imports.
    """
    gc.set_threshold(100_000, *gc.get_threshold()[1:])


def hold() -> None:
    """Keep freed memory for what comes next. Each step of a training on a CPU frees tens of MB and takes as many, and
    pages that went back to Linux in between are zeroed and mapped anew, which takes a tenth of its time.
    """
    with suppress(OSError, AttributeError):  # another system than Linux, or one without glibc
        tune = ctypes.CDLL(None).mallopt
        tune(*MMAP_THRESHOLD)
        tune(*TRIM_THRESHOLD)


def let_go() -> None:
    """Give Linux back what is held and free: for what comes next needs other sizes, as scoring does after training.

    And the pages of weights that are as in their file, most of which nobody reads again once a trunk is kept: the
    embeddings, and matrices that were cast. To be called while no other thread writes to any.
    """
    with suppress(OSError, AttributeError):
        system = ctypes.CDLL(None)
        system.malloc_trim(0)
        for begin, end in _unchanged():
            system.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), DONTNEED)


def _unchanged() -> Iterator[tuple[int, int]]:
    """Addresses of files, mapped as weights are, of which no page was written to."""
    whole: tuple[int, int] | None = None
    for line in (PROCESS / "smaps").read_bytes().rstrip().split(b"\n"):
        first, *rest = line.split()
        if not first.endswith(b":"):
            begin, _, end = first.partition(b"-")
            kind, _, _, inode, *_ = rest
            whole = (int(begin, 16), int(end, 16)) if kind == OF_A_FILE and inode != b"0" else None
        elif first in CHANGED and rest[0] != b"0":
            whole = None
        elif first == CHANGED[-1] and whole:
            yield whole


def forget_peak(device: torch.device) -> None:
    """Begin to measure here what `peak` tells, for a job that is not the first of its process."""
    if device.type == "cuda":
        import torch

        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # else it took nothing, and may not be asked
            torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # on another system than Linux, or in a container that may not
        (PROCESS / "clear_refs").write_text(HIGH_WATER)


def peak(device: torch.device) -> int:
    """Bytes that this process took at most: of the GPU's memory, or where there is none of the machine's.

    Since `forget_peak`, where the system can.
    """
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    # Not ru_maxrss where it can be had: of a process that was started by vfork, that begins at its parent's.
    with suppress(OSError, StopIteration):
        lines = (PROCESS / "status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
