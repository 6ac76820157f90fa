"""Threads that share a batch: who takes what, and that gradients are those of one."""

from __future__ import annotations

import threading
import time
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from components.training.crew import Crew, shares

LENGTHS = np.random.default_rng(0).integers(3, 200, size=16)


@pytest.mark.parametrize("hands", [1, 2, 3, 5])
def test_every_row_is_somebodys(hands: int) -> None:
    assert sorted(np.concatenate(shares(LENGTHS, hands))) == list(range(16))


@pytest.mark.parametrize("lengths", [[7], [5, 9], [1, 1, 400]])
def test_nobody_gets_nothing(lengths: list[int]) -> None:
    assert all(len(rows) for rows in shares(np.array(lengths), 4))


@pytest.mark.parametrize("hands", [2, 3, 4])
def test_all_have_as_many_rows(hands: int) -> None:
    counts = [len(rows) for rows in shares(LENGTHS, hands)]
    assert len(counts) == hands
    assert max(counts) - min(counts) <= 1


def test_rows_of_like_length_go_together() -> None:
    short, long = shares(LENGTHS, 2)
    assert LENGTHS[short].max() <= LENGTHS[long].min()


def test_outputs_and_gradients_are_those_of_one_pass() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    unused = nn.Parameter(torch.zeros(2))
    x = torch.randn(10, 4, dtype=torch.float64)
    alone = model(x)
    alone.pow(2).sum().backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    crew = Crew(2)
    with crew.at_work():
        joined = crew.together([partial(model, x[:3]), partial(model, x[3:])], [*model.parameters(), unused])
        joined.pow(2).sum().backward()
    assert torch.allclose(joined, alone)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None and gradient is not None
        assert torch.allclose(parameter.grad, gradient)
    assert unused.grad is None


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
