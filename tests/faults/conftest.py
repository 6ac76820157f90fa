"""One supervised stack for all faults of servers, and versions registered there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from components.config import RegistryConfig
from infra import local
from tests.infra.test_stack import stack_command
from tests.registry.registered import Shelf, shelf


@pytest.fixture(scope="package")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a stack that is up; its environment is set in this process."""
    place = tmp_path_factory.mktemp("stack")
    done = stack_command("up", place / "stack", place)
    assert done.returncode == 0, done.stderr
    try:
        with local.stack(place / "stack") as found, local.exported(found.environment):
            yield place / "stack"
    finally:
        stack_command("down", place / "stack", place)


@pytest.fixture(scope="package")
def shelved(stack: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return shelf(tmp_path_factory.mktemp("shelf"), tiny_base, RegistryConfig())
