"""What was in production, when and why: one numbered record a change, chained to the one before, never overwritten.

STORE/history/MODEL/000001.json   the record; that it is there decides who was first
STORE/history/MODEL/000001.done   the alias was moved as it says

A record comes before the alias moves: what was cut off in between is seen, and finished, by whoever comes next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import ValidationError

from components import digest, storage
from components.config import Frozen
from components.errors import HistoryError

Action = Literal["promote", "roll back", "by hand"]


class Record(Frozen):
    """One change of the alias `production`.

    before, after: version numbers, None for no version.  when: ISO 8601, UTC; `sequence` decides the order, no clock.
    verdict: of the gate, today.  run: of MLflow, with the evidence.  previous: digest of the record before, "" for the
    first.
    """

    sequence: int
    model: str
    action: Action
    before: str | None
    after: str | None
    who: str
    why: str
    when: str
    verdict: str = ""
    bundle_digest: str = ""
    run: str = ""
    previous: str = ""

    @property
    def digest(self) -> str:
        return digest.of_json(self.model_dump(mode="json"))


def records(store: str, model: str) -> list[Record]:
    """All records of a model, oldest first.

    Raises StorageError when the store cannot be reached, HistoryError when a record is missing or was changed.
    """
    folder = _folder(store, model)
    found = [_read(storage.join(folder, name)) for name in storage.names(folder) if name.endswith(".json")]
    previous = ""
    for number, record in enumerate(found, start=1):
        if (record.sequence, record.previous) != (number, previous):
            raise HistoryError(
                f"record {number} of {model} to follow the one before",
                f"record {record.sequence} after another than {record.previous[:12] or 'none'}",
                f"restore {folder} from a copy",
            )
        previous = record.digest
    return found


def append(store: str, record: Record) -> bool:
    """Write a record; False when another has its number: production was changed meanwhile."""
    return storage.write(_uri(store, record, "json"), record.model_dump_json(indent=2).encode(), if_absent=True)


def mark_done(store: str, record: Record) -> None:
    """Say that the alias was moved as the record has it."""
    storage.write(_uri(store, record, "done"), b"", if_absent=True)


def is_done(store: str, record: Record) -> bool:
    return storage.exists(_uri(store, record, "done"))


def models(store: str) -> list[str]:
    """The models that have a history."""
    return sorted({name.rsplit("/", 1)[0] for name in storage.names(storage.join(store, "history")) if "/" in name})


def before_that(found: Sequence[Record]) -> str | None:
    """The version that production goes back to: what the one that is there now once replaced.

    A roll back takes away what was put above its target, so that a second one goes further back instead of forth.
    """
    stack: list[str | None] = []
    for record in found:
        if record.action == "roll back" and record.after in stack:
            while stack[-1] != record.after:
                stack.pop()
        else:
            stack.append(record.after)
    return next((version for version in reversed(stack[:-1]) if version and version != stack[-1]), None)


def _read(uri: str) -> Record:
    try:
        return Record.model_validate_json(storage.read(uri))
    except ValidationError as error:
        raise HistoryError(f"a record of production at {uri}", "something else", "restore it from a copy") from error


def _folder(store: str, model: str) -> str:
    return storage.join(store, "history", model)


def _uri(store: str, record: Record, ending: str) -> str:
    return storage.join(_folder(store, record.model), f"{record.sequence:06d}.{ending}")
