"""Which of the things that lie about nothing refers to: mark and sweep, on plain values.

A thing has keys, by which it can be referred to, and refers to keys of others: a fusion's bundle to its members'
bundles, a job's spec to its split. Whatever the roots reach is kept, and so is what is young or held by a process, with
all that it reaches: a job that runs may need it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from components.storage import Entry

Kind = Literal[
    "archive", "base", "bundle", "job", "logged model", "report", "rows", "run", "split", "test rows", "tokens",
    "trunk", "unfinished", "upload",
]  # fmt: skip

WHY: dict[Kind, str] = {
    "archive": "the code pins no package file of this name",
    "base": "neither the code nor a version has this base",
    "bundle": "no version, record or job stands on this member",
    "job": "no version, record or running job has this bundle",
    "logged model": "no version or record has it",
    "report": "its run is no version's and does not run",
    "rows": "a copy of rows that no version or running job was made from",
    "run": "MLflow has deleted its run",
    "split": "no accepted data set has it",
    "test rows": "no accepted data set has them",
    "tokens": "no job has read them of late; the next one that would makes them anew",
    "trunk": "no job has read it of late; the next one that would computes it anew",
    "unfinished": "its writer was killed",
    "upload": "its writer was killed",
}


# Of things that stay because nobody can tell what they are or need.
UNREAD = "it could not be read"


@dataclass(frozen=True)
class Thing:
    """Something that stays or goes as a whole.

    base, files: a URI, and the files with names below it.  place: where a person finds it.  modified: when it last
    changed, s since 1970.  held: why it must stay in any case, e.g. a process has its lock.  mark: of what cannot be
    read off the files.
    """

    kind: Kind
    place: str
    base: str
    files: tuple[Entry, ...]
    modified: float
    keys: frozenset[str] = frozenset()
    refers: frozenset[str] = frozenset()
    held: str = ""
    why: str = ""
    mark: str = ""

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def reason(self) -> str:
        return self.why or WHY[self.kind]


def leftovers(
    things: Iterable[Thing], roots: Collection[str], before: float, spared: Collection[Kind] = ()
) -> list[Thing]:
    """The things that nothing refers to and that last changed before `before` (s since 1970).

    roots: keys that versions, records and running jobs name.  spared: kinds about which somebody could not be asked.
    """
    things = list(things)
    by_key = defaultdict(list)
    for thing in things:
        for key in thing.keys:
            by_key[key].append(thing)
    stays = [thing for thing in things if thing.held or thing.modified >= before or thing.kind in spared]
    stays += [thing for key in roots for thing in by_key[key]]
    reached: set[int] = set()
    while stays:
        thing = stays.pop()
        if id(thing) not in reached:
            reached.add(id(thing))
            stays += [other for key in thing.refers for other in by_key[key]]
    return sorted((thing for thing in things if id(thing) not in reached), key=lambda thing: (thing.kind, thing.place))


def in_both(listed: Iterable[Thing], again: Iterable[Thing]) -> list[Thing]:
    """What was listed and is listed again, unchanged."""
    first = {(thing.kind, thing.place): thing for thing in listed}
    return [thing for thing in again if is_same(first.get((thing.kind, thing.place)), thing)]


def is_same(one: Thing | None, other: Thing) -> bool:
    return one is not None and (one.files, one.mark, one.base) == (other.files, other.mark, other.base)
