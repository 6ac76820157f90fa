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
from pathlib import Path
from typing import Any

import numpy as np
import torch

from components.training.packing import Packing

log = logging.getLogger("adapterline")

SOURCE = Path(__file__).with_suffix(".c")
INSTRUCTIONS = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16", "-mfma")
FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC", "-fopenmp", *INSTRUCTIONS)
COMPILING_S = 60.0
# Features of a head that a tile has beside each other.
FEATURES = 32


def may_fit(device: torch.device, dtype: torch.dtype, features: int) -> bool:
    """As `fits`, without compiling: is there all that it takes?"""
    here = device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return here and dtype == torch.bfloat16 and features % FEATURES == 0 and shutil.which(_compiler()[0]) is not None


def fits(device: torch.device, dtype: torch.dtype, features: int) -> bool:
    """Can heads of so many features be computed so?"""
    return may_fit(device, dtype, features) and _library() is not None


def attend(qkv: torch.Tensor, packing: Packing, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What each query sees, (tokens, hidden), and the norms that `attend_back` wants, (tokens, heads) in float32.

    qkv: (tokens, 3 · hidden) in bfloat16, with queries whose scores are exponents of two. What is no token sees zeros.
    """
    made = _room(packing, qkv.new_empty(len(qkv), qkv.shape[1] // 3))
    norms = torch.empty(len(qkv), heads, dtype=torch.float32, device=qkv.device)
    _call("attend", packing, heads, made.shape[1], qkv, made, norms)
    return made, norms


def attend_back(
    qkv: torch.Tensor, norms: torch.Tensor, grad: torch.Tensor, packing: Packing, heads: int
) -> torch.Tensor:
    """Gradients of `qkv` in `attend`, from those of what is seen: (tokens, hidden)."""
    made = _room(packing, torch.empty_like(qkv))
    _call("attend_back", packing, heads, grad.shape[1], qkv, grad, norms, made)
    return made


def _room(packing: Packing, made: torch.Tensor) -> torch.Tensor:
    """What no row writes to is zero."""
    return made if packing.lengths.sum() == packing.tokens else made.zero_()


def _call(name: str, packing: Packing, heads: int, hidden: int, *tensors: torch.Tensor) -> None:
    called, features, threads = _library(), hidden // heads, torch.get_num_threads()
    tensors = tuple(each.contiguous() for each in tensors)
    starts, lengths = (np.ascontiguousarray(each, np.int64) for each in (packing.starts, packing.lengths))
    space = called.workspace(int(lengths.max()), features, name == "attend_back")
    spaces = torch.empty(threads * space, dtype=torch.uint8, device=tensors[0].device)
    qkv, *others = (each.data_ptr() for each in tensors)
    rows = (starts.ctypes.data, lengths.ctypes.data, packing.rows)
    getattr(called, name)(qkv, *rows, heads, features, *others, spaces.data_ptr(), space, threads)


@functools.cache
def _library() -> Any:
    """The compiled functions; None, with a reason in the log, where there are none.

    Compiled anew by each process, in half a second: what lies in a cache folder might be another's, and would be run.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="adapterline-") as folder:
            path = Path(folder) / SOURCE.with_suffix(".so").name
            command = [*_compiler(), *FLAGS, str(SOURCE), "-o", str(path), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILING_S)
            loaded = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("attention is computed by torch, which takes longer: %s", _reason(error))
        return None
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    loaded.workspace.restype, loaded.workspace.argtypes = size, (size, size, number)
    for called, tensors in ((loaded.attend, 2), (loaded.attend_back, 3)):
        called.restype = None
        called.argtypes = (*3 * (pointer,), *3 * (number,), *tensors * (pointer,), pointer, size, number)
    return loaded


def _compiler() -> list[str]:
    """`$CC`, or cc."""
    try:
        return shlex.split(os.environ.get("CC", "")) or ["cc"]
    except ValueError:  # a quotation without end
        return ["cc"]


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return f"{error.cmd[0]}: {error.stderr.strip().partition(chr(10))[0] or error.returncode}"[:200]
    return str(error)[:200]
