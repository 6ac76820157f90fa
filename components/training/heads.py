"""Attention of all heads of all rows as one call: `heads.c`, compiled where a C compiler and such a processor are.

torch's products of single heads reach two fifths of what the processor can multiply, write every score to memory, and
between them heads are copied apart and together again.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from components import cache, digest
from components.errors import StorageError
from components.training.packing import Packing

log = logging.getLogger("adapterline")

SOURCE = Path(__file__).with_suffix(".c")
INSTRUCTIONS = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16", "-mfma")
FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC", "-fopenmp", *INSTRUCTIONS)
COMPILING_S = 60.0
# Features of a head that a tile has beside each other.
FEATURES = 32


def fits(device: torch.device, dtype: torch.dtype, features: int) -> bool:
    """May heads of so many features be computed so?"""
    return device.type == "cpu" and dtype == torch.bfloat16 and features % FEATURES == 0 and library() is not None


def attend(qkv: torch.Tensor, packing: Packing, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What each query sees, (tokens, hidden), and the norms that `attend_back` wants, (tokens, heads) in float32.

    qkv: (tokens, 3 · hidden) in bfloat16, with queries whose scores are exponents of two. What is no token sees zeros.
    """
    tokens, hidden = len(qkv), qkv.shape[1] // 3
    made = (torch.empty if packing.mask is None else torch.zeros)(tokens, hidden, dtype=qkv.dtype)
    norms = torch.empty(tokens, heads)
    _call("attend", packing, heads, hidden, qkv, made, norms)
    return made, norms


def attend_back(
    qkv: torch.Tensor, norms: torch.Tensor, grad: torch.Tensor, packing: Packing, heads: int
) -> torch.Tensor:
    """Gradients of `qkv` in `attend`, from those of what is seen: (tokens, hidden)."""
    made = torch.empty_like(qkv) if packing.mask is None else torch.zeros_like(qkv)
    _call("attend_back", packing, heads, grad.shape[1], qkv, grad.contiguous(), norms, made)
    return made


def _call(name: str, packing: Packing, heads: int, hidden: int, qkv: torch.Tensor, *tensors: torch.Tensor) -> None:
    called, features, threads = library(), hidden // heads, torch.get_num_threads()
    assert called is not None  # noqa: S101  # who calls this has asked `fits`
    space = called.workspace(int(packing.lengths.max()), features, name == "attend_back")
    spaces = torch.empty(threads * space, dtype=torch.uint8)
    starts, lengths = (np.ascontiguousarray(each, np.int64) for each in (packing.starts, packing.lengths))
    getattr(called, name)(
        qkv.data_ptr(),
        starts.ctypes.data,
        lengths.ctypes.data,
        packing.rows,
        heads,
        features,
        *(each.data_ptr() for each in tensors),
        spaces.data_ptr(),
        space,
        threads,
    )


@functools.cache
def library() -> Any:
    """The compiled functions; None, with a reason in the log, where there are none."""
    if not getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)():
        return None
    try:
        with _compiled() as path:
            loaded = ctypes.CDLL(str(path))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        log.info("attention is computed by torch: %s", _reason(error))
        return None
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    loaded.workspace.restype, loaded.workspace.argtypes = size, (size, size, number)
    for called, tensors in ((loaded.attend, 2), (loaded.attend_back, 3)):
        called.restype = None
        called.argtypes = (*3 * (pointer,), *3 * (number,), *tensors * (pointer,), pointer, size, number)
    return loaded


@contextmanager
def _compiled() -> Iterator[Path]:
    """Where the library lies for the length of the block: in the cache folder, or only now where that may be another's.

    Raises OSError or SubprocessError where it cannot be compiled.
    """
    name = f"heads-{digest.of_json([SOURCE.read_text(), FLAGS])[:32]}.so"
    try:
        path = cache.folder() / "kernels" / name
        if not _is_mine(path):
            with cache.writing(path) as file:
                _compile(Path(file.name))
    except (StorageError, OSError):  # nothing can be written there
        pass
    else:
        if _is_mine(path):
            yield path
            return
    with tempfile.TemporaryDirectory() as folder:
        _compile(Path(folder) / name)
        yield Path(folder) / name


def _compile(to: Path) -> None:
    compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("cc") or "gcc"]
    command = [*compiler, *FLAGS, str(SOURCE), "-o", str(to), "-lm"]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILING_S)
    to.chmod(0o700)


def _is_mine(path: Path) -> bool:
    """Is it there, and can nobody else have put it there? What is loaded is run."""
    with suppress(OSError):
        return all(
            each.stat().st_uid == os.getuid() and not each.stat().st_mode & 0o022 for each in (path, path.parent)
        )
    return False


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return f"{error.cmd[0]}: {error.stderr.strip().partition(chr(10))[0] or error.returncode}"[:200]
    return str(error)[:200]
