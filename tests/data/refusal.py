"""What every refusal of bad rows must be: one line that helps, and not a word of the rows."""

from __future__ import annotations

import traceback
from collections.abc import Callable

import pytest

from components.errors import AdapterlineError, DataError

SECRET = "zanzibar"  # noqa: S105  # a word of the rows, no password


def refusal(attempt: Callable[[], object], kind: type[AdapterlineError] = DataError) -> AdapterlineError:
    """The error that `attempt` raises, after the checks that hold for all of them."""
    with pytest.raises(kind) as caught:
        attempt()
    error = caught.value
    assert "\n" not in str(error)
    assert all((error.expected, error.found, error.todo))
    assert SECRET not in "".join(traceback.format_exception(error))
    return error
