"""Threads that share a batch: each takes some of its rows through forward and backward pass, with one core.

Where operations take long, as in float32 on CPUs, that beats threads inside each of them, which wait for one another a
thousand times a step. Gradients are summed in the order in which pieces are given, so the result does not depend on who
was faster.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import nn

T = TypeVar("T")
Loss = Callable[[], torch.Tensor]


class Crew:
    """hands: how many threads."""

    def __init__(self, hands: int) -> None:
        self.hands = hands
        self._pool: ThreadPoolExecutor | None = None

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """For the length of the block each of these threads has its share of the cores for an operation."""
        if self.hands == 1:
            yield
            return
        before = torch.get_num_threads()
        share = max(1, before // self.hands)
        torch.set_num_threads(share)
        # Each is told, too: OpenMP gives a new thread all cores, and oneDNN's products ask nobody else.
        with ThreadPoolExecutor(self.hands, "crew", torch.set_num_threads, (share,)) as self._pool:
            try:
                yield
            finally:
                self._pool = None
                torch.set_num_threads(before)

    def each(self, work: Sequence[Callable[[], T]]) -> list[T]:
        """What the pieces of work return, done side by side.

        After an error in one, or Ctrl-C, no other is begun, and none is at work any more: what they write to may go.
        """
        return list(self._in_order(work))

    def learn(self, losses: Sequence[Loss], parameters: Sequence[nn.Parameter]) -> torch.Tensor:
        """The sum of the losses, whose gradients are added to the parameters' own."""
        if self._pool is None or len(losses) == 1:
            return torch.stack([_learned(loss) for loss in losses]).sum()
        found = []
        for loss, gradients in self._in_order([partial(_gradients, loss, parameters) for loss in losses]):
            found.append(loss)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is None:
                    continue
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)  # in its layout, which a fused optimizer relies on
                parameter.grad += gradient
        return torch.stack(found).sum()

    def _in_order(self, work: Sequence[Callable[[], T]]) -> Iterator[T]:
        """As `each`, one after the other while later ones are under way: none is kept here once it is told."""
        if self._pool is None or len(work) == 1:
            yield from (piece() for piece in work)
            return
        pieces: deque[Future[T]] = deque()
        try:
            pieces.extend(self._pool.submit(piece) for piece in work)
            while pieces:
                done = pieces[0].result()
                pieces.popleft()
                yield done
        finally:
            for piece in pieces:
                piece.cancel()
            wait(pieces)


ALONE = Crew(1)


def _learned(loss: Loss) -> torch.Tensor:
    found = loss()
    found.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return found.detach()


def _gradients(loss: Loss, parameters: Sequence[nn.Parameter]) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
    found = loss()
    return found.detach(), torch.autograd.grad(found, parameters, allow_unused=True)
