"""Memory that runs out: said in one line, and told apart from other errors of torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from components.errors import OutOfMemory
from components.training import job
from components.training.progress import Event
from components.training.spec import DataRef
from tests.training.toy_jobs import toy_spec


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


def test_a_second_try_does_not_help() -> None:
    assert not OutOfMemory.retry_can_help
