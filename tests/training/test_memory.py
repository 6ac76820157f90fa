"""Memory that runs out: said in one line, and told apart from other errors of torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from components.errors import OutOfMemory
from components.training import job, memory
from components.training.progress import Event
from components.training.spec import DataRef
from tests.training.toy_jobs import finished, toy_spec

CPU = torch.device("cpu")
BALLAST = 600 * 10**6


def test_a_job_without_memory_says_what_to_lower(lively_base: Path, data: DataRef, tmp_path: Path) -> None:
    def swallow_it(event: Event) -> None:
        torch.empty(1 << 60)  # the allocator's own refusal, in the middle of training

    with pytest.raises(OutOfMemory, match=r"batches of 16 texts of up to 32 tokens; .* lower training.batch_size"):
        job.run(toy_spec(lively_base, data, "pfeiffer"), str(tmp_path), swallow_it)


def test_other_errors_of_torch_are_not_about_memory(lively_base: Path, data: DataRef, tmp_path: Path) -> None:
    def multiply(event: Event) -> None:
        torch.ones(2, 3) @ torch.ones(2, 3)

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        job.run(toy_spec(lively_base, data, "pfeiffer"), str(tmp_path), multiply)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system cannot forget a peak")
def test_a_job_does_not_report_what_was_taken_before_it(lively_base: Path, data: DataRef, tmp_path: Path) -> None:
    del _ballast()[:]
    before = memory.peak(CPU)
    folder = finished(lively_base, data, "pfeiffer", tmp_path, epochs=1)
    assert json.loads((folder / "metrics.json").read_text())["peak_memory_bytes"] < before - BALLAST / 2


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system tells no other peak than its parent's")
def test_a_process_does_not_report_what_its_parent_takes() -> None:
    ballast = _ballast()
    code = (
        "from types import SimpleNamespace; from components.training import memory; "
        "print(memory.peak(SimpleNamespace(type='cpu')))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < int(told.stdout) < len(ballast)


def _ballast() -> bytearray:
    """More than a job of the tests takes, or a process without torch; in all its pages something is written."""
    return bytearray(b"1") * BALLAST


def test_a_second_try_does_not_help() -> None:
    assert not OutOfMemory.retry_can_help


HELD = """
import resource
from components.training import memory
if {hold}:
    memory.hold()
def step():
    made = [bytearray(size << 20) for size in (8, 9, 10)]  # zeroed, so each page is touched
    return len(made)
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_freed_memory_is_held() -> None:
    """Pages that the next step takes are those that were given back, not new ones."""
    made = []
    for hold in (True, False):
        done = subprocess.run(
            [sys.executable, "-c", HELD.format(hold=hold)], capture_output=True, text=True, check=True
        )
        made.append(int(done.stdout))
    assert made[0] < made[1] / 10


LET_GO = """
from components.training import memory
def resident():
    return int(open("/proc/self/statm").read().split()[1])
memory.hold()
before = resident()
made = [bytearray(20 << 20) for _ in range(8)]
with_all = resident()
del made[:-1]  # the last one keeps those below it on the heap
held = resident()
memory.let_go()
print(before, with_all, held, resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="malloc_trim is glibc's")
def test_what_is_held_is_let_go_of_when_told() -> None:
    done = subprocess.run([sys.executable, "-c", LET_GO], capture_output=True, text=True, check=True)
    before, with_all, held, after = map(int, done.stdout.split())
    taken = with_all - before
    assert held - before > 0.9 * taken
    assert after - before < 0.2 * taken


WEIGHTS = """
import mmap, sys
import torch
from safetensors import safe_open
from components.training import memory
def resident():
    return int(open("/proc/self/statm").read().split()[2]) * mmap.PAGESIZE
file = safe_open(sys.argv[1], framework="pt")
weights = {name: file.get_tensor(name) for name in file.keys()}
before = resident()
sums = [float(each.sum()) for each in weights.values()]
if sys.argv[2] == "changed":
    weights["one"][7] = 1000
read = resident()
memory.let_go()
after = resident()
print(before, read, after, *sums, *(float(each.sum()) for each in weights.values()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what is mapped is told by Linux")
@pytest.mark.parametrize("what", ["unchanged", "changed"])
def test_weights_are_let_go_of_where_they_are_as_in_their_file(tmp_path: Path, what: str) -> None:
    """Read again they are the same; those that were written to stay, with what shares their file."""
    size = 16 << 20
    made = {"one": torch.ones(size // 4), "other": torch.ones(size // 4)}
    file = tmp_path / "blob of a hub's cache"
    save_file(made, file)
    command = [sys.executable, "-c", WEIGHTS, str(file), what]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    before, read, after = map(int, told[:3])
    assert read - before > 1.8 * size
    assert (read - after > 1.8 * size) == (what == "unchanged")
    one, other, one_after, other_after = map(float, told[3:])
    assert one == other == other_after == size // 4
    assert one_after == (one if what == "unchanged" else one + 999)
