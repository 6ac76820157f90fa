"""Threads that share a batch: who takes what, and that gradients are those of one."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from components.training.batching import LEARNED_AT_ONCE
from components.training.crew import Crew
from components.training.passes import passes
from components.training.precision import Precision
from tests.training.plain_loop import CPU, model_of, tokens_of


def test_losses_and_gradients_are_those_of_one_pass() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    unused = nn.Parameter(torch.zeros(2))
    x = torch.randn(10, 4, dtype=torch.float64)
    parameters = [*model.parameters(), unused]

    def loss(rows: slice) -> torch.Tensor:
        found: torch.Tensor = model(x[rows]).pow(2).sum()
        return found

    learned = []
    for hands in (1, 2):
        crew = Crew(hands)
        with crew.at_work():
            for parts in ([slice(0, 10)], [slice(0, 3), slice(3, 4), slice(4, 10)]):
                model.zero_grad()
                total = crew.learn([partial(loss, rows) for rows in parts], parameters)
                learned.append([total, *(parameter.grad for parameter in model.parameters())])
                assert unused.grad is None
    for each in learned[1:]:
        for found, expected in zip(each, learned[0], strict=True):
            assert torch.allclose(found, expected)


def test_gradients_lie_in_memory_as_their_parameters_do() -> None:
    """A fused optimizer reads both from first to last, whatever their strides say."""
    weight = nn.Parameter(torch.arange(24.0).view(2, 3, 4))
    crew = Crew(2)
    with crew.at_work():
        crew.learn([lambda: (weight.permute(2, 0, 1).contiguous() ** 2).sum() for _ in range(2)], [weight])
        assert weight.grad is not None
        assert weight.grad.stride() == weight.stride()
        assert torch.equal(weight.grad, 4 * weight)
        crew.learn([lambda: weight.sum()] * 2, [weight])  # whose gradient is one number, seen often
    assert torch.equal(weight.grad, 4 * weight + 2)


def test_what_was_told_is_not_kept_until_the_last_piece_is_done() -> None:
    """Or the gradients of all would be in memory at once."""

    class Large:
        alive: ClassVar[set[int]] = set()

        def __init__(self) -> None:
            time.sleep(0.005)
            self.alive.add(id(self))
            weakref.finalize(self, self.alive.discard, id(self))

    crew, most = Crew(2), 0
    with crew.at_work():
        for made in crew._in_order([Large] * 40):
            assert id(made) in Large.alive
            most = max(most, len(Large.alive))
    assert most < 20


def test_gradients_are_added_to_those_that_are_there() -> None:
    weight = nn.Parameter(torch.ones(3))
    crew = Crew(2)
    with crew.at_work():
        for _ in range(2):
            crew.learn([weight.sum, (2 * weight).sum], [weight])
    assert weight.grad is not None
    assert weight.grad.tolist() == [6, 6, 6]


def test_pieces_are_done_side_by_side_and_returned_in_order() -> None:
    meeting = threading.Barrier(2, timeout=30)  # none passes alone
    crew = Crew(2)

    def piece(number: int) -> int:
        meeting.wait()
        return number

    with crew.at_work():
        assert crew.each([partial(piece, number) for number in range(4)]) == [0, 1, 2, 3]


def test_threads_of_operations_are_as_before_afterwards() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), Crew(2).at_work():
        _ = 1 / 0
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_after_an_error_nothing_is_begun_and_nothing_is_at_work(error: type[BaseException]) -> None:
    begun: list[int] = []
    ended: list[int] = []

    def piece(number: int) -> None:
        begun.append(number)
        if number == 0:
            raise error
        time.sleep(0.02)
        ended.append(number)

    crew = Crew(2)
    with crew.at_work():
        with pytest.raises(error):
            crew.each([partial(piece, number) for number in range(100)])
        assert {*begun} - {0} == {*ended}
        assert len(ended) < 50  # the other hand goes on until the error is told
        assert crew.each([partial(int, "7"), partial(int, "8")]) == [7, 8]


def test_one_hand_is_the_thread_that_calls() -> None:
    crew = Crew(1)
    with crew.at_work():
        assert crew.each([threading.get_ident] * 2) == [threading.get_ident()] * 2


def cores_of_openmp() -> int:
    """Of this thread, as oneDNN sees it. Not asked through torch, which would set it first."""
    files = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    (its_own,) = (file for file in files if "/torch" in file)  # other libraries bring theirs
    return int(ctypes.CDLL(its_own).omp_get_max_threads())


@pytest.mark.skipif(sys.platform != "linux", reason="what is loaded is told by Linux")
def test_hands_share_the_cores() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        crew = Crew(2)
        with crew.at_work():
            assert crew.each([cores_of_openmp] * 2) == [2, 2]
            assert crew.each([torch.get_num_threads] * 2) == [2, 2]
        assert torch.get_num_threads() == 4
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == 4
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("low", "hands"), [(False, 2), (True, 1)])
def test_in_bfloat16_one_thread_learns_with_all_cores(tiny_base: Path, low: bool, hands: int) -> None:
    before, model, tokens = torch.get_num_threads(), model_of(tiny_base, "pfeiffer"), tokens_of(tiny_base)
    torch.set_num_threads(2)
    try:
        with passes(model, tokens, tokens, 0, CPU, Precision(CPU, low=low), batch=16) as through:
            assert through.crew.hands == hands
            assert torch.get_num_threads() == 2 // hands
            assert through.at_once == 2 * LEARNED_AT_ONCE
    finally:
        torch.set_num_threads(before)
