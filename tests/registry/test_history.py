"""The history of production: numbered, chained, and in which order one goes back."""

from __future__ import annotations

from pathlib import Path

import pytest

from components import storage
from components.errors import HistoryError
from components.registry import history
from components.registry.history import Action, Record


def record(sequence: int, after: str | None, action: Action = "promote", **changes: object) -> Record:
    fields = {"sequence": sequence, "model": "m", "action": action, "before": None, "after": after, "who": "ada",
              "why": "better", "when": "2026-01-01T00:00:00+00:00"}  # fmt: skip
    return Record.model_validate({**fields, **changes})


def chain(store: Path, *changes: tuple[Action, str | None]) -> list[Record]:
    """Records of these changes, written."""
    made: list[Record] = []
    for number, (action, after) in enumerate(changes, start=1):
        made.append(record(number, after, action, previous=made[-1].digest if made else ""))
        assert history.append(str(store), made[-1])
    return made


def test_records_come_back_in_order(tmp_path: Path) -> None:
    made = chain(tmp_path, *(("promote", str(number)) for number in range(12)))
    assert history.records(str(tmp_path), "m") == made


def test_a_number_is_given_once(tmp_path: Path) -> None:
    (first,) = chain(tmp_path, ("promote", "1"))
    assert not history.append(str(tmp_path), record(1, "2"))
    assert history.records(str(tmp_path), "m") == [first]


def test_a_model_without_history_has_no_records(tmp_path: Path) -> None:
    assert history.records(str(tmp_path), "m") == []


@pytest.mark.parametrize("number", [1, 2])
def test_a_record_that_is_gone_is_missed(tmp_path: Path, number: int) -> None:
    chain(tmp_path, ("promote", "1"), ("promote", "2"), ("promote", "3"))
    storage.remove(str(tmp_path / "history" / "m" / f"{number:06d}.json"))
    with pytest.raises(HistoryError, match=f"record {number} of m"):
        history.records(str(tmp_path), "m")


def test_a_record_that_was_changed_is_noticed(tmp_path: Path) -> None:
    chain(tmp_path, ("promote", "1"), ("promote", "2"))
    path = tmp_path / "history" / "m" / "000001.json"
    path.write_text(path.read_text().replace("ada", "eve"))
    with pytest.raises(HistoryError, match="record 2 of m"):
        history.records(str(tmp_path), "m")


def test_what_is_no_record_is_named(tmp_path: Path) -> None:
    storage.write(str(tmp_path / "history" / "m" / "000001.json"), b"{}")
    with pytest.raises(HistoryError, match=r"000001\.json"):
        history.records(str(tmp_path), "m")


def test_done_is_said_of_one_record(tmp_path: Path) -> None:
    first, second = chain(tmp_path, ("promote", "1"), ("promote", "2"))
    history.mark_done(str(tmp_path), first)
    assert (history.is_done(str(tmp_path), first), history.is_done(str(tmp_path), second)) == (True, False)
    assert history.records(str(tmp_path), "m") == [first, second]


def test_the_models_with_a_history_are_known(tmp_path: Path) -> None:
    chain(tmp_path, ("promote", "1"))
    history.append(str(tmp_path), record(1, "1", model="another"))
    assert history.models(str(tmp_path)) == ["another", "m"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([], None),
        ([("promote", "1")], None),
        ([("promote", "1"), ("promote", "2")], "1"),
        ([("promote", "1"), ("promote", "2"), ("roll back", "1")], None),
        ([("promote", "1"), ("promote", "2"), ("promote", "3"), ("roll back", "2")], "1"),
        ([("promote", "1"), ("promote", "2"), ("promote", "3"), ("roll back", "1")], None),
        ([("promote", "1"), ("promote", "2"), ("roll back", "1"), ("promote", "3")], "1"),
        ([("promote", "1"), ("by hand", "2")], "1"),
        ([("promote", "1"), ("by hand", None)], "1"),
        ([("promote", "1"), ("promote", "2"), ("by hand", "1")], "2"),
        ([("promote", "1"), ("promote", "2"), ("promote", "1"), ("roll back", "2")], "1"),
    ],
)
def test_the_way_back_leads_to_what_was_replaced(
    tmp_path: Path, changes: list[tuple[Action, str | None]], expected: str | None
) -> None:
    assert history.before_that(chain(tmp_path, *changes)) == expected
