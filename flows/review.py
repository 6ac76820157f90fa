"""What a reviewer sees: the evidence, what was done, and the history."""

from __future__ import annotations

import io
from collections.abc import Sequence

from components.registry.history import Record
from components.registry.promotion import Case
from flows import screen


def page(case: Case) -> str:
    """The evidence as Markdown, for Prefect's pages."""
    return f"{_head(case)}\n\n{screen.summary(case.evidence.report)}"


def case(case: Case) -> str:
    """The evidence for a terminal."""
    return "\n".join([_head(case), "", *screen.verdict(case.evidence.report)])


def moved(record: Record) -> str:
    """What a record did, in a sentence."""
    now = f"version {record.after}" if record.after else "no version"
    before = f"version {record.before}" if record.before else "none"
    return (
        f"{now} of {record.model} is in production, {before} was before "
        f"({record.action} by {record.who}: {record.why}; record {record.sequence})"
    )


def history(records: Sequence[Record], by_hand: Record | None) -> str:
    """The history as a table, oldest first. by_hand: a change that is seen and not recorded yet."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="")
    for name in ("", "when", "from", "to", "what", "who", "why", "verdict"):
        table.add_column(name, justify="right" if name in ("", "from", "to") else "left", no_wrap=name != "why")
    for record in (*records, *([by_hand] if by_hand else [])):
        number = "–" if record is by_hand else str(record.sequence)
        versions = (record.before or "–", record.after or "–")
        # Of what nobody has recorded yet it is known that it happened, not when.
        when = "not recorded yet" if record is by_hand else record.when.replace("T", " ").removesuffix("+00:00")
        table.add_row(number, when, *versions, record.action, record.who, record.why, record.verdict or "–")
    out = Console(file=io.StringIO(), width=screen.WIDTH, color_system=None, markup=False, emoji=False, highlight=False)
    out.print(table)
    text: str = out.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())


def _head(case: Case) -> str:
    evidence, version = case.evidence, case.version
    champion = f"version {evidence.champion.number}" if evidence.champion else "nothing"
    since = "compared anew, since production changed after the gate" if evidence.remeasured else "as the gate had it"
    return (
        f"version {version.number} of {version.name} ({version.tags.get('method', '?')}) for production, "
        f"where {champion} is now ({since})"
    )
