"""The processes of one job: each computes its share of every batch, and all keep the same weights.

`components.training.launch`, `accelerate launch` and `torchrun` start them and say in the environment who is who
(RANK, WORLD_SIZE, …); a job that was started otherwise is alone, and then nothing here costs anything.

Gradients are summed in one piece a step: by gloo on the CPU, by NCCL on GPUs. An adapter's are a few hundred kB.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from components.errors import ConfigError, JobKilled, TrainingError

if TYPE_CHECKING:
    import torch

# A process that is gone is noticed at once; one that is silent may be fetching a large base model for its machine.
PATIENCE = timedelta(minutes=30)
# The process that fails first says why. The others let its launcher end them, and speak only when nobody does.
GRACE_S = 10.0
# The label of a row that does not count, as torch.nn.functional.cross_entropy has it.
NO_LABEL = -100
PARENT_DEATH = 1  # PR_SET_PDEATHSIG of prctl(2)

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """All processes of a job, seen from one of them.

    rank, size: over all machines.  local_rank, local_size: on this machine.  machine: its number.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    machine: int = 0

    @property
    def is_main(self) -> bool:
        """Does this process write what the job leaves?"""
        return self.rank == 0

    @contextmanager
    def joined(self, device: str, job: str) -> Iterator[None]:
        """Connected with the others, who must do the job with this digest too, for the length of the block.

        Raises TrainingError without the device, ConfigError when the processes do not agree.
        """
        if self.size == 1:
            yield
            return
        import torch.distributed as dist

        end_with_parent()
        own = find_device(device, self)
        with _others():
            backend = "gloo" if own.type == "cpu" else "cpu:gloo,cuda:nccl"
            dist.init_process_group(backend, timeout=PATIENCE, device_id=own if own.type == "cuda" else None)
            about: list[str] = [""] * self.size
            dist.all_gather_object(about, f"job {job[:12]} on {own.type}")
        if len(set(about)) > 1:
            raise ConfigError(
                "the same job on every process", ", ".join(sorted(set(about))), "give all the same spec and device"
            )
        yield
        dist.destroy_process_group()  # not after an error: the others would not answer

    def share(
        self, rows: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """This process's rows of a batch, and their labels.

        Where there are fewer rows than processes, some compute one that does not count, so that all have gradients of
        the same parameters.
        """
        mine = rows[self.rank :: self.size]
        return (mine, labels[mine]) if len(mine) else (rows[:1], np.array([NO_LABEL]))

    def turns(self, work: Iterable[T]) -> Sequence[T]:
        """The pieces of work that are this process's."""
        return list(work)[self.rank :: self.size]

    def combine(self, loss: torch.Tensor, parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
        """Sum the processes' gradients, and their losses: each is a part of those of the whole batch."""
        if self.size == 1:
            return loss
        import torch
        import torch.distributed as dist

        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        together = torch.cat([loss.reshape(1), *(gradient.reshape(-1) for gradient in gradients)])
        with _others():
            dist.all_reduce(together)
        total, *parts = torch.split(together, [1, *(gradient.numel() for gradient in gradients)])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        return total.squeeze(0)

    def total(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The sum of every process's array."""
        if self.size == 1:
            return values
        import torch
        import torch.distributed as dist

        with _others():
            dist.all_reduce(torch.from_numpy(values))  # shares the array's memory
        return values

    def from_main(self, make: Callable[[], T]) -> T:
        """What the main process makes, for every process."""
        if self.size == 1:
            return make()
        import torch
        import torch.distributed as dist

        made = [make() if self.is_main else None]
        with _others():
            dist.broadcast_object_list(made, src=0, device=torch.device("cpu"))
        return made[0]  # type: ignore[return-value]  # None only where the main process made None

    @contextmanager
    def first_here(self) -> Iterator[None]:
        """The first process of each machine goes before the others, who find what it fetched."""
        if self.local_rank > 0:
            self._wait()
        yield
        if self.local_rank == 0:
            self._wait()

    def seed(self, job: int, step: int) -> int:
        """For what is drawn in a step, of a job with this seed: dropout masks, others in each process."""
        return int(np.random.SeedSequence((job, step, self.rank)).generate_state(1, np.uint64)[0])

    def say(self, error: Exception, line: str) -> None:
        """Print why the job fails: one line a machine, the reason of the process that failed first."""
        if self.size > 1:
            if isinstance(error, JobKilled):
                time.sleep(GRACE_S)
            if not (line := self._reason(line)):
                return
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    def _reason(self, line: str) -> str:
        """The first reason that any process gave; nothing when it was already said on this machine."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in its __all__

        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        try:
            store = TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                timeout=timedelta(seconds=GRACE_S),
            )
            first: bytes = store.compare_set(f"adapterline/{attempt}/reason", "", line)
            said = store.add(f"adapterline/{attempt}/said/{self.machine}", 1) > 1
        except (KeyError, ValueError, RuntimeError):  # no store, or gone with its owner: better twice than not at all
            return line
        return "" if said else first.decode()

    def _wait(self) -> None:
        self.total(np.zeros(1, dtype=np.float32))


ALONE = Group()


def from_environment() -> Group:
    """The group that this process was started in."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
    try:
        return Group(*(int(os.environ[name]) for name in names))
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"the numbers {', '.join(names)} in the environment", str(error), "start the job by torchrun or accelerate"
        ) from error


def find_device(name: str, group: Group = ALONE) -> torch.device:
    """`cpu`, or this process's GPU. Raises TrainingError when there is none that can be used, or are too few."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what CUDA has to say about a missing driver, we say in one line
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and count == 0):
        return torch.device("cpu")
    if count == 0:
        raise TrainingError(
            "a CUDA device", "none that torch can use", "set compute.device: cpu, or run where a GPU is"
        )
    if count < group.local_size:
        raise TrainingError(
            f"a CUDA device for each of {group.local_size} processes",
            f"{count} on this machine",
            f"set compute.processes to at most {count}",
        )
    device = torch.device("cuda", group.local_rank)
    try:
        torch.empty(1, device=device)
    except RuntimeError as error:
        raise TrainingError(
            f"CUDA device {group.local_rank} to answer", type(error).__name__, "look at it with nvidia-smi"
        ) from error
    torch.cuda.set_device(device)
    return device


@contextmanager
def _others() -> Iterator[None]:
    """Turn what is raised when another process is gone into JobKilled."""
    try:
        yield
    except RuntimeError as error:  # torch has no one class for it
        raise JobKilled(
            "every process of the job to answer", "that one is gone", "see its output; run again: it resumes"
        ) from error


def end_with_parent() -> None:
    """A launcher that is killed takes its processes along: nobody would end them or look at them."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PARENT_DEATH, signal.SIGKILL)
