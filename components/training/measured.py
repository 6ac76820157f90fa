"""What is faster on this device, by short measurements that are made once and kept."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from components import cache, digest
from components.errors import StorageError

T = TypeVar("T")

CODE = (
    "training/frozen",
    "training/heads",
    "training/kernels",
    "training/measured",
    "training/onednn",
    "training/packing",
)
TIMES = 2
# What is measured by chance as a little faster is not worth another rounding.
CLEARLY = 0.9


def kept(device: torch.device, about: list[Any], kind: Callable[..., T], measure: Callable[[], T]) -> T:
    """What was measured, from the cache folder or now. Where nothing can be written, it is not, and nothing fails.

    about: what it depends on beside device, torch, and our code.  kind: a dataclass of what JSON has.
    """
    key = digest.of_json([name_of(device), torch.__version__, *about, digest.of_code(*CODE)])
    try:
        path = cache.folder() / "kernels" / f"{key[:32]}.json"
    except StorageError:  # in a container without one, say
        return measure()
    try:
        return kind(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):  # not there yet, or damaged: measured again
        found = measure()
    with suppress(OSError), cache.writing(path) as file:
        file.write(json.dumps(vars(found)).encode())
    return found


def name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "model\t"))]
        names = names[1::-1]
    except OSError:
        names = []
    return " ".join(names) or platform.processor()


@contextmanager
def one_thread() -> Iterator[None]:
    """For the length of the block operations use one core; what is drawn at random after it does not depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(before)


def is_faster(one: Callable[[], Any], other: Callable[[], Any]) -> bool:
    """Clearly so."""
    return seconds(one) <= CLEARLY * seconds(other)


def seconds(run: Callable[[], Any]) -> float:
    """Of the fastest of some runs, after one that warms up."""
    run()
    taken = []
    for _ in range(TIMES):
        begin = time.perf_counter()
        run()
        taken.append(time.perf_counter() - begin)
    return min(taken)
