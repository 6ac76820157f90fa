"""What a reviewer sees of the history: free text as it was given."""

from __future__ import annotations

import pytest

from components.registry.history import Record
from flows import review


@pytest.mark.parametrize("why", ["[incident 42] down", "see [/ABC-1]", ":warning: slow"])
def test_a_reason_is_shown_as_it_was_given(why: str) -> None:
    record = Record(sequence=1, model="m", action="promote", before=None, after="1", who="[ada]", why=why, when="")
    shown = review.history([record], None)
    assert "[ada]" in shown
    assert why in shown
