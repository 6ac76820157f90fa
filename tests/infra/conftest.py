"""One Prefect server for the tests of this folder that need nothing but its API."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import prefect_server


@pytest.fixture(scope="package")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What points clients at the server, also set in this process. Who asks is of the xdist group `prefect`."""
    with prefect_server.running(tmp_path_factory.mktemp("prefect")) as environment:
        yield environment
