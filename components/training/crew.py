"""Threads that share a batch: each takes some of its rows through forward and backward pass, with one core.

On CPUs that beats threads inside each operation, which wait for one another a thousand times a step. Gradients are
summed in the order of the rows, so the result does not depend on who was faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

T = TypeVar("T")
Part = Callable[[], torch.Tensor]


class Crew:
    """hands: how many threads."""

    def __init__(self, hands: int) -> None:
        self.hands = hands
        self._pool: ThreadPoolExecutor | None = None

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """For the length of the block operations are left to the core of the thread that calls them."""
        if self.hands == 1:
            yield
            return
        before = torch.get_num_threads()
        torch.set_num_threads(max(1, before // self.hands))
        with ThreadPoolExecutor(self.hands, "crew") as self._pool:
            try:
                yield
            finally:
                self._pool = None
                torch.set_num_threads(before)

    def each(self, work: Sequence[Callable[[], T]]) -> list[T]:
        """What the pieces of work return, done side by side.

        After an error in one, or Ctrl-C, no other is begun, and none is at work any more: what they write to may go.
        """
        if self._pool is None or len(work) == 1:
            return [piece() for piece in work]
        pieces: list[Future[T]] = []
        try:
            pieces.extend(self._pool.submit(piece) for piece in work)
            return [piece.result() for piece in pieces]
        finally:
            for piece in pieces:
                piece.cancel()
            wait(pieces)

    def together(self, parts: Sequence[Part], parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
        """The parts' outputs one below the other, made side by side; so are the parameters' gradients."""
        joined: torch.Tensor = _Together.apply(self, parts, *parameters)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return joined


ALONE = Crew(1)


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, crew: Crew, parts: Sequence[Part], *parameters: torch.nn.Parameter) -> torch.Tensor:
        ctx.crew, ctx.parameters = crew, parameters
        ctx.made = crew.each(parts)
        return torch.cat([each.detach() for each in ctx.made])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        parts = torch.split(gradient, [len(each) for each in ctx.made])
        found = ctx.crew.each(
            [
                lambda made=made, part=part: torch.autograd.grad(made, ctx.parameters, part, allow_unused=True)
                for made, part in zip(ctx.made, parts, strict=True)
            ]
        )
        ctx.made = None
        return None, None, *(_total(each) for each in zip(*found, strict=True))


def _total(gradients: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    given = [each for each in gradients if each is not None]
    return torch.stack(given).sum(0) if given else None


def shares(lengths: npt.NDArray[np.int64], hands: int) -> list[npt.NDArray[np.int64]]:
    """Which rows each takes, by their place in the batch: rows of like length, as many for all, for the sake of few
    shapes (see `batching.widened`).

    lengths: (batch,).  Returns at most `hands` arrays, none empty.
    """
    order = np.argsort(lengths, kind="stable")
    return [rows for rows in np.array_split(order, hands) if len(rows)]
